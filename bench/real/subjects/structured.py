"""Whole structures cut out: a quarter of the FFN, a tenth of the layers."""

from __future__ import annotations

from bench.real.numbers import QUALITY, excess, quality
from bench.real.steps import Step, Subject, Target, recipe

ORDER = 4
CUT = "a quarter of the FFN, O solved again"


def take(data: dict) -> dict:
    """Of the report."""
    sizes = data["sizes"]
    share = sizes["after"]["parameters"] / sizes["before"]["parameters"]
    return quality(data, "pruned") | {"parameters": share}


PRUNE = recipe("prune_structured", take, decode_contexts=(), without=False)
READ = {"calibration_tokens": 16384, "evaluation_tokens": 4096, "length": 1024}

SUBJECT = Subject(
    "Structured pruning, untrained",
    [
        Step(CUT, PRUNE, READ | {"ffn": 0.25, "criteria": ("obs",)}),
        Step(
            "a quarter of the FFN, only cut",
            PRUNE,
            READ | {"ffn": 0.25, "criteria": ("obs",), "compensate": False},
        ),
        Step(
            "a quarter of the FFN by Taylor, O solved again",
            PRUNE,
            READ | {"ffn": 0.25, "criteria": ("taylor",)},
        ),
        Step(
            "3 of 30 layers by block influence",
            PRUNE,
            READ | {"layers": 27, "criteria": ("block_influence",)},
        ),
    ],
    QUALITY | {"parameters": lambda found: f"{found['parameters']:.0%}"},
    [
        Target(
            "a quarter of the FFN with compensation: excess nats",
            0.25,
            lambda steps: excess(steps[CUT]) if CUT in steps else None,
        )
    ],
)
