"""What a report of a fit says, as it is put together: plain numbers, strings, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from effattn.fitting import speed
from effattn.fitting.accounting import Ledger, counted
from effattn.fitting.groups import Space
from effattn.fitting.harm import Progress, untold
from effattn.fitting.plan import Plan
from effattn.fitting.report import PARENT, PLAN, FitReport
from effattn.fitting.search import Found, Tried
from effattn.fitting.session import Session
from effattn.hf.beginning import bos_of
from effattn.profiling.environment import environment
from effattn.textdata import Streams

__all__ = ["PARENT", "PLAN", "add_speed", "begin", "count", "lanes", "plan_of"]

TIMED = 4096  # tokens of a prompt, at most, for the table's times
Lanes = dict[str, tuple[Callable[[], nn.Module], dict]]


def begin(settings: dict, session: Session, space: Space, text: Streams) -> dict:
    """The report before there is a plan."""
    budget = session.budget
    return {
        "kind": "fit",
        "settings": {
            **settings,
            "axes": session.axes,
            "length": session.length,
            "source": text.source,
            "evaluation_source": text.evaluation_source,
            "bos": bos_of(session.parts.model, session.asked.bos) is not None,
        },
        "budget": {
            "given": dict(budget.given),
            "limits": session.limits(),
            "context": session.ledger.context,
            "batch": session.ledger.batch,
        },
        "parent": session.ledger.totals(space.parent),
        "own": space.parent.to_dicts(),
        "candidates": space.catalog.rows,
        "plan": None,
        "tried": [],
        "plans": [],
        "frontier": [],
        "recovery": None,
        "verification": None,
        "environment": environment(),
    }


def plan_of(session: Session, space: Space, found: Found, rounding: float) -> dict:
    """What the search found: the report's plan, and all that was measured on the way. rounding:
    harm that is none, nats a token."""
    best, harm = found.best, space.catalog.harm
    alone = [0.0] * len(best.plan.layers)
    for change in best.plan.changes(space.parent):
        alone[change[0]] += harm[change]
    pairs = zip(best.plan.layers, space.parent.layers, strict=True)
    plan = {
        "layers": [one.words(own) for one, own in pairs],
        "harm": alone,
        "lines": session.lines(best.plan),
        "choices": best.plan.to_dicts(),
        "predicted": session.ledger.totals(best.plan),
        "counted": None,
        "kl": best.kl,
        "additive": best.additive,
        "expected": best.expected,
        "rounding": rounding,
        "gap": found.gap,
        "factors": found.factors,
    }
    if space.times is not None:
        plan["step_ms"] = space.step_ms(best.plan)
    rounds = [one for one in found.tried if not one.name]
    tried = [
        {
            "name": one.name,
            "round": None if one.name else rounds.index(one),
            "bytes": session.ledger.totals(one.plan)["bytes"],
            "additive": one.additive,
            "expected": one.expected,
            "kl": one.kl,
        }
        for one in found.tried
    ]
    return {"plan": plan, "tried": tried}


def lanes(session: Session, found: Found, built: nn.Module) -> Lanes:
    """Name -> (what makes the model, its totals with the plan's key): the parent, what is uniform
    and within the budget, and the plan."""
    builder, ledger = session.builder, session.ledger
    parent = {**ledger.totals(builder.parent), "key": PARENT}
    made: Lanes = {PARENT: (lambda: session.parts.model, parent)}
    for one in found.baselines:
        made[one.name] = (partial(builder.build, one.plan), _totals(ledger, one))
    made[PLAN] = (lambda: built, _totals(ledger, found.best))
    return made


def _totals(ledger: Ledger, tried: Tried) -> dict:
    return {**ledger.totals(tried.plan), "key": tried.plan.key()}


def add_speed(
    rows: list[dict],
    session: Session,
    models: dict[str, nn.Module],
    steps: int,
    progress: Progress = untold,
) -> None:
    """Adds to the plans' rows ms (of a step, the models taking turns), tokens_per_s (of the batch)
    and timed_at, the tokens in the cache: the budget's, but no more than `TIMED`."""
    batch, context = session.ledger.batch, min(session.ledger.context, TIMED)
    found = speed.timed(models, context, batch, steps, progress)
    for row in rows:
        row["ms"] = found[row["name"]]
        row["timed_at"] = context
        row["tokens_per_s"] = 1000 * batch / row["ms"]


def count(report: FitReport, session: Session, model: nn.Module, most: int) -> None:
    """Counts what the saved checkpoint takes, loaded again: its weights, and its cache at the
    budget's context, or where that is more than `most` tokens in all at fewer."""
    budget = report.data["budget"]
    tokens = min(budget["context"], max(1, most // budget["batch"]))
    told = counted(model, tokens, budget["batch"])
    ledger = Ledger(session.parts, tokens, budget["batch"])
    plan = report.data["plan"]
    predicted = ledger.totals(Plan.from_dicts(plan["choices"]))
    plan["counted"] = {"weight_bytes": told["weight_bytes"]}
    if tokens == budget["context"]:
        plan["counted"]["cache_bytes"] = told["cache_bytes"]
    plan["counted"] |= {
        "tokens": tokens,
        "cache_at": told["cache_bytes"],
        "predicted_at": predicted["cache_bytes"],
    }
    wrong = told["weight_bytes"] != predicted["weight_bytes"]
    if wrong or told["cache_bytes"] != predicted["cache_bytes"]:
        raise RuntimeError(
            f"the checkpoint takes {told['weight_bytes']:,} bytes of weights and "
            f"{told['cache_bytes']:,} of cache at {tokens:,} tokens; predicted were "
            f"{predicted['weight_bytes']:,} and {predicted['cache_bytes']:,}"
        )
