"""A plan carried out: a twin of the parent, which shares the weights that stay.

Layer by layer, two streams of activations walk through the calibration set: `teacher`, of the
parent, which says what a layer should give, and `student`, of the twin so far. Heads are merged in
closed form (`effattn.heads`), an FFN's dimensions go in the order in which others make up for them
(ZipLM, arXiv:2302.04089), and the output and the down projection are solved again by least squares
on what the twin feeds them. Then weights are packed, and windows and caches swapped in.

N: calibration tokens; D: hidden size; F: inner dimensions of an FFN."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effattn.calibration.attended import is_linear
from effattn.calibration.layerwise import LayerRunner, watch, windows
from effattn.calibration.refit import OutputRefit
from effattn.calibration.statistics import SecondMoment
from effattn.fitting.accounting import pattern_of
from effattn.fitting.harm import Progress, untold
from effattn.fitting.plan import FULL, SHAPED, LayerChoice, Plan
from effattn.heads.converting import Conversion, merge_heads
from effattn.heads.judged import TOKENS
from effattn.heads.methods import METHODS
from effattn.hf import anatomy, placement, shapes
from effattn.hf.layer import Layer
from effattn.prune.structural.criteria.obs import removal_order
from effattn.quant.weights import quantize_weights
from effattn.surgery.swapping import swap


@dataclass
class Seen:
    """What the parent's layer gets and gives: the moment of its attention's inputs and some of them
    (`effattn.heads.converting.observe`), what its output projections give without their biases
    (N, D), and the sum of z z^T of the FFN's inner dimensions (F, F) in fp64."""

    moment: Tensor
    inputs: Tensor | None
    attention: list[Tensor]
    ffn: list[Tensor]
    gram: Tensor


class Builder:
    """Carries out plans for one parent. tokens: int64 (N,); length, batch: of their windows."""

    def __init__(
        self,
        parts: anatomy.Anatomy,
        tokens: Tensor,
        *,
        length: int,
        batch: int = 8,
        bos: int | None = None,
    ):
        self.parts, self.parent = parts, Plan.of(parts)
        self.batches = windows(tokens, length, batch, bos)
        self.teacher = LayerRunner(parts, self.batches)
        self.asked = Conversion(
            kv_heads=1,
            calibration=tokens,
            method=METHODS["optimal"],
            refit=True,
            grouping="contiguous",
            length=length,
            batch=batch,
            seed=0,
            bos=bos,
        )

    # Whole plans
    # ---------------------------------------------------------------------------------------------

    def build(self, plan: Plan) -> nn.Module:
        """The parent as the plan has it, in eval mode."""
        return finish(self.shaped(plan), plan, self.parent)

    def shaped(self, plan: Plan, progress: Progress = untold) -> nn.Module:
        """The parent with the plan's heads and widths, and nothing else of it. progress: called
        with (layers done, layers)."""
        changed = [i for i, name, _ in plan.changes(self.parent) if name in SHAPED]
        model = twin(self.parts, set(changed))
        if not changed:
            progress(1, 1)
            return model
        runner = LayerRunner(anatomy.of(model), self.batches)
        teacher = self.teacher.embed()
        student = [states.clone() for states in teacher]
        for index in range(min(changed)):  # both are the same so far
            student = teacher = self.forward(index, teacher)
            progress(index + 1, max(changed) + 1)
        teacher = [states.clone() for states in student]
        for index in range(min(changed), max(changed) + 1):
            if index in changed:
                seen = self.see(index, teacher)
                student = self.change(runner, index, plan.layers[index], seen, student)
            else:
                teacher = self.forward(index, teacher)
                student = [output for _, output in runner.run(index, student)]
            progress(index + 1, max(changed) + 1)
        shapes.settle(model)
        return model

    # One layer
    # ---------------------------------------------------------------------------------------------

    def forward(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        """What the parent's layer gives for its inputs."""
        return [output for _, output in self.teacher.run(index, hidden)]

    def see(self, index: int, hidden: list[Tensor]) -> Seen:
        """Runs the parent's layer on `hidden`, which moves one layer on. FloatingPointError for
        activations that are not finite."""
        layer = self.parts.layers[index]
        moment, gram = SecondMoment(ones=True), SecondMoment()
        inputs: list[Tensor] = []
        outputs: dict[nn.Module, list[Tensor]] = {
            layer.o.module: [],
            layer.feed_forward.output: [],
        }
        every = -(-sum(batch.numel() for batch in self.batches) // TOKENS)

        def enter(x: Tensor, _: Tensor) -> None:
            moment.add(x)
            if not is_linear(layer):  # then heads are judged on tokens (`effattn.heads.judged`)
                inputs.append(x[::every].clone())

        def leave(module: nn.Module, y: Tensor) -> None:
            outputs[module].append((y if module.bias is None else y - module.bias).cpu())

        def inside(z: Tensor, y: Tensor) -> None:
            gram.add(z)
            leave(layer.feed_forward.output, y)

        with (
            watch(layer.k.module, enter),
            watch(layer.o.module, lambda _, y: leave(layer.o.module, y)),
            watch(layer.feed_forward.output, inside),
        ):
            hidden[:] = self.forward(index, hidden)
        if not torch.isfinite(moment.sum).all() or not torch.isfinite(gram.sum).all():
            raise FloatingPointError(
                f"layer {index}: the calibration activations contain NaN or infinity"
            )
        return Seen(
            moment.mean.cpu(),
            torch.cat(inputs) if inputs else None,
            outputs[layer.o.module],
            outputs[layer.feed_forward.output],
            gram.sum,
        )

    def change(
        self,
        runner: LayerRunner,
        index: int,
        choice: LayerChoice,
        seen: Seen,
        student: list[Tensor],
    ) -> list[Tensor]:
        """Gives the twin's layer its heads and its width, both re-fitted on `student`, the inputs
        that it gets. Returns what the layer then gives."""
        layer = runner.anatomy.layers[index]
        if choice.kv_heads != layer.kv_heads:
            asked = replace(self.asked, kv_heads=choice.kv_heads)
            merge_heads(layer, asked, seen.moment, seen.inputs)
            refit(runner, layer, layer.o.module, student, seen.attention)
        if choice.ffn != layer.feed_forward.size:
            narrow(layer, choice.ffn, seen.gram)
            refit(runner, layer, layer.feed_forward.output, student, seen.ffn)
        return [output for _, output in runner.run(index, student)]

    @torch.no_grad()
    def alone(
        self, index: int, name: str, value, seen: Seen | None, hidden: Sequence[Tensor]
    ) -> nn.Module:
        """The parent with one candidate in one layer, which gets `hidden`."""
        plan = self.parent.with_field(name, value, [index])
        model = twin(self.parts, {index} if name in SHAPED else set())
        if name in SHAPED:
            assert seen is not None
            runner = LayerRunner(anatomy.of(model), self.batches)
            self.change(runner, index, plan.layers[index], seen, list(hidden))
            return model
        return finish(model, plan, self.parent)


@torch.no_grad()
def narrow(layer: Layer, width: int, gram: Tensor) -> None:
    """Leaves an FFN the `width` dimensions that others cannot make up for. gram (F, F), fp64."""
    output = layer.feed_forward.output
    order = removal_order(
        gram.cpu(),
        output.weight.detach().double().cpu(),
        removed=layer.feed_forward.size - width,
    )
    keep = order[len(order) - width :].sort().values
    shapes.keep_ffn(layer, keep.to(output.weight.device))


@torch.no_grad()
def refit(
    runner: LayerRunner,
    layer: Layer,
    output: nn.Linear,
    student: list[Tensor],
    targets: list[Tensor],
) -> None:
    """Solves an output projection for `targets`, on what it gets when the layer gets `student`."""
    fit = OutputRefit()
    for z, y in zip(runner.until(layer.index, student, output), targets, strict=True):
        fit.add(z.flatten(0, -2), y.to(z.device))
    output.weight.copy_(fit.solve(output.weight))


def twin(parts: anatomy.Anatomy, changed: Iterable[int]) -> nn.Module:
    """The model again, in eval mode; only the layers `changed` have weights of their own."""
    own = {id(p) for index in changed for p in parts.layers[index].block.parameters()}
    tensors = [*parts.model.parameters(), *parts.model.buffers(), *placement.maps(parts.model)]
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
    return copy.deepcopy(parts.model, shared).eval()


def finish(model: nn.Module, plan: Plan, parent: Plan) -> nn.Module:
    """Packs a shaped model's weights, and gives it the plan's windows and caches, in place."""
    pack(model, plan)
    parts = anatomy.of(model)
    changed = {(index, name) for index, name, _ in plan.changes(parent)}
    swapped = [i for i, _ in enumerate(plan.layers) if {(i, "cache"), (i, "window")} & changed]
    if not swapped:
        return model
    patterns: dict[str | int, str] = {
        str(i): pattern_of(parts.layers[i], plan.layers[i]) for i in swapped
    }
    caches: dict[str | int, str] = {
        str(i): plan.layers[i].cache for i in swapped if plan.layers[i].cache != FULL
    }
    return swap(model, patterns, cache=caches or None)


def pack(model: nn.Module, plan: Plan) -> None:
    """Packs the linears of the blocks that the plan names, all in one format."""
    parts, chosen = anatomy.of(model), []
    for layer, choice in zip(parts, plan.layers, strict=True):
        own = layer.feed_forward
        if choice.attention_weights:
            chosen += layer.qkv_modules
        if choice.ffn_weights:
            chosen += [*own.inputs, own.output]
    kinds = {
        kind for one in plan.layers for kind in (one.attention_weights, one.ffn_weights) if kind
    }
    if len(kinds) > 1:
        raise ValueError(
            f"plan: weights in {', '.join(sorted(kinds))}; valid is one format, which a config "
            "can say"
        )
    for kind in kinds:
        quantize_weights(model, kind, only=chosen)
