"""Linear attention in three quarters of the layers, with very little training."""

from __future__ import annotations

from bench.real.numbers import shown
from bench.real.steps import Step, Subject, recipe

ORDER = 8


def take(data: dict) -> dict:
    """Cross-entropy before, and after each stage."""
    stages = {name: found["cross_entropy"] for name, found in data["stages"].items()}
    told = {key: data["quality"][key] for key in ("tokens", "context", "bos")}
    return told | {"before": data["quality"]["before"]["cross_entropy"], "stages": stages}


LINEARIZE = recipe("linearize", take, length=512)
READ = {"transfer_tokens": 8192, "distil_tokens": 8192, "evaluation_tokens": 4096}


def stage(name: str):
    """A cell."""
    return lambda found: shown(found["stages"].get(name))


SUBJECT = Subject(
    "Linear attention, hardly trained",
    [
        Step(
            "hedgehog, every fourth layer a window",
            LINEARIZE,
            READ | {"pattern": "linear(feature_map='hedgehog')", "keep_every": 4},
        )
    ],
    {
        "before": lambda found: shown(found["before"]),
        "swapped": stage("swap"),
        "after transfer": stage("transfer"),
        "after distillation": stage("distillation"),
    },
    note="8,192 tokens a stage show that it runs; a recovered model takes tens of millions.",
)
