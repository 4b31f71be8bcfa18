"""Half of the weights to zero in one shot, unstructured and 2:4."""

from __future__ import annotations

from bench.real.numbers import QUALITY, quality, ratio
from bench.real.steps import Step, Subject, Target, recipe

ORDER = 3
CALIBRATION = {"0.5": 32768, "2:4": 16384}


def take(data: dict) -> dict:
    """Of the report."""
    return quality(data, "pruned")


PRUNE = recipe("prune_oneshot", take, decode_contexts=(), measure="yes", length=2048)


def step(method: str, sparsity: str) -> Step:
    """A method at a sparsity."""
    read = {"calibration_tokens": CALIBRATION[sparsity], "evaluation_tokens": 4096}
    asked = {"methods": (method,), "sparsities": (sparsity,)}
    return Step(f"{method} {sparsity}", PRUNE, read | asked)


SUBJECT = Subject(
    "One-shot pruning, untrained",
    [
        step(method, share)
        for share in CALIBRATION
        for method in ("sparsegpt", "wanda", "magnitude")
    ],
    QUALITY,
    [
        Target(
            f"SparseGPT over {said}, excess nats at 0.5",
            most,
            lambda steps, other=other: ratio(steps, "sparsegpt 0.5", f"{other} 0.5"),
        )
        for other, said, most in (("wanda", "Wanda", 0.75), ("magnitude", "magnitude", 0.2))
    ],
    note="Zeros are stored like other weights: no bytes are saved by themselves.",
)
