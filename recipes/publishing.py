"""What comes after the work of a recipe that saves a checkpoint: its model card and, where that was
asked for, lm-evaluation-harness and the hub.

`flow.saving` calls `finish` for the folder that becomes the output, and `judge` and `push` when it
has its name: what takes hours and reaches out risks nothing of the work. `flow.output_of` calls
`check` before anything else, and `judge` and `push` for an output that waits for them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.recipes.options import Option, Saving, declared
from effattn.reports.document import Document
from effattn.reports.files import write_text_atomic
from effattn.resuming import Parts, as_json, is_of
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    import torch

WAITS = ".lm-eval.json"  # in an output that is still to be judged: the settings that it is of


def check(settings: Saving) -> None:
    """What can be known to be wrong of it before any work. Raises ValueError."""
    asked = [name for name in ("push_to_hub", "lm_eval") if getattr(settings, name)]
    if asked and not settings.saves:
        raise ValueError(f"{asked[0]}: this run saves no checkpoint that it could be done with")
    if settings.push_to_hub is not None:
        _check_hub(settings.push_to_hub)
    elif settings.push_private:
        raise ValueError("push_private: nothing is sent without push_to_hub")
    if settings.lm_eval_limit is not None and not settings.lm_eval:
        raise ValueError("lm_eval_limit: there are no examples without lm_eval")
    if settings.lm_eval and main_process():
        from effattn.evaluate.harness_runs import check_harness

        check_harness(settings.lm_eval)


def finish(settings: Saving, folder: Path, report: Document) -> None:
    """Writes the card of the checkpoint in `folder`, if there is one, and, where it is to be judged
    when it has its name, whose it is."""
    if (folder / "config.json").is_file():
        _write_card(settings, folder, report)
        if settings.lm_eval:
            kept = {"settings": as_json(settings.kept())}
            write_text_atomic(folder / WAITS, json.dumps(kept, indent=1) + "\n")


def _write_card(settings: Saving, folder: Path, report: Document) -> None:
    from effattn.hf import parentage
    from effattn.surgery import card

    made = command_line(settings)
    parent, hub = parentage.of(settings.model), settings.push_to_hub
    paths = [str(path) for path in _paths(settings)]
    card.write(folder, parent, report, settings.COMMAND, made, hub, paths)


# lm-evaluation-harness
# -------------------------------------------------------------------------------------------------


def waits(settings: Saving) -> bool:
    """Whether the output is of a run with these settings, and has not been judged."""
    return is_of(Path(settings.output) / WAITS, as_json(settings.kept()))


def judge(
    settings: Saving, show: Quiet, report: Document, device: Callable[[str], torch.device]
) -> None:
    """Evaluates the finished output, where that is asked for, and writes its report and card anew.
    The tasks are those that are asked for now; none: it waits no longer. device: what the setting
    of that name means. RuntimeError in a line where a task fails: the output is complete without
    it, and the same command goes on."""
    folder = Path(settings.output)
    # asked for later, of an output that was still to be sent, it does not wait for it
    later = bool(settings.lm_eval) and (folder / "config.json").is_file()
    if not later and not (folder / WAITS).is_file():
        return
    done = report.part("lm_eval")
    asked = {"tasks": list(settings.lm_eval), "limit": settings.lm_eval_limit}
    if settings.lm_eval and asked != {name: done.get(name) for name in asked}:
        there = f"{folder} is complete without lm-evaluation-harness, and the same command goes on"
        try:
            found = _evaluated(settings, show, folder, device(settings.device))
        except Exception as error:  # the harness's, of many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"lm_eval: {reason}; {there}") from error
        except KeyboardInterrupt as stop:  # what a recipe says when it is stopped is of its work
            stop.add_note(f"stopped; {there}")
            raise
        report.data["lm_eval"] = found
        _write_card(settings, folder, report)
        report.save(folder)
    _store(settings).unlink(missing_ok=True)  # the report has it all
    (folder / WAITS).unlink(missing_ok=True)


def _evaluated(settings: Saving, show: Quiet, folder: Path, device: torch.device) -> dict:
    """What the parent and the checkpoint reach, task by task: for a report's "lm_eval". What is
    finished of it is kept beside the output, and the same command goes on from there."""
    from effattn.evaluate.harness_runs import harness_scores, prompt_length
    from effattn.profiling.environment import package_version
    from effattn.surgery.checkpoint import load_model

    kept = _kept(settings)
    own = Path(settings.model)
    parent = fingerprint(own) if own.is_dir() else settings.model
    names = {"before": (settings.model, parent), "after": (folder, fingerprint(folder))}
    found: dict[str, dict] = {}
    length = None  # of our own prompts: the same for both, as the parent was trained
    for side, (name, of) in names.items():
        said = "the parent" if side == "before" else "the result"
        with show.stage(f"loading {said} for lm-evaluation-harness"):
            model, tokenizer = load_model(name, bos=getattr(settings, "bos", None))
            if device.type != model.device.type:
                model.to(device)
        length = length or prompt_length(model)
        found[side] = {}
        for task in settings.lm_eval:
            key = json.dumps([of, task, settings.lm_eval_limit, length])
            how = {"limit": settings.lm_eval_limit, "length": length}
            with show.stage(f"lm-evaluation-harness, {task}: {said}") as progress:
                scored = partial(harness_scores, model, tokenizer, [task], progress=progress, **how)
                found[side] |= kept.once(key, scored)
        del model
    return {
        "tasks": list(settings.lm_eval),
        "limit": settings.lm_eval_limit,
        "length": length,
        "version": package_version("lm_eval"),
        **found,
    }


def _kept(settings: Saving) -> Parts:
    """What is finished of it. Of another machine or version it is nothing."""
    from effattn.profiling.environment import environment, package_version

    here = environment()
    made_with = {name: here[name] for name in ("torch", "transformers", "device")}
    made_with["lm_eval"] = package_version("lm_eval")
    given = (_store(settings), {"model": settings.model}, made_with, "lm-eval")
    try:
        return Parts(*given)
    except ValueError:
        return Parts(*given, fresh=True)


def _store(settings: Saving) -> Path:
    output = Path(settings.output).absolute()
    return output.parent / f".{output.name}.lm-eval.json"


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's configuration and weights."""
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        with file.open("rb") as body:
            digest.update(hashlib.file_digest(body, "sha256").digest())
    return digest.hexdigest()


# The hub
# -------------------------------------------------------------------------------------------------


def _check_hub(name: str) -> None:
    """ValueError unless the hub could have a repository of that name and this process may write
    there, as far as that can be known without asking it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"push_to_hub: got {name!r}, valid is a repository, owner/name or name ({error})"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub: HF_HUB_OFFLINE is set, nothing can be sent")
    if get_token() is None:
        raise ValueError("push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(settings: Saving, show: Quiet) -> None:
    """Sends the finished output to the hub, as one commit, if that was asked for. RuntimeError in a
    line where it did not get there: the output is complete all the same."""
    from huggingface_hub import HfApi

    name = settings.push_to_hub
    if name is None:
        return
    api, private = HfApi(), settings.push_private or None  # None: as the owner's default is
    again = ["hf", "upload", name, str(settings.output)] + ["--private"] * settings.push_private
    complete = f"the output is complete, send it with: {shlex.join(again)}"
    with show.stage(f"sending to the hub, as {name}"):
        try:
            made = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=settings.output,
                commit_message=f"effattn {settings.COMMAND}",
            )
        except Exception as error:  # the hub library's, of many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"push_to_hub: {name} did not get all of it ({reason}); {complete}"
            ) from error
        except KeyboardInterrupt as stop:  # what a recipe says when it is stopped is of its work
            stop.add_note(f"stopped; {name} may not have all of it; {complete}")
            raise


# The command
# -------------------------------------------------------------------------------------------------


def command_line(settings: Saving) -> str:
    """The command that gives these settings, as one types it; what was given from Python alone is
    not in it. Of absolute paths it has the last part: where they lie is nobody else's business."""
    words = ["effattn", *settings.COMMAND.split()]
    for one in declared(type(settings)):
        if one.name in settings.AFTER or not hasattr(settings, one.name):  # `InitVar` is no setting
            continue
        value = getattr(settings, one.name)
        if one.default is MISSING or value != one.default:
            words += _words(one, value)
    return shlex.join(words)


def _words(one: Field, value: Any) -> Iterator[str]:
    how: Option = one.metadata["option"]
    flag = how.flags[0] if how.flags else "--" + one.name.replace("_", "-")
    if isinstance(value, bool):
        yield flag if value else "--no-" + flag.removeprefix("--")
    elif how.repeated:
        for part in value:
            yield from (flag, ",".join(part) if isinstance(part, tuple) else _text(part))
    elif isinstance(value, list | tuple):
        yield from (flag, ",".join(map(_text, value)) or "none")
    else:
        yield from (flag, "none" if value is None else _text(value))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return Path(value).name if _absolute(value) else str(value)


def _absolute(value: Any) -> bool:
    return isinstance(value, str | Path) and Path(value).is_absolute() and bool(Path(value).name)


def _paths(settings: Saving) -> Iterator[str | Path]:
    """The absolute paths among the settings."""
    for value in settings.told().values():
        several = value if isinstance(value, list | tuple) else [value]
        yield from filter(_absolute, several)
