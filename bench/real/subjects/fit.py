"""A budget of weights and cache together, searched for layer by layer. Nothing is trained."""

from __future__ import annotations

from bench.real.numbers import QUALITY
from bench.real.steps import Step, Subject, Target, recipe

ORDER = 10
PARENT, PLAN = "parent", "the plan"
BEST = 0.7  # of the KL of the best uniform plan


def take(data: dict) -> dict:
    """Of the parent's row, the plan's, and the least harmful uniform one's."""
    rows = {row["name"]: row for row in data["plans"]}
    uniform = [row["kl"] for name, row in rows.items() if name not in (PARENT, PLAN)]
    parent, predicted = data["parent"]["bytes"], data["plan"]["predicted"]["bytes"]
    return {
        "tokens": data["settings"]["evaluation_tokens"],
        "window": data["settings"]["length"],
        "bos": data["settings"]["bos"],
        "before": rows[PARENT]["cross_entropy"],
        "after": rows[PLAN]["cross_entropy"],
        "kl": rows[PLAN]["kl"],
        "best_uniform": min(uniform, default=None),
        "bytes": predicted / parent,
        "candidates": len(data["candidates"]),
    }


def uniform(found: dict) -> str:
    """The KL of the best uniform plan."""
    return "none fits" if found["best_uniform"] is None else f"{found['best_uniform']:.1e}"


def share(steps, name: str) -> float | None:
    """The plan's KL as a share of the best uniform plan's; None where there is none."""
    found = steps.get(name)
    return found["kl"] / found["best_uniform"] if found and found["best_uniform"] else None


# few windows: each candidate runs the whole model, and there are 17 a layer
READ = {
    "calibration_tokens": 1024,
    "score_tokens": 512,
    "evaluation_tokens": 2048,
    "length": 512,
    "context": 32_768,  # four times the trained length
    "batch": 4,
    "rounds": 4,
    "allow": ("cache", "weights"),
}
FIT = recipe("fit", take, retrieval_trials=0, decode_steps=0)
BUDGETS = ("75%", "50%", "35%")

SUBJECT = Subject(
    "A budget, of cache formats and packed weights by layer",
    [Step(f"{one} of weights and cache", FIT, READ | {"bytes": one}) for one in BUDGETS],
    QUALITY
    | {
        "KL": lambda found: f"{found['kl']:.1e}",
        "bytes": lambda found: f"{found['bytes']:.0%}",
        "KL of the best uniform": uniform,
    },
    [
        Target(
            f"{one} of weights and cache: KL as a share of the best uniform plan's",
            BEST,
            lambda steps, one=one: share(steps, f"{one} of weights and cache"),
        )
        for one in BUDGETS
    ],
    "Cache of four sequences of 32,768 tokens, four times the trained length. What candidates "
    "take, which are measured once for all budgets, is in the time of the step that came first; "
    "here they were there.",
)
