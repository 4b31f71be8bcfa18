"""The conversion of a model's heads, layer by layer: observe, merge, write, re-fit.

Shapes: N tokens, D hidden size, K key/value heads, r query heads of each, d head size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange

from effattn.calibration.attended import is_linear
from effattn.calibration.layerwise import LayerRunner, watch, windows
from effattn.calibration.refit import OutputRefit, lag
from effattn.calibration.spilled import States
from effattn.calibration.statistics import SecondMoment, query_energy
from effattn.calibration.walk import CHANGED, Stream, Walk
from effattn.errors import Unsupported
from effattn.heads.grouping import by_similarity, contiguous
from effattn.heads.judged import TOKENS, judge
from effattn.heads.methods.base import Heads, Merged, Method, relative_errors
from effattn.hf.anatomy import Layer

# lambda of the FFNs' re-fit. SmolLM2 from 3 K/V heads to 1 by 32,768 tokens loses 0.88 nats at
# 0.01, 0.82 at 0.1.
FFN_DAMPING = 0.1
APART = 1000  # seeds of neighbouring layers; a layer's heads add their own


@dataclass(frozen=True)
class Conversion:
    """What is asked of a conversion, checked; the names are `convert_gqa`'s; bos is the
    token itself."""

    kv_heads: int
    calibration: torch.Tensor | None
    method: Method
    refit: bool
    grouping: str
    length: int
    batch: int
    seed: int
    bos: int | None = None
    refit_ffn: bool = False

    @property
    def batches(self) -> list[torch.Tensor] | None:
        """The calibration windows, int64 (batch, length) each; None without."""
        if self.calibration is None:
            return None
        return windows(self.calibration, self.length, self.batch, self.bos)


def convert(
    walk: Walk, asked: Conversion, progress: Callable[[int, int], None] | None = None
) -> list[dict]:
    """Converts every layer, and returns a row of facts for each.

    Two streams of activations walk through the calibration set: `teacher`, of the model as it was,
    which says what a layer should give, and `student`, of the model converted so far, on which the
    output projection is re-fitted."""

    def step(layer: Layer, teacher: Stream | None = None, student: Stream | None = None) -> dict:
        return _converted(walk, layer, asked, teacher, student)

    streams = 2 if walk.runner else 0
    return walk.over(CHANGED, step, streams=streams, changes=True, progress=progress)


def _converted(
    walk: Walk, layer: Layer, asked: Conversion, teacher: Stream | None, student: Stream | None
) -> dict:
    """Converts one layer; returns its row."""
    moment = inputs = seen = None
    # 1. What the old layer gets and gives, on the old model's activations
    if teacher is not None:
        seen = observe(walk, layer, teacher)
        moment, inputs = seen.moment, seen.inputs
    # 2. Its heads become fewer
    row = {
        "layer": layer.index,
        "k_error": None,
        "v_error": None,
        "attention_error_merged": None,
        "attention_error": None,
    }
    row |= merge_heads(layer, asked, moment, inputs)
    # 3. The output projection again, for what the new heads give on the converted model's
    #    activations: it makes up for errors of the layers before as well
    if student is not None and seen is not None:
        ffn = teacher if asked.refit_ffn else None
        row |= measure_and_refit(walk, layer, student, seen, asked.refit, ffn)
    return row


def merge_heads(layer: Layer, asked: Conversion, moment=None, inputs=None) -> dict:
    """Gives one layer `asked.kv_heads` key/value heads, in place; returns facts of its row: the
    errors that data tells, the method of its keys, and groups where they were looked for. moment,
    inputs: what `observe` gives; without a moment the weights alone decide."""
    heads = _heads(layer, moment, asked.seed + APART * layer.index)
    # Behind a norm of gain 0 no input comes through, and data says nothing about the heads: then
    # the weights do.
    if moment is not None and not moment[:-1, :-1].any():
        heads = _heads(layer, None, asked.seed + APART * layer.index)
    groups = contiguous(layer.kv_heads, asked.kv_heads)
    if asked.grouping == "similarity":
        groups = by_similarity(heads, asked.kv_heads, asked.method)
    merged, facts = _merge(layer, heads, groups, asked.method, moment, inputs)
    row = dict(facts) if moment is not None else {"key_method": asked.method.name}
    if asked.grouping == "similarity":
        row["groups"] = groups
    write(layer, groups, merged)
    return row


@dataclass(frozen=True)
class Observed:
    """What an old layer gets and gives on the old model's activations.

    moment: E[(x, 1)(x, 1)^T] of attention's inputs, (D + 1, D + 1) fp64. targets: what its output
    projection gives without the bias, (n, D) a batch. inputs: some of the inputs (N, D), where the
    moment does not tell all. stream: the hidden states that the layer got, by batch, where what
    attention gives is added to them as it is; None where it is not."""

    moment: torch.Tensor
    targets: States
    inputs: torch.Tensor | None
    stream: States | None

    def wanted(self, number: int, hidden: States) -> torch.Tensor:
        """What the new layer's output projection should give for batch `number`, (n, D): what the
        old one gave, and what lies between the old model's hidden states and `hidden`, the new
        one's at this layer, by batch, so that behind attention the two agree."""
        y = self.targets[number]
        if self.stream is None:
            return y
        return y.float() + lag(self.stream[number], hidden[number])


def observe(walk: Walk, layer: Layer, teacher: Stream) -> Observed:
    """Runs the old layer; moves `teacher` one layer on."""
    runner, targets = walk.runner, walk.pile("targets")
    assert runner is not None
    moment, inputs = SecondMoment(ones=True), []
    every = -(-sum(batch.numel() for batch in runner.batches) // TOKENS)
    bias = 0 if layer.o.bias is None else layer.o.bias
    stream = teacher.kept()

    def see(x: torch.Tensor, _: torch.Tensor) -> None:
        moment.add(x)
        if not is_linear(layer):  # then errors are measured on tokens (`effattn.heads.judged`)
            inputs.append(x[::every].clone())

    with (
        watch(layer.k.module, see),
        watch(layer.o.module, lambda _, y: targets.append((y - bias).cpu())),
        runner.noticing(layer.index) as added,
    ):
        for number, output in runner.run(layer.index, teacher.source):
            teacher.sink[number] = output
    if not torch.isfinite(moment.sum).all():
        raise FloatingPointError(
            f"layer {layer.index}: the calibration activations contain NaN or infinity"
        )
    some = torch.cat(inputs) if inputs else None
    return Observed(moment.mean.cpu(), targets, some, stream if added[0] else None)


def _merge(
    layer: Layer, heads: Heads, groups: list[list[int]], method: Method, moment, inputs
) -> tuple[list[Merged], dict]:
    """The merge of every group, and the row's facts about it. moment, inputs: what `observe`
    gives.
    """

    def merge(by: Method) -> list[Merged]:
        return [by(heads.select(group)) for group in groups]

    if inputs is None:
        merged = merge(method)
        return merged, {**_merge_errors(heads, groups, merged, moment), "key_method": method.name}
    best = judge(layer, groups, merge, method, inputs, write)
    return best.merged, {
        "k_error": best.k_error,
        "v_error": best.v_error,
        "key_method": best.key_method,
    }


def measure_and_refit(
    walk: Walk,
    layer: Layer,
    student: Stream,
    seen: Observed,
    refit: bool,
    teacher: Stream | None = None,
) -> dict:
    """Measures the changed layer, re-fits its output projection if asked, and moves `student` one
    layer on. teacher: the FFN's is re-fitted, too, to what leaves the old layer."""
    fit, heads, runner = OutputRefit(), walk.pile("heads"), walk.runner
    assert runner is not None
    given = runner.until(layer.index, student.source, layer.o.module)
    for number, z in enumerate(given):
        wanted = seen.wanted(number, student.source)
        fit.add(z.flatten(0, -2), wanted.to(z.device))
        heads.append(z.cpu())
    weight = layer.o.module.weight
    row = {"attention_error_merged": fit.error(weight), "attention_error": None}
    if refit:
        with torch.no_grad():
            weight.copy_(fit.solve(weight))
        row["attention_error"] = fit.error(weight)
    if teacher is not None:
        row["ffn_error"] = refit_feed_forward(runner, layer, student, teacher, heads)
    with torch.no_grad():
        for number, (states, z) in enumerate(zip(student.source, heads, strict=True)):
            student.sink[number] = runner.call(layer.index, states, z).cpu()
    return row


@torch.no_grad()
def refit_feed_forward(
    runner: LayerRunner, layer: Layer, student: Stream, teacher: Stream, heads: States
) -> float:
    """Solves the FFN's output projection, so that what leaves the layer is what left the old one;
    returns the share of the squares that is left. heads: what the output projection got."""
    module, fit, given = layer.feed_forward.output, OutputRefit(), []
    bias = 0 if module.bias is None else module.bias
    check_added(runner, layer, student.source[0])
    with watch(module, lambda x, y: given.append((x, y - bias))):
        for number, (states, z) in enumerate(zip(student.source, heads, strict=True)):
            output = runner.call(layer.index, states, z)
            x, y = given.pop()
            fit.add(x, y.float() + lag(teacher.sink[number], output))
    module.weight.copy_(fit.solve(module.weight, FFN_DAMPING))
    return fit.error(module.weight)


def check_added(runner: LayerRunner, layer: Layer, states: torch.Tensor) -> None:
    """Unsupported unless the last that a layer does is to add what its FFN gives. states: one batch
    of what it gets."""
    if not runner.ends_in(layer.index, states, layer.feed_forward.output):
        raise Unsupported(
            f"refit_ffn: layer {layer.index} does not add what its FFN gives as it is (it is "
            "scaled, or goes through a norm); valid is False"
        )


def _heads(layer: Layer, moment: torch.Tensor | None, seed: int) -> Heads:
    k, v, o = layer.k.with_bias.cpu(), layer.v.with_bias.cpu(), layer.o.by_head.double().cpu()
    if moment is None:  # without data every input direction counts the same
        moment = torch.eye(k.shape[-1], dtype=k.dtype)
    o = rearrange(o, "(k r) D d -> k r D d", k=layer.kv_heads)  # r query heads of each
    norm = layer.k_norm
    normed = None if norm is None else "rms" if "RMS" in type(norm).__name__ else "layer"
    query = query_energy(layer, moment.to(layer.q.module.weight.device)).cpu()
    return Heads(
        k,
        v,
        moment,
        query,
        torch.einsum("krDd,krDe->kde", o, o),
        layer.rotary_pairs(),
        normed,
        seed,
    )


def _merge_errors(heads: Heads, groups: list[list[int]], merged: list[Merged], moment) -> dict:
    """The layer's key and value errors: one merge of all groups, weighted by their energy."""
    # relative errors of groups weighted by what they are relative to: the layer's as a whole
    heads = replace(heads, moment=heads.moment if moment is None else moment)
    lost = [
        relative_errors(heads.select(group), part)
        for group, part in zip(groups, merged, strict=True)
    ]
    whole = [_energies(heads.select(group)) for group in groups]
    k, v = (
        sum(pair[i] * size[i] for pair, size in zip(lost, whole, strict=True))
        / max(sum(s[i] for s in whole), 1e-300)
        for i in (0, 1)
    )
    return {"k_error": k, "v_error": v}


def _energies(heads: Heads) -> tuple[float, float]:
    pairs = ((heads.keys, heads.query), (heads.values, heads.output))
    return tuple(
        float(torch.einsum("hdi,ij,hej,hde->", maps, heads.moment, maps, w)) for maps, w in pairs
    )


@torch.no_grad()
def write(layer: Layer, groups: list[list[int]], merged: list[Merged]) -> None:
    """Writes merged groups into the layer: fewer K and V rows, their stand-ins folded into Q and O,
    and query heads in the order of the groups."""
    order = [head for group in groups for head in group]
    share = layer.heads // layer.kv_heads
    queries = [head * share + i for head in order for i in range(share)]
    device = layer.q.module.weight.device
    key_maps = torch.cat([part.key_maps for part in merged]).repeat_interleave(share, 0).to(device)
    value_maps = (
        torch.cat([part.value_maps for part in merged]).repeat_interleave(share, 0).to(device)
    )
    # q.(A k') = (A^T q).k' and O (B v') = (O B) v': what stands in for a head goes into the query
    # and the output projection of the same head, exactly
    q = key_maps.transpose(1, 2) @ layer.q.with_bias[queries]
    o = layer.o.by_head.double()[queries] @ value_maps
    key, value = (
        torch.stack([getattr(part, name) for part in merged]).to(device)
        for name in ("key", "value")
    )
    layer.merge_norms(queries, groups)
    layer.set_heads(q, key, value, o)
