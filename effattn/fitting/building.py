"""A plan carried out: a twin of the parent, which shares the weights that stay.

Layer by layer, two streams of activations walk through the calibration set: `teacher`, of the
parent, which says what a layer should give, and `student`, of the twin so far. What changes a
layer's weights is fitted there (`effattn.fitting.shaping`); then weights are packed, and windows
and caches swapped in.

N: calibration tokens; D: hidden size."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from effattn.calibration.attended import is_linear
from effattn.calibration.layerwise import LayerRunner, watch, windows
from effattn.calibration.statistics import SecondMoment
from effattn.fitting.accounting import pattern_of
from effattn.fitting.harm import Progress, untold
from effattn.fitting.plan import FULL, LayerChoice, Plan, is_shaped
from effattn.fitting.shaping import Seen, Shaping, structured
from effattn.heads.converting import Conversion
from effattn.heads.judged import TOKENS
from effattn.heads.methods import METHODS
from effattn.hf import anatomy, placement, shapes
from effattn.quant.weights import quantize_weights
from effattn.surgery.swapping import swap


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
        changed = plan.shaped(self.parent)
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
                self.change(runner, index, plan.layers[index], seen, student)
            else:
                teacher = self.forward(index, teacher)
            if index < max(changed):
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
        stream = list(hidden)
        moment, within, gram = SecondMoment(ones=True), SecondMoment(), SecondMoment()
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
            watch(layer.feed_forward.inputs[0], lambda x, _: within.add(x)),
            watch(layer.feed_forward.output, inside),
            self.teacher.noticing(index) as added,
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
            within.mean.cpu(),
            gram.sum,
            stream if added[0] else None,
        )

    def change(
        self,
        runner: LayerRunner,
        index: int,
        choice: LayerChoice,
        seen: Seen,
        student: list[Tensor],
    ) -> None:
        """Gives the twin's layer its heads and its width, both re-fitted on `student`, the inputs
        that it gets."""
        layer = runner.anatomy.layers[index]
        own = self.parent.layers[index]
        Shaping(runner, layer, own, seen, student, self.asked).carry_out(choice)

    @torch.no_grad()
    def alone(
        self, index: int, name: str, value, seen: Seen | None, hidden: Sequence[Tensor]
    ) -> nn.Module:
        """The parent with one candidate in one layer, which gets `hidden`."""
        plan = self.parent.with_field(name, value, [index])
        if not is_shaped(name, value):
            return finish(twin(self.parts, ()), plan, self.parent)
        assert seen is not None
        model = twin(self.parts, {index})
        runner = LayerRunner(anatomy.of(model), self.batches)
        self.change(runner, index, plan.layers[index], seen, list(hidden))
        shapes.settle(model)
        return model


def twin(parts: anatomy.Anatomy, changed: Iterable[int]) -> nn.Module:
    """The model again, in eval mode; only the layers `changed` have weights of their own."""
    own = {id(p) for index in changed for p in parts.layers[index].block.parameters()}
    tensors = [*parts.model.parameters(), *parts.model.buffers(), *placement.maps(parts.model)]
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
    return copy.deepcopy(parts.model, shared).eval()


def apply(model: nn.Module, shaped: nn.Module, plan: Plan, parent: Plan) -> nn.Module:
    """Makes the model itself what its shaped twin is, and then the plan; module objects stay where
    they are, but for those whose weights are packed."""
    changed = plan.shaped(parent)
    if changed:  # otherwise the twin is the model, or nothing at all
        for own, other in zip(anatomy.of(model), anatomy.of(shaped), strict=True):
            if own.index in changed:
                _graft(own.block, other.block, shaped.config, model.config)
        shapes.settle(model)
    return finish(model, plan, parent)


def _graft(own: nn.Module, other: nn.Module, old_config, config) -> None:
    """Gives a module the parameters and the sizes of its twin, and takes over what has no like."""
    own._parameters.update(other._parameters)
    numbers = {k: v for k, v in vars(other).items() if type(v) in (int, bool)}
    vars(own).update(numbers | {"training": own.training})
    for name, child in list(other.named_children()):
        same = own._modules.get(name)
        if type(same) is type(child):
            _graft(same, child, old_config, config)
            continue
        own.add_module(name, child.train(own.training))
        for module in child.modules():
            if getattr(module, "config", None) is old_config:
                module.config = config


def finish(model: nn.Module, plan: Plan, parent: Plan) -> nn.Module:
    """Packs a shaped model's weights, and gives it the plan's windows and caches, in place."""
    pack(model, plan)
    return put_memories(model, plan, parent, {"cache", "window", "latent"})


def put_memories(model: nn.Module, plan: Plan, parent: Plan, fields: Collection[str]) -> nn.Module:
    """Gives a model what the plan says of these fields: windows, caches, and caches of latents."""
    patterns, caches = memories(plan, parent, anatomy.of(model), fields)
    return swap(model, patterns, cache=caches or None) if patterns else model


def memories(
    plan: Plan, parent: Plan, parts: anatomy.Anatomy, fields: Collection[str]
) -> tuple[dict[str | int, str], dict[str | int, str]]:
    """(patterns, caches) by layer, as `swap` takes them."""
    swapped = dict.fromkeys(i for i, name, _ in plan.changes(parent) if name in fields)
    patterns: dict[str | int, str] = {
        str(i): pattern_of(parts.layers[i], plan.layers[i]) for i in swapped
    }
    caches: dict[str | int, str] = {
        str(i): plan.layers[i].cache
        for i in swapped
        if "cache" in fields and plan.layers[i].cache != FULL
    }
    return patterns, caches


def pack(model: nn.Module, plan: Plan) -> None:
    """Packs the linears of the blocks that the plan names, all in one format."""
    parts, chosen = anatomy.of(model), []
    for layer, choice in zip(parts, plan.layers, strict=True):
        own = layer.feed_forward
        if _packed(choice.attention_weights):
            chosen += layer.qkv_modules
        if _packed(choice.ffn_weights):
            chosen += [*own.inputs, own.output]
    kinds = {
        kind
        for one in plan.layers
        for kind in (one.attention_weights, one.ffn_weights)
        if _packed(kind)
    }
    if len(kinds) > 1:
        raise ValueError(
            f"plan: weights in {', '.join(sorted(kinds))}; valid is one format, which a config "
            "can say"
        )
    for kind in kinds:
        quantize_weights(model, kind, only=chosen)


def _packed(form: str | None) -> bool:
    """Whether weights of this form are packed by bitsandbytes, at the end."""
    return form is not None and structured(form) is None
