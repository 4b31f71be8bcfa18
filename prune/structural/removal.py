"""Structured pruning: whole heads, FFN dimensions and layers go, and what comes out is a smaller
plain model.

    # keep 4 heads, remove a quarter of the FFN
    small, report = effattn.prune.structured(model, tokens, heads=4, ffn=0.25)
    # plain transformers loads it; the file is smaller
    small.save_pretrained("out")

Every structure is scored on the whole model by a criterion (`effattn.prune.structural.criteria`),
the lowest ones are cut out of the weights (`effattn.prune.structural.slicing`), and the output
modules are solved again for what is left (`effattn.prune.structural.compensation`). Each layer
keeps as many, which every config can say, or (`uniform=False`) as many as its structures are worth:
`effattn.hf.uneven`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import tokens_at_once
from effattn.hf import anatomy as hf
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite
from effattn.profiling.environment import environment
from effattn.prune.structural import criteria
from effattn.prune.structural.choosing import choose
from effattn.prune.structural.compensation import check_biases, with_biases
from effattn.prune.structural.compensation import compensate as fit_outputs
from effattn.prune.structural.criteria.base import TARGETS, Importance
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.plan import Amount, Plan, check_enough, plan_of
from effattn.prune.structural.report import KIND, StructuredReport, sizes_of
from effattn.prune.structural.slicing import check_plain, slice_model
from effattn.prune.unstructured import calibration


def structured(
    model: nn.Module,
    tokens: Tensor,
    *,
    heads: Amount = None,
    ffn: Amount = None,
    layers: Amount = None,
    criterion: str | Mapping[str, str] = "taylor",
    compensate: bool = True,
    bias: bool = False,
    uniform: bool = True,
    length: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, StructuredReport]:
    """A new, smaller model of the same class, in eval mode, and a report; `model` is not changed.

    heads, ffn, layers: an int is how many STAY (heads and FFN dimensions: in every layer), a float
    in (0, 1) the share that is REMOVED, None removes nothing. heads counts key/value heads, which
    go with their query heads (in multi-head attention these are heads). tokens: int64 (N,)
    calibration text, cut into windows of `length` (default: as the model was trained, at most
    2048); with `compensate` at least ten tokens for each input of an output module. criterion: one
    of `effattn.prune.structural.criteria.CRITERIA`, or a dict of them by target. compensate: least
    squares for o_proj and the FFN's output module (and their biases, if the model has any). bias:
    gives these modules biases where the class's config can say so (Llama's attention_bias and
    mlp_bias); with compensate=False they alone are solved for, which is FLAP's correction.
    uniform=False: how many stay is meant on average: each layer keeps as many heads and FFN
    dimensions (in steps of 32) as are among the best of all layers, or none at all. What comes out
    is saved and loaded by effattn, and by transformers after `import effattn`. seed: of
    the random criterion. bos: whether BOS takes the place of each window's first token (None: as
    the model's tokenizer does it). progress: called with (steps done, steps).

    Sources of the criteria: Taylor (LLM-Pruner, arXiv:2305.11627), obs (ZipLM, arXiv:2302.04089),
    michel (arXiv:1905.10650), activation (Minitron, arXiv:2407.14679), flap (arXiv:2312.11983),
    wanda_sum (arXiv:2306.11695), block_influence (ShortGPT, arXiv:2403.03853).

    Raises ValueError for bad arguments and Unsupported for what the class cannot hold, naming what
    it can; and FloatingPointError, naming the layer, for activations that are not finite."""
    check_plain(model)
    parts = hf.of(model)
    plan = plan_of(parts, {"heads": heads, "ffn": ffn, "layers": layers}, criterion, uniform)
    batches, asked = prepared(
        parts,
        plan,
        tokens,
        bos_of(model, bos),
        compensate=compensate,
        bias=bias,
        length=length,
        seed=seed,
    )
    biased = plan.inside if bias else []
    check_finite(model)
    solve = (compensate or bias) and bool(plan.inside)
    solved = plan.keep.get("layers", len(parts.layers)) if solve else 0
    tell = steps_of(progress, len(batches) * len(set(plan.criteria.values())), 1, solved)

    # scored and solved in eval mode on the whole model, which is only read
    training = model.training
    model.eval()
    try:
        importance = score(parts, batches, plan, seed, tell[0])
        keep = choose(len(parts.layers), importance, plan.keep, uniform)
        small = slice_model(model, keep, uniform=uniform)
        if biased:
            small = with_biases(small, biased)
        tell[1](1, 1)
        rows = []
        if solve:
            rows = fit_outputs(
                parts,
                hf.of(small),
                keep,
                batches,
                weights=compensate,
                progress=tell[2],
            )
    finally:
        model.train(training)
    asked |= {} if uniform else {"uniform": False}
    return small, report_of(model, small, plan, asked, keep, importance, rows)


def prepared(
    parts: hf.Anatomy,
    plan: Plan,
    tokens: Tensor,
    beginning: int | None,
    *,
    compensate: bool,
    bias: bool,
    length: int | None,
    seed: int,
) -> tuple[list[Tensor], dict]:
    """The calibration windows, and the settings that are not in the plan, as a report has them.
    beginning: the BOS that takes the place of each window's first token. ValueError and
    Unsupported, as `structured`."""
    length = calibration.window_length(parts.config, length)
    calibration.check_tokens(tokens, parts.embeddings.weight.shape[0], length)
    if compensate:
        check_enough(parts, plan, tokens)
    check_biases(parts, plan.inside if bias else [])
    asked = {
        "compensate": compensate,
        "bias": bias,
        "calibration_tokens": len(tokens),
        "length": length,
        "seed": seed,
        "bos": beginning is not None,
    }
    most = tokens_at_once(parts, calibration.BATCH_TOKENS)
    return calibration.batches_of(tokens, length, beginning, most), asked


def report_of(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    asked: dict,
    keep: Keep,
    importance: Importance,
    rows: list[dict],
) -> StructuredReport:
    """What was done; quality and speed are for others to measure. asked: settings that are not in
    the plan. rows: what solving again says of each layer."""
    settings = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        **plan.keep,
        "criterion": plan.criteria,
        **asked,
    }
    dtype = str(model.dtype).removeprefix("torch.")
    return StructuredReport(
        {
            "kind": KIND,
            "settings": settings,
            "model": {"class": type(model).__name__, "dtype": dtype},
            "kept": _lists(keep),
            "importance": _scores(importance),
            "layers": rows,
            "sizes": {"before": sizes_of(model), "after": sizes_of(small)},
            "quality": None,
            "decode": [],
            "verification": None,
            "environment": environment(),
        }
    )


def steps_of(
    progress: Callable[[int, int], None] | None, *parts: int
) -> list[Callable[[int, int], None]]:
    """A progress for each part of a work that come one after the other, in so many steps each."""

    def from_start(start: int, done: int, _: int) -> None:
        if progress is not None:
            progress(start + done, sum(parts))

    return [partial(from_start, sum(parts[:number])) for number in range(len(parts))]


def score(
    parts: hf.Anatomy,
    batches: list[Tensor],
    plan: Plan,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """The importance of every target of the plan, each by its criterion; one pass over the data a
    criterion.
    """
    found, ranked = Importance(), plan.ranked
    tells = steps_of(progress, *[len(batches)] * len(ranked))
    for (name, targets), tell in zip(ranked.items(), tells, strict=True):
        scores = criteria.measure(name, parts, batches, targets, seed, plan.removed, tell)
        tell(len(batches), len(batches))  # also where a criterion reads no text
        for target in targets:
            setattr(found, target, getattr(scores, target))
    return found


def _lists(keep: Keep) -> dict:
    """Target -> indices, for JSON."""
    rows = {
        target: [row.tolist() for row in getattr(keep, target) or ()] for target in ("heads", "ffn")
    }
    found = rows | {"layers": [] if keep.layers is None else keep.layers.tolist()}
    return {target: kept for target, kept in found.items() if kept}


def _scores(importance: Importance) -> dict:
    """Target -> scores, for JSON; of FFN dimensions, of which there are many, their percentiles."""
    found = {
        target: value for target in TARGETS if (value := getattr(importance, target)) is not None
    }
    # thousands a layer: their distribution is what a report can show
    if "ffn" in found:
        found["ffn"] = torch.quantile(
            found["ffn"], torch.linspace(0, 1, 101, dtype=torch.float64), dim=1
        ).T
    return {target: value.tolist() for target, value in found.items()}
