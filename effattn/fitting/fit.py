"""`effattn.fit`: a model made to fit a budget, in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.fitting.budget import Budget
from effattn.fitting.building import apply
from effattn.fitting.frontier import points
from effattn.fitting.groups import STEP
from effattn.fitting.search import Found, search
from effattn.fitting.session import Asked, Session
from effattn.hf.weights import weight_bytes
from effattn.resuming import Parts

KIND = "fit"


@dataclass(frozen=True)
class Result:
    """What `fit` did. plan: for each layer what it became, in words; lines: the same as calls;
    bytes: of weights, cache and a step's activations together, those of the weights counted on the
    model; kl: of the whole, nats a token in fp32 arithmetic, on the text that plans were chosen on;
    frontier: rows of {limit, taken, kl, perplexity, plan, uniform, best_uniform}."""

    plan: list[str]
    lines: list[str]
    bytes: int
    kl: float
    frontier: list[dict] = field(repr=False)
    found: Found = field(repr=False)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, of their names and dtypes, in hexadecimal."""
    found = hashlib.sha256()
    for name, one in model.named_parameters():
        found.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        found.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def fit(
    model: nn.Module,
    budget: Budget,
    calibration: Tensor,
    *,
    allow: Collection[str] | None = None,
    forbid: Collection[str] = (),
    keep: str | None = None,
    length: int = 512,
    score_tokens: int = 4096,
    bos: bool | None = None,
    frontier: int = 0,
    resume: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Makes `model`, in place, what harms it least within `budget`: in each layer fewer K/V heads
    or latents, another cache, a window, a narrower FFN, no attention or FFN at all, packed, low
    rank or sparse weights, or nothing of these.

    model: a transformers causal LM, unswapped. calibration: int64 (N,); its last `score_tokens` are
    measured on, the others fitted to. allow, forbid: axes ("heads", "latent", "skip", "cache",
    "window", "ffn", "weights", "projections", "sparsity"); keep: "weights" or "cache" as they are.
    length: tokens of a window. frontier: so many budgets from the smallest plan to the parent are
    searched, too. resume: a file for what is measured, which the same call goes on from. progress:
    called with (candidates done, all).

    Every candidate is measured in its layer alone (KL of the whole model), the plan is solved for
    exactly (HiGHS), measured as a whole, and solved for again. Sources of the parts: those of
    `effattn.convert_gqa`, `effattn.prune.structured`, `effattn.quant`.

    ValueError for a budget that no plan meets, with the nearest that one does, for one that the
    parent meets, for unknown units and axes and for too little text; Unsupported for what the class
    cannot have. Nothing is changed then."""
    asked = Asked(allow, tuple(forbid), keep, length, score_tokens, bos)
    training = model.training
    model.eval()
    try:
        session = Session(model, budget, calibration, asked)
        # what was measured serves other budgets of the same model, text and windows
        digest = hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest()
        settings = {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "weights": None if resume is None else weights_digest(model),
            "asked": str(asked),
            "length": session.length,
            "tokens": digest,
        }
        kept = Parts(None if resume is None else Path(resume), settings, {}, KIND)
        if STEP in budget.given:
            session.time(kept)
        space = session.space(kept, progress)
        measure = session.measure(kept)
        found = search(space, session.limits(), measure)
        curve = points(space, measure, frontier) if frontier else []
        plan = found.best.plan
        totals = space.ledger.totals(plan)  # of the parent's modules, which are changed below
        apply(model, session.builder.shaped(plan), plan, space.parent)
    finally:
        model.train(training)
    kept.discard()
    taken = int(totals["bytes"] - totals["weight_bytes"]) + weight_bytes(model)
    words = [one.words(own) for one, own in zip(plan.layers, space.parent.layers, strict=True)]
    return Result(words, session.lines(plan), taken, found.best.kl, curve, found)
