"""One model, one text, one budget: what `effattn.fit` and the recipe both go through, step by step.

    session = Session(model, budget, tokens)
    space = session.space(kept)                      # every candidate measured
    found = search(space, session.limits(space), session.measure(kept))

N: tokens of the calibration text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effattn.calibration.tokens import TOKENS_PER_DIMENSION, check_calibration, tokens_needed
from effattn.errors import Unsupported
from effattn.fitting import catalog, speed
from effattn.fitting.accounting import Ledger
from effattn.fitting.budget import Budget
from effattn.fitting.building import Builder
from effattn.fitting.candidates import axes_of, candidates
from effattn.fitting.groups import STEP, Space, Times
from effattn.fitting.harm import Judge, Progress, untold
from effattn.fitting.plan import PROJECTED, SHAPED, SKIP, SPARSE, Plan
from effattn.fitting.search import Measure
from effattn.hf import anatomy
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite, require_here
from effattn.resuming import Parts
from effattn.surgery.swapping import active


@dataclass(frozen=True)
class Asked:
    """How to search. allow, forbid: axes; keep: "weights" or "cache", as they are; length: tokens
    of a window; score_tokens: at the end of the text, which harm is measured on and nothing is
    fitted to; bos: as for `effattn.perplexity`."""

    allow: Collection[str] | None = None
    forbid: Collection[str] = ()
    keep: str | None = None
    length: int = 512
    score_tokens: int = 4096
    bos: bool | None = None


class Session:
    """Everything is checked here, before anything is measured.

    model: a transformers causal LM, in eval mode and unswapped. tokens: int64 (N,). ValueError and
    Unsupported as `effattn.fit`."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        tokens: Tensor,
        asked: Asked,
        progress: Progress = untold,
    ):
        self.budget, self.asked = budget, asked
        self.axes = axes_of(asked.allow, asked.forbid, asked.keep)
        self.parts = check_model(model)
        context = budget.context or self.parts.trained_length or asked.length
        self.length = min(asked.length, context, self.parts.trained_length or asked.length)
        fitted, scored = self._split(tokens)
        self.ledger = Ledger(self.parts, context, budget.batch)
        named = asked.allow is not None
        self.ladders = candidates(self.parts, self.axes, self.length, named)
        self.times: Times | None = None
        self._check_bytes()
        self.builder = Builder(self.parts, fitted, length=self.length, bos=bos_of(model, asked.bos))
        self.judge = Judge(model, scored, self.length, asked.bos, progress)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(what is fitted to, what harm is measured on)."""
        asked = self.asked
        scored = asked.score_tokens + 1
        if scored <= self.length:
            raise ValueError(
                f"score_tokens: got {asked.score_tokens:,}, valid is at least one window of "
                f"{self.length:,}"
            )
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
            check_calibration(tokens, self.parts, self.length)
        fitted = tokens[: max(0, len(tokens) - scored)]
        needed = self._needed()
        if len(fitted) < needed:
            raise ValueError(
                f"calibration: got {len(tokens):,} tokens, at least {needed + scored:,} are needed "
                f"({needed:,} to fit to, {scored:,} to measure harm on)"
            )
        check_calibration(fitted, self.parts, self.length, needed)
        return fitted, tokens[len(tokens) - scored :]

    def _needed(self) -> int:
        """How many tokens are fitted to at least: a window, where nothing is fitted at all."""
        needed = self.length
        if set(SHAPED) & set(self.axes):
            needed = max(needed, tokens_needed(self.parts))
        if {"ffn", SKIP, PROJECTED, SPARSE} & set(self.axes):
            widest = max(layer.feed_forward.size for layer in self.parts)
            needed = max(needed, TOKENS_PER_DIMENSION * widest)
        return needed

    def _check_bytes(self) -> None:
        """ValueError for a budget that no plan meets, as far as that is known before anything is
        measured, and for one that the parent meets."""
        if STEP not in self.budget.given:
            return self._unmeasured.check(self.limits())
        rows = [row for row in self.budget.given if row != STEP]
        if rows:
            bytes_alone = replace(self.budget, **{STEP: None})
            parent = self.ledger.totals(self.ledger.parent)
            self._unmeasured.check(bytes_alone.numbers(parent))

    @property
    def _unmeasured(self) -> Space:
        """All plans, of which no harm is known."""
        return Space(self.ledger, self.ladders, catalog.Catalog([]), self.times)

    def limits(self) -> dict[str, float]:
        """Row -> limit, once what is limited has been timed. ValueError for a budget that the
        parent meets."""
        parent = self.ledger.totals(self.ledger.parent)
        if self.times is not None:
            parent[STEP] = 1000 * self.ledger.batch / self.times.parent
        return self.budget.limits(parent)

    def space(self, kept: Parts, progress: Progress | None = None) -> Space:
        """Every candidate, measured."""
        found = catalog.measure(self.builder, self.judge, self.ladders, kept, progress)
        return Space(self.ledger, self.ladders, found, self.times)

    def time(self, kept: Parts, progress: Progress | None = None) -> None:
        """Times every candidate. ValueError for a speed that no plan reaches."""
        name = f"times/{self.ledger.context}/{self.ledger.batch}"
        found = kept.once(name, lambda: speed.times(self.ledger, self.ladders, progress=progress))
        self.times = speed.times_of(found)
        self._unmeasured.check(self.limits())

    def rounding(self, kept: Parts) -> float:
        """Harm that another order of the same sums does (`Judge.rounding`), nats a token."""
        return kept.once("rounding", lambda: {"kl": self.judge.rounding()})["kl"]

    def lines(self, plan: Plan) -> list[str]:
        """Calls that make the plan of the parent; `tokens`: those that this session was given."""
        how = f"calibration=tokens[:-{self.asked.score_tokens + 1}], length={self.length}"
        how += "" if self.asked.bos is None else f", bos={self.asked.bos}"
        return plan.lines(self.ledger.parent, how)

    def measure(self, kept: Parts) -> Measure:
        """What measures a plan as a whole, once."""

        def measured(plan: Plan) -> dict:
            def make() -> dict:
                return self.judge.of(self.builder.build(plan))

            return dict(kept.once(f"plan/{plan.key()}", make))

        return measured


def check_model(model: nn.Module, what: str = "fit") -> anatomy.Anatomy:
    """Its parts. Unsupported, beginning with `what` is to be done, for a model that is swapped, has
    weights elsewhere, quantized weights or layers without attention or FFN, or predicts no next
    token."""
    require_own_weights(model)
    parts = anatomy.of(model)
    require_here(model, what)
    if active(model) is not None:
        raise Unsupported(
            f"{what}: {type(model).__name__} is swapped; effattn.restore(model) first"
        )
    if getattr(model, "is_quantized", False):
        raise Unsupported(
            f"{what}: {type(model).__name__} has quantized weights; give the model's own"
        )
    if not parts.predicts_next:
        raise Unsupported(f"{what}: {type(model).__name__} predicts no next token")
    for layer in parts:
        if not layer.attends or not layer.feed_forward.size:  # raises for a mixture of experts
            raise Unsupported(
                f"{what}: layer {layer.index} has no attention or no FFN; valid is the model that "
                "it came from"
            )
    check_finite(model)
    return parts
