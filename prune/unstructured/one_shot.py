"""One-shot pruning of a model's linear layers, decoder layer by decoder layer.

    report = effattn.prune.oneshot(model, tokens, method="sparsegpt", sparsity="2:4")

Zeros stay where they are: the weights are as large as before, in memory and on disk, and dense
products take as long. `effattn.prune.pack` turns 2:4 zeros into memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effattn.calibration.hessian import DAMPING, Hessian, InverseHessian
from effattn.errors import check_choice
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.prune.unstructured import calibration, layers
from effattn.prune.unstructured.methods.magnitude import magnitude_mask
from effattn.prune.unstructured.methods.sparsegpt import BLOCK, sparsegpt
from effattn.prune.unstructured.methods.wanda import wanda_mask
from effattn.prune.unstructured.nm import Sparsity
from effattn.surgery.checkpoint import check_finite

if TYPE_CHECKING:
    from effattn.prune.unstructured.report import OneShotReport

METHODS = ("sparsegpt", "wanda", "magnitude")
ALLOCATIONS = ("uniform", "sensitivity")
# how far a layer's share may be from the mean when shares follow sensitivity (lambda in OWL)
SPREAD = 0.08
OUTLIER = 5.0  # times the mean score that makes a weight an outlier (M in OWL)


@dataclass(frozen=True)
class Plan:
    """What is done to every layer: `sparsities` has an entry a layer."""

    method: str
    sparsities: tuple[Sparsity, ...]
    modules: str = "all"
    damping: float = DAMPING
    raise_damping: bool = False
    block: int = BLOCK


def oneshot(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    method: str = "sparsegpt",
    sparsity: float | str | Sequence[float | str] = 0.5,
    modules: str = "all",
    allocation: str = "uniform",
    length: int | None = None,
    damping: float = DAMPING,
    raise_damping: bool = False,
    block: int = BLOCK,
    spill: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OneShotReport:
    """Prunes the linear layers of `model` in place; embeddings, norms, biases and the output head
    are untouched.

    tokens (N,) int64: calibration text, cut into windows of `length` (default: the model's trained
    length, at most 2,048). None is for "magnitude", which needs none. method: "sparsegpt"
    (arXiv:2301.00774), "wanda" (arXiv:2306.11695) or "magnitude". sparsity: a share from 0 to 1,
    exact in every weight matrix; "N:M", N zeros in every M inputs of an output; or a list of these,
    one for each decoder layer. modules: "all", "attention" or "ffn". allocation: "uniform", or
    "sensitivity": layers with more outlying weights keep more of them, up to 0.08 from the mean
    (OWL, arXiv:2310.05175). damping, raise_damping, block: of SparseGPT; see `InverseHessian` and
    `sparsegpt`. spill: a folder for the hidden states of the calibration text, which otherwise stay
    in memory.

    One layer's Hessians exist at a time, one for all linear layers that see the same input. Layers
    see what the pruned layers before them give. Replaced weights are kept on the CPU until the end,
    so that an error leaves the model as it was; for a model that does not fit twice,
    `recipes/prune_oneshot.py` works from file to file.

    Raises ValueError (arguments, non-finite weights), Unsupported (model), FloatingPointError
    (non-finite activations) and torch.linalg.LinAlgError (a Hessian that is not positive definite),
    the last three naming the layer."""
    from effattn.prune.unstructured.report import OneShotReport

    require_own_weights(model)
    parts = hf.of(model)
    require_here(model, "prune.oneshot")
    plan = make_plan(
        parts.layers,
        method,
        sparsity,
        modules,
        allocation,
        damping=damping,
        raise_damping=raise_damping,
        block=block,
    )
    if tokens is None and (method != "magnitude" or allocation != "uniform"):
        raise ValueError(
            f"tokens: got None, {method!r} with {allocation!r} allocation needs calibration tokens"
        )
    length = calibration.window_length(parts.config, length)
    if tokens is not None:
        calibration.check_tokens(tokens, parts.embeddings.weight.shape[0], length)
    check_finite(model)
    names = {module: name for name, module in model.named_modules()}
    training, before = model.training, {}
    model.eval()
    try:
        runner = source = None
        if tokens is not None:
            dtype = layers.working_dtype(model.dtype, parts.embeddings.weight.device)
            runner = layers.Runner(parts, calibration.batches_of(tokens, length), dtype)
            source = embed(runner, spill)
            if allocation == "sensitivity":
                measured = [
                    outliers(runner, layer, plan.modules, source, source) for layer in parts
                ]
                plan = allocate(plan, measured)
                source = embed(runner, spill)
        facts = []
        for layer in parts:
            for linear in layers.linears(layer, modules).values():
                before[linear] = linear.weight.detach().to("cpu", copy=True)
            facts.append(prune_layer(runner, layer, names[layer.block], source, source, plan))
            if progress:
                progress(layer.index + 1, len(parts.layers))
    except BaseException:
        with torch.no_grad():
            for linear, weight in before.items():
                linear.weight.copy_(weight)
        raise
    finally:
        model.train(training)
    return OneShotReport.of(
        model,
        plan,
        facts,
        {
            "method": method,
            "sparsity": said(sparsity),
            "modules": modules,
            "allocation": allocation,
            "damping": damping,
            "raise_damping": raise_damping,
            "block": block,
            "length": length,
            "calibration_tokens": 0 if tokens is None else len(tokens) // length * length,
        },
    )


def said(sparsity: float | str | Sequence[float | str]) -> str:
    """What was asked for, as one text."""
    return (
        str(sparsity) if isinstance(sparsity, int | float | str) else ", ".join(map(str, sparsity))
    )


def make_plan(
    all_layers: Sequence[hf.Layer],
    method: str,
    sparsity: float | str | Sequence,
    modules: str,
    allocation: str,
    *,
    damping: float,
    raise_damping: bool,
    block: int,
) -> Plan:
    """The checked settings. Raises ValueError and Unsupported before anything is changed."""
    check_choice("method", method, METHODS)
    check_choice("allocation", allocation, ALLOCATIONS)
    count = len(all_layers)
    if isinstance(sparsity, int | float | str | Sparsity):
        wanted = (Sparsity.parse(sparsity),) * count
    else:
        wanted = tuple(
            Sparsity.parse(one, f"sparsity of layer {index}") for index, one in enumerate(sparsity)
        )
        if len(wanted) != count:
            raise ValueError(
                f"sparsity: got a list of {len(wanted)}, the model has {count} layers; valid is "
                "one for each"
            )
    if allocation == "sensitivity" and any(one.m is not None for one in wanted):
        raise ValueError(
            "allocation: 'sensitivity' needs a share of weights, N:M is the same in every layer"
        )
    if damping < 0:
        raise ValueError(
            f"damping: got {damping}, valid is 0 or more (a share of the Hessian's mean diagonal)"
        )
    if block < 1:
        raise ValueError(f"block: got {block}, valid is a positive number of columns")
    for layer, one in zip(all_layers, wanted, strict=True):
        for path, linear in layers.linears(layer, modules).items():
            one.check_inputs(linear.in_features, f"layer {layer.index}'s {path}")
    return Plan(method, wanted, modules, damping, raise_damping, block)


def embed(
    runner: layers.Runner, spill: str | Path | None
) -> list[Tensor] | calibration.SpilledStates:
    """The inputs of the first layer, in memory or in the folder `spill`."""
    if spill is None:
        return runner.embed()
    states = calibration.SpilledStates(Path(spill), len(runner.batches))
    for number, batch in enumerate(runner.batches):
        states[number] = runner.embed_batch(batch)
    return states


@torch.no_grad()
def prune_layer(
    runner: layers.Runner | None, layer: hf.Layer, name: str, source, sink, plan: Plan
) -> dict:
    """Prunes one decoder layer, called `name`, in place. source: its inputs by batch; its outputs
    then go to `sink`, which may be the same. Without a runner (magnitude) nothing is run.

    Returns {"layer", "sparsity", "weights", "zeros", "seconds", "linears", "error"}: `error` is the
    squared distance of the layer's output from what it gave before on the same input, over its
    square, on the first batch."""
    start = time.perf_counter()
    found, sparsity = layers.linears(layer, plan.modules), plan.sparsities[layer.index]
    dtype = found[next(iter(found))].weight.dtype if runner is None else runner.dtype
    rows, error = [], None
    with layers.working(layer.block, dtype) as stored:
        groups, dense = [list(found)], None
        if runner is not None:
            groups, dense = layers.input_groups(found, lambda: runner.call(layer.index, source[0]))
        for group in groups if sparsity.share else ():
            statistics = _statistics(runner, layer, name, source, found[group[0]], group, plan)
            for path in group:
                weight = found[path].weight
                pruned, facts = _prune(weight, statistics, sparsity, f"{name}.{path}", plan)
                weight.copy_(pruned.to(stored[weight]))  # rounded before the next layers see it
                del pruned  # as large as the weight, and not needed while the next Hessian is made
                rows.append(
                    {
                        "name": path,
                        "shape": list(weight.shape),
                        "zeros": int((weight == 0).sum()),
                        **facts,
                    }
                )
        if runner is not None:
            for number, states in enumerate(source):
                output = runner.call(layer.index, states)
                if number == 0:
                    error = float(
                        (output - dense).float().square().sum() / dense.float().square().sum()
                    )
                sink[number] = output.cpu()
    weights = [linear.weight for linear in found.values()]
    return {
        "layer": layer.index,
        "sparsity": str(sparsity),
        "weights": sum(w.numel() for w in weights),
        "zeros": sum(int((w == 0).sum()) for w in weights),
        "error": error,
        "seconds": time.perf_counter() - start,
        "linears": rows,
    }


def _statistics(
    runner, layer, name: str, source: Iterable[Tensor], linear, group: list[str], plan: Plan
):
    """What the method knows about the input of a group of linear layers: nothing, its second
    moments, or U.
    """
    if plan.method == "magnitude":
        return None
    seen = Hessian(diagonal_only=plan.method == "wanda")
    layers.feed(runner, layer.index, source, linear, seen.add)
    names = f"{name}.{group[0]}" + "".join(f", {path.rpartition('.')[2]}" for path in group[1:])
    seen.check(names)
    if plan.method == "wanda":
        return seen.diagonal
    layers.give_memory_back()  # the inverse needs room for three matrices
    return InverseHessian.of(seen.mean, plan.damping, names, plan.raise_damping)


def _prune(
    weight: Tensor, statistics, sparsity: Sparsity, name: str, plan: Plan
) -> tuple[Tensor, dict]:
    if plan.method == "sparsegpt":
        done = sparsegpt(weight, statistics, sparsity, block=plan.block, name=name)
        return done.weight, {"loss": done.loss, "damping": done.damping}
    work = weight if weight.dtype == torch.float64 else weight.float()
    mask = (
        magnitude_mask(work, sparsity)
        if plan.method == "magnitude"
        else wanda_mask(work, statistics, sparsity)
    )
    return weight.masked_fill(mask, 0), {}


# ---- shares by sensitivity
# -------------------------------------------------------------------------------------------------


@torch.no_grad()
def outliers(runner: layers.Runner, layer: hf.Layer, modules: str, source, sink) -> float:
    """The share of a layer's weights whose Wanda score is over `OUTLIER` times their matrix's mean;
    outputs of the unchanged layer go to `sink`."""
    found, over, total = layers.linears(layer, modules), 0, 0
    with layers.working(layer.block, runner.dtype):
        groups, _ = layers.input_groups(found, lambda: runner.call(layer.index, source[0]))
        seen = {group[0]: Hessian(diagonal_only=True) for group in groups}
        handles = [
            found[path].register_forward_pre_hook(
                lambda _, args, path=path: seen[path].add(args[0])
            )
            for path in seen
        ]
        try:
            for number, states in enumerate(source):
                sink[number] = runner.call(layer.index, states).cpu()
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            seen[group[0]].check(f"layer {layer.index}'s {group[0]}")
            for path in group:
                scores = found[path].weight.abs() * seen[group[0]].diagonal.sqrt()
                over += int((scores > OUTLIER * scores.mean()).sum())
                total += scores.numel()
    return over / total


def allocate(plan: Plan, measured: Sequence[float]) -> Plan:
    """Shares that fall with a layer's `outliers`, within `SPREAD` of the mean, which stays (layers
    count alike).
    """
    low, high = min(measured), max(measured)
    scaled = [2 * SPREAD * (one - low) / (high - low) if high > low else 0.0 for one in measured]
    mean = sum(scaled) / len(scaled)
    wanted = [one.share - (more - mean) for one, more in zip(plan.sparsities, scaled, strict=True)]
    if min(wanted) < 0 or max(wanted) > 1:
        raise ValueError(
            f"sparsity: got {plan.sparsities[0]} with 'sensitivity', which varies it by up to "
            f"{SPREAD}; valid is "
            f"{SPREAD} to {1 - SPREAD:g}"
        )
    return Plan(
        plan.method,
        tuple(Sparsity(share) for share in wanted),
        plan.modules,
        plan.damping,
        plan.raise_damping,
        plan.block,
    )
