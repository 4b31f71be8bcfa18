"""The part of `recipes/extend_context.py` that tunes: each rule to each length beyond the trained
one, and bases at the trained length, each of them once, whatever the run was stopped at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from effattn.recipes import flow
from effattn.resuming import Parts, check_settings
from effattn.stages import Quiet

if TYPE_CHECKING:
    from torch import Tensor

    from effattn.extending.tuned import Tuning


def check(settings: Any) -> None:
    """What can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.extending.tuned import NAMES

    for name in settings.tune_rules:
        check_choice("tune_rules", name, NAMES)
    if not settings.tune_tokens:
        return
    if settings.partial is None:
        raise ValueError("tune_tokens: given without output; valid is with --output or --json")
    if (settings.text or settings.dataset) and not settings.tune_text:
        raise ValueError(
            "tune_text: got none beside text of your own, and what is measured on is not tuned on; "
            "give files of other text"
        )


def check_own(settings: Any) -> None:
    """ValueError where a model with attention of its own is to be tuned: the rules that are tuned
    are transformers', and would take it away."""
    if settings.tune_tokens:
        raise ValueError(
            f"tune_tokens: got {settings.tune_tokens:,}, and {settings.model} was trained with "
            "attention of its own, which a tuned rule would take away; valid is 0"
        )


def read(settings: Any, show: Quiet, tokenizer) -> Tuning | None:
    """The text to tune on, and how; None where nothing is tuned."""
    from effattn.extending.tuned import Tuning
    from effattn.textdata import streams

    wanted = settings.tune_tokens
    if not wanted:
        return None
    with show.stage("reading text to tune on"):
        text = streams(tokenizer, train=wanted, evaluation=1, text=settings.tune_text)
        text.check_passes("tune_tokens", wanted, ", or ask for less")
    return Tuning(text.train, wanted, settings.tune_lr, settings.seed)


def tune(
    settings: Any,
    show: Quiet,
    kept: Parts,
    model,
    tuning: Tuning,
    sequences: Tensor,
    lengths: Sequence[int],
    far: Tensor,
) -> dict:
    """The report's "tuned": {"tokens", "rules", "reach"}, rows of `effattn.extending.tuned`.

    sequences: what the rules are measured on, in windows of the trained length and of the target.
    far: what the bases are, read whole."""
    from effattn.extending import planner, tuned

    trained, folder = planner.of_model(model), settings.training
    # the finished parts' file may have been deleted alone: no checkpoint of other settings goes on
    check_settings(folder, kept.head["settings"], write=True)

    def once(make: Callable, said: str, name: str, *given) -> dict:
        checkpoints = folder / name.replace("/", "-")
        found = flow.part(show, kept, f"tuning: {said}", name, make, *given, checkpoints)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return found

    rows = []
    for target in (length for length in lengths if length > trained.length):
        for rule in tuned.to_tune(trained, target):
            if not settings.tune_rules or rule.name in settings.tune_rules:
                given = (rule, model, tuning, sequences, (trained.length, target), target)
                name = f"tuned/{target}/{rule.name}"
                rows.append(once(tuned.tuned, f"{rule.name} to {target:,}", name, *given))
    reached = []
    for base in tuned.bases(trained, settings.reach):
        given = (base, trained, model, tuning, far)
        reached.append(once(tuned.reach, f"base {base:,.0f}", f"reach/{base:.0f}", *given))
    return {"tokens": settings.tune_tokens, "rules": rows, "reach": reached}
