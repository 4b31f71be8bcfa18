"""Three K/V heads become one: by every method without any training, and by one with some."""

from __future__ import annotations

from bench.real.numbers import QUALITY, excess, quality, ratio
from bench.real.steps import Step, Subject, Target, recipe

ORDER = 1
READ = {"calibration_tokens": 32768, "evaluation_tokens": 4096}
BY_WEIGHTS = ("mean", "first", "random")  # they look at no text
UPTRAINED = "optimal, O and FFN re-fit, 300k tokens of uptraining"


def take(data: dict) -> dict:
    """Of the report."""
    shape = {key: data["model"][key] for key in ("kv_heads_before", "kv_heads_after")}
    stage = "uptrained" if data["quality"].get("uptrained") else "converted"
    return quality(data, stage) | shape


CONVERT = recipe("convert_gqa", take, kv_heads=1, decode_contexts=())


def method(name: str, refit: bool, ffn: bool = False) -> Step:
    """One of the methods, with or without solving O, and the FFN's output, again."""
    said = f"{name}, O re-fit" if refit else name
    how = {"method": name, "refit": refit}
    if ffn:
        said, how["refit_ffn"] = f"{name}, O and FFN re-fit", True
    if name in BY_WEIGHTS and not refit:
        how["calibration_tokens"] = 8192  # which only the report's errors by layer are of
    return Step(said, CONVERT, READ | how)


def uptrained(steps) -> float | None:
    """Excess nats after uptraining; None where it was not measured."""
    return excess(steps[UPTRAINED]) if UPTRAINED in steps else None


SUBJECT = Subject(
    "Three K/V heads to one",
    [
        method("optimal", refit=True, ffn=True),
        method("optimal", refit=True),
        method("mean", refit=False),
        method("optimal", refit=False),
        method("mean", refit=True),
        method("aligned", refit=True),
        method("first", refit=False),
        method("random", refit=False),
        Step(
            UPTRAINED,
            CONVERT,
            READ | {"method": "optimal", "refit_ffn": True, "uptrain_tokens": 300_000},
        ),
    ],
    QUALITY,
    [
        Target(
            "`optimal` with re-fit over `mean`, excess nats",
            0.12,
            lambda steps: ratio(steps, "optimal, O and FFN re-fit", "mean"),
        ),
        Target("300k tokens of uptraining, excess nats", 0.35, uptrained),
    ],
    note="These heads are grouped already (9 query heads share 3), and share little more.",
)
