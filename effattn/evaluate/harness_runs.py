"""Models in lm-evaluation-harness (`pip install 'effattn[eval]'`), through its Python API.

    found = effattn.evaluate.harness_scores(model, tokenizer, ["effattn_passkey", "arc_easy"])
    found["arc_easy"]["metrics"]["acc"]

A task is a name of the harness's own (a group or a tag stands for all of its tasks), one of ours
("effattn_" and a name of `effattn.evaluate.harness.TASKS`), or a YAML file. The harness's data sets
are fetched by `datasets`; a YAML file may name Python functions beside it, which it runs."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from effattn.errors import Unsupported, check_choice
from effattn.evaluate.harness import OURS, TASKS, harness_tasks
from effattn.evaluate.loss import Progress

MOST = 4096  # tokens of a prompt of our tasks, where the model has the context for it
ROOM = 16  # tokens of it that are left for BOS
BOOTSTRAPPED = 200  # samples behind the errors of metrics that are no means


def check_harness(tasks: Sequence[str]) -> None:
    """What can be known to be wrong before a model is there: Unsupported without lm_eval;
    ValueError for unknown names, and for tasks whose data cannot be fetched."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise Unsupported(
            "lm_eval: lm-evaluation-harness is not installed; pip install 'effattn[eval]'"
        ) from None
    for name in tasks:
        if name.startswith(OURS):
            check_choice("lm_eval", name, [OURS + task for task in TASKS])
    theirs = [name for name in tasks if not name.startswith(OURS)]
    with _quiet(), _same_chance():
        if theirs:
            manager = _manager(theirs)
            for name in theirs:
                _load(manager, name)


def harness_scores(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    length: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, dict]:
    """What a model reaches in each of `tasks`, and in the tasks of a group: name -> {"metrics":
    metric -> value, "errors": metric -> standard error, "higher": metric -> whether more is better,
    "samples": examples}. A metric after a filter other than "none" is "metric (filter)".

    limit: the first examples of each task. length: tokens of our own prompts (None: as much as the
    model was trained for, at most 4096). batch: sequences at a time. Raises what `check_harness`
    does."""
    if not tasks:
        raise ValueError("tasks: got none, valid is at least one name")
    check_harness(tasks)
    import lm_eval

    training = model.training
    ours = [name.removeprefix(OURS) for name in tasks if name.startswith(OURS)]
    theirs = [name for name in tasks if not name.startswith(OURS)]
    with _quiet(), _same_chance():
        made: list[Any] = [*theirs]
        if ours:
            length = length or prompt_length(model)
            made += harness_tasks(tokenizer, ours, length=length).values()
        try:
            found = lm_eval.simple_evaluate(
                # it gives the tokenizer a token for padding
                model=_told(model, copy.deepcopy(tokenizer), batch, progress),
                tasks=made,
                limit=limit,
                bootstrap_iters=BOOTSTRAPPED,
                log_samples=False,
                task_manager=_manager(theirs),
            )
        finally:
            model.train(training)
    return {name: _scores(name, found) for name in found["results"]}


def prompt_length(model) -> int:
    """Tokens of our own prompts for this model."""
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(MOST, trained or MOST) - ROOM


def _manager(names: Sequence[str]):
    """What finds tasks by name. Reading the harness's 14,000 takes seconds, which files need
    not."""
    return _index(not all(map(_is_file, names)))


@functools.lru_cache(maxsize=2)
def _index(theirs: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=theirs)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager, name: str) -> None:
    """Builds the tasks of a name, which fetches their data. ValueError in a line."""
    if _is_file(name) and not Path(name).is_file():
        raise ValueError(f"lm_eval: got {name!r}, there is no such file")
    if not _is_file(name) and name not in manager.task_index:
        known = [*manager.task_index, *(OURS + task for task in TASKS)]
        near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"lm_eval: got {name!r}{hint}; valid are the harness's names (`lm-eval ls tasks`), "
            f"YAML files, and {', '.join(OURS + task for task in TASKS)}"
        )
    try:
        manager.load([name])
    except Exception as error:  # of the harness, of `datasets`, and of a task's own code
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"lm_eval: {name!r} cannot be prepared: {reason[:300]}") from error


def _told(model, tokenizer, batch: int, progress: Progress | None):
    """The harness's model around a live one, which tells its progress to us instead of to a bar."""
    from lm_eval.models.huggingface import HFLM

    class Told(HFLM):
        done, total = 0, 0

        def _begin(self, requests) -> None:
            self.done, self.total = 0, len(requests)

        def _step(self, rows: int) -> None:
            self.done = min(self.done + rows, self.total)
            if progress is not None and self.total:
                progress(self.done, self.total)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            self._begin(requests)
            found = super()._loglikelihood_tokens(requests, True, override_bs)
            self._step(len(requests))  # answers of one token take one call for a prompt
            return found

        def generate_until(self, requests, disable_tqdm=False):
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps, *given, **how):
            self._step(len(inps))
            return super()._model_call(inps, *given, **how)

        def _model_generate(self, context, *given, **how):
            self._step(len(context))
            return super()._model_generate(context, *given, **how)

    return Told(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)


def _scores(name: str, found: dict) -> dict:
    """Of one task, without what is no number."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, _, kept = key.partition(",")
        if not kept or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = errors if metric.endswith("_stderr") else metrics
        metric = metric.removesuffix("_stderr")
        group[metric if kept == "none" else f"{metric} ({kept})"] = float(value)
    higher = found.get("higher_is_better", {}).get(name) or {}
    samples = (found.get("n-samples", {}).get(name) or {}).get("effective")
    return {
        "metrics": metrics,
        "errors": errors,
        "higher": {metric: higher.get(metric.partition(" (")[0]) for metric in metrics},
        "samples": samples,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own words and bars."""
    import tqdm

    logger, begin = logging.getLogger("lm_eval"), tqdm.std.tqdm.__init__
    before = logger.level

    def without_bar(self, *given, **how) -> None:
        begin(self, *given, **how | {"disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.std.tqdm.__init__ = without_bar
    try:
        yield
    finally:
        logger.setLevel(before)
        tqdm.std.tqdm.__init__ = begin


@contextlib.contextmanager
def _same_chance() -> Iterator[None]:
    """The harness seeds everything; afterwards chance goes on from where it was."""
    import numpy

    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
