"""Conversions that need not have the whole model in memory: what their recipes share.

`--measure` says which way they go: with the model in memory, which is then measured and may be
trained, or from file to file, one decoder layer in memory at a time
(`effattn.surgery.from_files`), with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.recipes import flow, options
from effattn.recipes.options import option
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    import torch

MEASURE = ("auto", "yes", "no")
# What measuring needs room for, in models: the parent, what comes of it, and what undoes a
# conversion, or another one to compare with.
COPIES = 3
TOO_LARGE = "no: the model does not fit into memory three times"


def measure_option() -> Any:
    """The field of a recipe's settings."""
    return option(
        "auto",
        "whole models in memory, measured before and after: auto (if they fit), yes; no: from file "
        "to file, one layer in memory",
    )


def check(settings: Any, trains: str | None = None) -> None:
    """ValueError for a word that `--measure` has not, and for training (a number of tokens, in the
    setting called `trains`) without a model in memory."""
    from effattn.errors import check_choice

    check_choice("measure", settings.measure, MEASURE)
    if trains and getattr(settings, trains) and settings.measure == "no":
        raise ValueError(
            f"{trains}: got some with measure 'no'; training needs the whole model in memory"
        )
    if settings.lm_eval and settings.measure == "no":
        raise ValueError("lm_eval: got some with measure 'no'; it needs the whole model in memory")


def fits(settings: Any, trains: str | None = None, source: Path | None = None) -> bool:
    """Whether models are in memory. source: the checkpoint's folder, where it is known. ValueError
    where they should be and do not fit."""
    from effattn.hf.source import resolve
    from effattn.hf.weight_files import file_bytes
    from effattn.profiling.memory import available_bytes

    if settings.measure == "no":
        return False
    free = available_bytes(flow.device(settings.device))
    # nothing is known of a hub name before it is loaded
    needed = COPIES * (file_bytes(source or resolve(settings.model)) or 0)
    room = free is None or needed < 0.8 * free
    needs_models = (trains and getattr(settings, trains)) or settings.lm_eval
    if not room and (settings.measure == "yes" or needs_models):
        raise ValueError(
            f"measure: comparing and training need about {needed:,} bytes of memory, {free:,} are "
            "free; valid is 'no'"
        )
    return room


def convert(settings: Any, show: Quiet, heads: str) -> Any:
    """Gives the checkpoint `heads`, a spec, from file to file; returns the report, which is in the
    output as well. Where an earlier run stopped, this one goes on. Only the main process works.

    Raises as `effattn.convert_files`."""
    from effattn.surgery.from_files import FACTS, convert_files, report_of_files

    how = {"heads": heads, "bos": settings.bos}
    said = f"converting from file to file, layer by layer, to {heads}"
    make, again = partial(convert_files, **how), partial(report_of_files, **how)
    return carry_out(settings, show, said, make, again, FACTS)


def carry_out(
    settings: Any,
    show: Quiet,
    said: str,
    make: Callable[..., Any],
    again: Callable[[Path, Path, torch.Tensor], Any],
    facts: str,
) -> Any:
    """What make(source, folder, tokens, device=, work=, progress=) makes in a new folder becomes
    the output; returns the report that it gives, or of a run that was killed as it saved, again(
    source, folder, tokens). said: the stage. facts: the file of that folder, written last, that
    says what a report says."""
    from effattn.hf.source import folder_of, load_tokenizer
    from effattn.hf.weight_files import file_bytes
    from effattn.outputs import check_room, link_or_copy

    if not main_process():
        return None
    flow.check_unfinished(settings, begin=True)
    source, folder = folder_of(settings.model), settings.partial / "converted"
    check_room("output", settings.output, file_bytes(source))
    with show.stage("reading text"):
        text, told = read(settings, load_tokenizer(source))
    work = settings.partial / "layers"
    if (folder / facts).is_file() and not work.exists():
        report = again(source, folder, text)
    else:
        device = flow.device(settings.device)
        try:
            with show.stage(said) as progress:
                report = make(source, folder, text, device=device, work=work, progress=progress)
        except ValueError:
            if not work.exists():  # refused before anything was done: nothing to go on from
                flow.discard(settings.partial)
            raise
    report.data["settings"] |= told | {"model": settings.model}
    report.data["settings"]["measure"] = "no" if settings.measure == "no" else TOO_LARGE
    with flow.saving(settings, show, report) as output:
        for file in folder.iterdir():
            if file.name != facts:  # the report has them
                link_or_copy(file, output / file.name)
    flow.discard(settings.partial)
    return report


def read(settings: Any, tokenizer: Any) -> tuple[torch.Tensor, dict]:
    """The calibration tokens, (N,) int64, and what a report says of them."""
    from effattn.textdata import streams

    text = streams(
        tokenizer,
        train=settings.calibration_tokens,
        evaluation=settings.evaluation_tokens,
        text=settings.text,
        dataset=settings.dataset,
        column=settings.column,
        evaluation_text=settings.evaluation_text,
    )
    told = {"calibration_source": text.source, "evaluation_source": text.evaluation_source}
    return text.train[: settings.calibration_tokens], told


def spec(name: str, settings: options.Settings, *names: str) -> str:
    """`name(option=value, ...)` of those of these settings that are not None."""
    from effattn.specs import format_spec

    given = {one: getattr(settings, one) for one in names}
    return format_spec(name, {one: value for one, value in given.items() if value is not None})
