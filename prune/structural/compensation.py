"""Least squares after structured pruning: o_proj and the FFN's output module are solved again for
what they have left.

Layer by layer, in order, the pruned model feeding its own next layers. Each output module is solved
for what the whole layer would have given on the same input: with x the module's whole input, C =
sum x x^T over the calibration tokens, S what stays and V the diagonal of C[S, S],
W' = W C[:, S] (C[S, S] + lambda V)^-1, in fp64 (He et al.'s reconstruction, arXiv:1707.06168, and
of SlimGPT, arXiv:2412.18110). lambda pulls towards W[:, S], so that the error on the calibration
tokens never rises. A module with a bias gets a new one with it. The FFN's module is solved after
o_proj is written, on what it then is given.

D: hidden size; n: inputs of an output module that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import LayerRunner, watch
from effattn.calibration.refit import OutputRefit
from effattn.calibration.spilled import States
from effattn.calibration.walk import CHANGED, Progress, Stream, Walk
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import loading
from effattn.hf.families import BIASES
from effattn.prune.structural.keep import Keep


@torch.no_grad()
def compensate(
    old: hf.Anatomy,
    new: hf.Anatomy,
    keep: Keep,
    batches: list[Tensor],
    *,
    weights: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Fits `new`, what `slice_model` made of `old` by `keep`, in place to batches of tokens, int64
    (batch, length).

    weights=False: solves for the biases alone (FLAP's correction). Returns {"layer",
    "heads_error_sliced", "heads_error", "ffn_error_sliced", "ffn_error"} for each layer: the
    squared error of the attention's and of the FFN's output over its square, before and after; None
    where nothing was cut. Raises FloatingPointError naming the layer (of `old`) when activations
    are not finite."""
    walk = Walk(new, batches)
    solving = Solving(LayerRunner(old, batches), old, keep, weights)
    return solve(walk, solving, progress)


@dataclass(frozen=True)
class Solving:
    """What is to be solved again: `teacher` runs the old model `old`, of which `keep` has stayed.
    weights: whether for weights too, not for biases alone. opened: while what it gives is open, an
    old layer's weights are there."""

    teacher: LayerRunner
    old: hf.Anatomy
    keep: Keep
    weights: bool = True
    opened: Callable[[int], AbstractContextManager] = nullcontext

    @property
    def staying(self) -> list[int]:
        """The old numbers of the layers that have stayed."""
        layers = self.keep.layers
        return list(range(len(self.old.layers))) if layers is None else layers.tolist()

    @property
    def cut(self) -> list[str]:
        """Of what something went within layers."""
        return [target for target in ("heads", "ffn") if getattr(self.keep, target) is not None]


def solve(walk: Walk, asked: Solving, progress: Progress | None = None) -> list[dict]:
    """The same on a walk over the new model; returns its rows."""
    student = walk.runner
    assert student is not None
    staying = asked.staying

    def step(layer: hf.Layer, states: Stream) -> dict:
        index = staying[layer.index]
        errors = [f"{t}_error{s}" for t in ("heads", "ffn") for s in ("_sliced", "")]
        row = {"layer": index, **dict.fromkeys(errors)}
        # What the whole layer makes of the pruned model's hidden states: before anything in this
        # layer is written.
        left = [t for t in asked.cut if output_module(layer, t).in_features]
        outputs: dict[str, States] = {target: walk.pile(target) for target in left}
        with asked.opened(index):
            _note_outputs(asked.teacher, index, states.kept(), outputs)
        for target in left:
            module = output_module(layer, target)
            fit = _fit(student, layer.index, states.kept(), module, outputs.pop(target))
            row[f"{target}_error_sliced"] = fit.error(_with_bias(module))
            try:
                _write(module, fit, asked.weights)
            except FloatingPointError as error:
                raise FloatingPointError(f"layer {index}: {error}") from None
            row[f"{target}_error"] = fit.error(_with_bias(module))
        for number, output in student.run(layer.index, states.source):
            states.sink[number] = output
        return row

    return walk.over(CHANGED, step, changes=True, progress=progress)


def output_module(layer: hf.Layer, target: str) -> nn.Linear:
    """The module that a layer's heads, or its FFN dimensions, end in."""
    return layer.o.module if target == "heads" else layer.feed_forward.output


def _note_outputs(
    teacher: LayerRunner, index: int, hidden: States, found: dict[str, States]
) -> None:
    """Puts what the whole layer's output modules give on each batch, (tokens, D) on the CPU, behind
    what is `found` by target."""
    with ExitStack() as open:
        for target, outputs in found.items():
            module = output_module(teacher.anatomy.layers[index], target)
            see = lambda _, y, outputs=outputs: outputs.append(y.cpu())  # noqa: E731
            open.enter_context(watch(module, see))
        for states in hidden if found else ():
            teacher.call(index, states)


def _fit(
    student: LayerRunner, place: int, hidden: States, module: nn.Linear, outputs: States
) -> OutputRefit:
    """Sums over all tokens of what the pruned layer's module takes (with a 1 for its bias), and
    what it should give.
    """
    fit = OutputRefit()
    for x, y in zip(student.until(place, hidden, module), outputs, strict=True):
        z = x.flatten(0, -2)
        if module.bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        fit.add(z, y.to(z.device))
    return fit


def _with_bias(module: nn.Linear) -> Tensor:
    """(D, n), or (D, n + 1) with the bias last."""
    return (
        module.weight
        if module.bias is None
        else torch.cat([module.weight, module.bias[:, None]], dim=1)
    )


def _write(module: nn.Linear, fit: OutputRefit, weights: bool) -> None:
    if weights:
        solved = fit.solve(_with_bias(module))
        module.weight.copy_(solved[:, : module.in_features])
        if module.bias is not None:
            module.bias.copy_(solved[:, -1])
        return
    # FLAP's correction: the bias makes up for the mean of what went. Sums over tokens; of the last
    # input, which is 1, their number.
    inputs, outputs = (fit.gram.total[-1], fit.cross.total[-1])
    if not torch.isfinite(inputs).all() or not torch.isfinite(outputs).all():
        raise FloatingPointError("the calibration activations contain NaN or infinity")
    module.bias.copy_((outputs - module.weight.double() @ inputs[:-1]) / inputs[-1])


def check_biases(parts: hf.Anatomy, targets: list[str]) -> None:
    """Unsupported, naming the class, unless its config can give these targets' output modules
    biases.
    """
    if targets:
        with_fields(parts, targets)


def with_biases(model: nn.Module, targets: list[str]) -> nn.Module:
    """The same model with biases of 0 at the output modules of `targets` ("heads", "ffn"), where it
    had none, and wherever else its class puts them with these; a new one, or `model` itself where
    nothing is missing.

    Raises Unsupported as `check_biases`.
    """
    config, names = with_fields(hf.of(model), targets)
    state = model.state_dict()
    missing = {
        name: torch.zeros(shape, dtype=model.dtype)
        for name, shape in names.items()
        if name not in state
    }
    if not missing:
        return model
    new = loading.from_state(type(model), config, state | missing, model.dtype)
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def with_fields(parts: hf.Anatomy, targets: list[str]) -> tuple[object, dict[str, torch.Size]]:
    """A copy of the config in which these modules have biases, and the names and shapes of its
    class's weights then. Unsupported as `check_biases`.
    """
    model, first = parts.model, parts.layers[0]
    config = copy.deepcopy(model.config)
    for target in targets:
        if output_module(first, target).bias is None and hasattr(
            config.get_text_config(), BIASES[target]
        ):
            setattr(config.get_text_config(), BIASES[target], True)
    shell = loading.shell(type(model), config)
    for target in targets:
        if output_module(hf.of(shell).layers[0], target).bias is None:
            what = "o_proj" if target == "heads" else "its FFN's output module"
            raise Unsupported(
                f"bias: {type(model).__name__} cannot have a bias in {what}: its config has no "
                f"{BIASES[target]}; valid is bias=False"
            )
    return config, {name: tensor.shape for name, tensor in shell.state_dict().items()}
