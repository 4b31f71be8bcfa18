"""The part of `recipes/extend.py` that tunes: what it takes, by which pattern, in which windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.extending.planner import Plan
    from effattn.textdata import Streams

WHOLE = "none"  # as a sampling: windows as long as the target


def check(settings: Any) -> None:
    """What can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.position_sampling import METHODS
    from effattn.training.lora import check_peft

    check_choice("sampling", settings.sampling, (*METHODS, WHOLE))
    if settings.lora and not settings.tune_tokens:
        raise ValueError(
            f"lora: got {settings.lora} without tune_tokens; valid is 0, or a budget to train on"
        )
    if settings.lora_plus and not settings.lora:
        raise ValueError("lora_plus: given without lora; valid is beside a rank, such as lora=8")
    if settings.train_pattern is not None:
        check_train_pattern(settings)
    if settings.memory is not None:
        check_memory(settings)
    if settings.tune_tokens and settings.output is None:
        raise ValueError(
            "tune_tokens: given without output; name the folder for the tuned checkpoint"
        )
    if settings.lora:
        check_peft()


def check_train_pattern(settings: Any) -> None:
    """ValueError for a pattern that cannot be trained with here."""
    from effattn.extending.tuning import check_pattern

    given = settings.train_pattern
    check_pattern("train_pattern", given)
    if not settings.tune_tokens:
        raise ValueError(f"train_pattern: got {given!r} without tune_tokens, a budget to train on")
    if settings.sampling != WHOLE:
        raise ValueError(
            f"sampling: got {settings.sampling!r} with train_pattern, whose attention counts "
            f"positions by itself; valid is {WHOLE!r} (windows of the target length)"
        )


def check_memory(settings: Any) -> None:
    """ValueError for a memory that cannot be trained with here."""
    from effattn.extending import tuning

    tuning.check_memory(settings.memory, sampling_of(settings))
    if not settings.tune_tokens:
        raise ValueError(
            f"memory: got {settings.memory!r} without tune_tokens; valid is a budget to tune on"
        )
    if settings.train_pattern is not None:
        raise ValueError(
            f"memory: got {settings.memory!r} with train_pattern={settings.train_pattern!r}; valid "
            "is one of them, since both are patterns to train with"
        )


def sampling_of(settings: Any) -> str | None:
    """As `tune` takes it."""
    return None if settings.sampling == WHOLE else settings.sampling


def training_pattern(settings: Any, plan: Plan) -> dict[str, str] | None:
    """What `swap` takes: the pattern in the layers that a rule goes to, since others have a window
    of their own, which is short already."""
    if settings.train_pattern is None:
        return None
    return {",".join(map(str, plan.layers)): settings.train_pattern}


def training_window(settings: Any, plan: Plan, spec: str, plain: bool) -> int:
    """Tokens of a training window. ValueError for what cannot be trained so."""
    if settings.memory is not None and not plain:
        raise ValueError(
            f"memory: got {settings.memory!r} with {spec!r}, which counts positions by itself; "
            "valid is a rule that transformers has, such as yarn"
        )
    full = settings.sampling == WHOLE and settings.memory is None
    window = settings.window or (settings.to if full else plan.trained)
    if window > settings.to:
        raise ValueError(f"window: got {window}, valid is at most the target ({settings.to})")
    if settings.tune_tokens and not (plain or full):
        # None where the config has one set of parameters for layers with and without a window
        held = any(one.plain for one in plan.candidates if one.name != "rope")
        other = ", or a rule that transformers has, such as yarn" if held else ""
        raise ValueError(
            f"sampling: got {settings.sampling!r}, and {spec!r} counts positions by itself; valid "
            f"is 'none' (windows of the target length){other}"
        )
    return window


def fine_tune(
    settings: Any, show: Quiet, model, text: Streams, window: int, plan: Plan, rule: dict
) -> dict:
    """Trains the model with its rule, from the last checkpoint of an unfinished run if there is
    one."""
    from effattn.extending.tuning import tune
    from effattn.surgery.swapping import restore, swap

    pattern = training_pattern(settings, plan)
    if pattern is not None:
        swap(model, pattern)
    with show.stage(f"tuning on {settings.tune_tokens:,} tokens") as progress:
        found = tune(
            model,
            text.train,
            target=settings.to,
            window=window,
            train_tokens=settings.tune_tokens,
            folder=settings.partial / "tuning",
            sampling=sampling_of(settings),
            memory=settings.memory,
            batch=settings.batch,
            lr=settings.lr,
            lora=settings.lora,
            lora_plus=settings.lora_plus,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": model.device.type == "cpu"} | settings.overrides,
        )
    if pattern is not None:  # what was learned so is used by the model's own attention
        swap(restore(model), positions=rule["spec"])
    return found | {"lora_plus": settings.lora_plus, "train_pattern": settings.train_pattern}
