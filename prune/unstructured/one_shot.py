"""One-shot pruning of a model's linear layers, decoder layer by decoder layer.

    report = effattn.prune.oneshot(model, tokens, method="sparsegpt", sparsity="2:4")

Zeros stay where they are: the weights are as large as before, in memory and on disk, and dense
products take as long. `effattn.prune.pack` turns zeros into memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.calibration.hessian import DAMPING, Hessian
from effattn.calibration.spilled import SpilledStates, States
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.hf.placement import require_here
from effattn.prune.unstructured import calibration, layers
from effattn.prune.unstructured.allocation import allocate, outliers
from effattn.prune.unstructured.methods.base import Needs
from effattn.prune.unstructured.methods.sparsegpt import BLOCK
from effattn.prune.unstructured.plan import Plan, make_plan
from effattn.prune.unstructured.report import LayerFacts, OneShotReport
from effattn.surgery.checkpoint import check_finite


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
    bos: bool | None = None,
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
    `sparsegpt`. bos: whether BOS takes the place of each window's first token (None: as the model's
    tokenizer does it). spill: a folder for the hidden states of the calibration text, which
    otherwise stay in memory.

    One layer's Hessians exist at a time, one for all linear layers that see the same input. Layers
    see what the pruned layers before them give. Replaced weights are kept on the CPU until the end,
    so that an error leaves the model as it was; for a model that does not fit twice,
    `recipes/prune_oneshot.py` works from file to file.

    Returns an `OneShotReport`: what went, layer by layer, and its error.

    Raises ValueError (arguments, non-finite weights), Unsupported (model), FloatingPointError
    (non-finite activations) and torch.linalg.LinAlgError (a Hessian that is not positive definite),
    the last three naming the layer."""
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
    if tokens is None and (plan.way.needs or plan.by_sensitivity):
        raise ValueError(
            f"tokens: got None, {method!r} with {allocation!r} allocation needs calibration tokens"
        )
    length = calibration.window_length(parts.config, length)
    if tokens is not None:
        calibration.check_tokens(tokens, parts.embeddings.weight.shape[0], length)
    beginning = bos_of(model, bos)
    check_finite(model)
    names = {module: name for name, module in model.named_modules()}
    facts = []
    with _all_or_nothing(model) as replaced:
        runner = states = None
        if tokens is not None:
            runner, states, plan = _calibrated(parts, tokens, length, plan, spill, beginning)
        for layer in parts:
            for linear in layers.linears(layer, modules).values():
                replaced[linear] = linear.weight.detach().to("cpu", copy=True)
            facts.append(prune_layer(runner, layer, names[layer.block], states, states, plan))
            if progress:
                progress(layer.index + 1, len(parts.layers))
    return OneShotReport.of(
        model, facts, plan.settings(length, tokens) | {"bos": beginning is not None}
    )


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[dict[nn.Linear, Tensor]]:
    """While open, `model` is in eval mode. An error that leaves it puts back every weight that was
    noted in the dict which this yields."""
    training = model.training
    before: dict[nn.Linear, Tensor] = {}
    model.eval()
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            for linear, weight in before.items():
                linear.weight.copy_(weight)
        raise
    finally:
        model.train(training)


def _calibrated(
    parts: hf.Anatomy,
    tokens: Tensor,
    length: int,
    plan: Plan,
    spill: str | Path | None,
    bos: int | None,
) -> tuple[layers.Runner, States, Plan]:
    """What runs the layers, the inputs of the first one, and the plan with its shares settled."""
    dtype = layers.working_dtype(parts.model.dtype, parts.embeddings.weight.device)
    runner = layers.Runner(parts, calibration.batches_of(tokens, length, bos), dtype)
    states = embed(runner, spill)
    if plan.by_sensitivity:
        plan = allocate(
            plan, [outliers(runner, layer, plan.modules, states, states) for layer in parts]
        )
        states = embed(runner, spill)  # measuring has run them through the whole model
    return runner, states, plan


def embed(runner: layers.Runner, spill: str | Path | None) -> States:
    """The inputs of the first layer, in memory or in the folder `spill`."""
    if spill is None:
        return runner.embed()
    states = SpilledStates(Path(spill), len(runner.batches))
    for number, batch in enumerate(runner.batches):
        states[number] = runner.embed_batch(batch)
    return states


@torch.no_grad()
def prune_layer(
    runner: layers.Runner | None,
    layer: hf.Layer,
    name: str,
    source: States | None,
    sink: States | None,
    plan: Plan,
) -> LayerFacts:
    """Prunes one decoder layer, called `name`, in place. source: its inputs by batch; its outputs
    then go to `sink`, which may be the same. Without a runner (for methods that need nothing)
    nothing is run.

    `error` of what it returns is the squared distance of the layer's output from what it gave
    before on the same input, over its square, on the first batch."""
    start = time.perf_counter()
    found, sparsity = layers.linears(layer, plan.modules), plan.sparsities[layer.index]
    way, rows, error = plan.way, [], None
    dtype = found[next(iter(found))].weight.dtype if runner is None else runner.dtype
    with layers.working(layer.block, dtype) as stored:
        groups, dense = [list(found)], None
        if runner is not None and source is not None:
            groups, dense = layers.input_groups(found, lambda: runner.call(layer.index, source[0]))
        # one group at a time, in the order of the forward pass: its inputs come from matrices that
        # are pruned already, and its Hessian is gone before the next one is made
        heads: list[Tensor] = []  # what o_proj gets, so that attention runs once
        for group in groups if sparsity.share else ():
            statistics = _statistics(runner, layer, name, source, heads, found, group, plan)
            for path in group:
                weight, where = found[path].weight, f"{name}.{path}"
                pruned, facts = way.prune(weight, statistics, sparsity, where, plan.options)
                weight.copy_(pruned.to(stored[weight]))  # rounded before the next layers see it
                del pruned  # as large as the weight, and not needed while the next Hessian is made
                zeros = int((weight == 0).sum())
                rows.append({"name": path, "shape": list(weight.shape), "zeros": zeros, **facts})
        if runner is not None and source is not None and sink is not None:
            for number, states in enumerate(source):
                output = runner.call(layer.index, states, heads[number] if heads else None)
                if number == 0 and dense is not None:
                    error = _relative_error(output, dense)
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


def _relative_error(output: Tensor, expected: Tensor) -> float:
    """Squared distance over the expected one's square."""
    return float((output - expected).float().square().sum() / expected.float().square().sum())


def _statistics(
    runner: layers.Runner | None,
    layer: hf.Layer,
    name: str,
    source: States | None,
    heads: list[Tensor],
    found: dict[str, nn.Linear],
    group: list[str],
    plan: Plan,
):
    """What the method takes of the input of a `group` of the linear layers `found`; None where it
    needs nothing. heads: gets what o_proj got, once it has been its turn, where hidden states are
    in memory as well."""
    if plan.way.needs is Needs.NOTHING or runner is None or source is None:
        return None
    seen = Hessian(diagonal_only=plan.way.needs is Needs.NORMS)
    linear, kept = found[group[0]], []
    for x in runner.until(layer.index, source, linear, heads):
        seen.add(x)
        if linear is layer.o.module and isinstance(source, list):
            kept.append(x.cpu())
    heads += kept
    names = f"{name}.{group[0]}" + "".join(f", {path.rpartition('.')[2]}" for path in group[1:])
    seen.check(names)
    if plan.way.needs is Needs.MOMENTS:
        layers.give_memory_back()  # what is made of a whole Hessian needs room for three matrices
    return plan.way.prepare(seen, names, plan.options)
