"""How many bytes a module's weights really take, packed ones included.

bitsandbytes keeps what belongs to a packed weight (scales, code books) beside its parameters, in
plain attributes: `quant_state` of a 4-bit weight, `SCB` of an 8-bit one, or of its module's `state`
after the first call. They are found by these names, so that bitsandbytes need not be there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers in `module`, each once, with what packed weights carry
    along.
    """
    return sum({id(one): one.nbytes for one in _tensors(module)}.values())


def is_packed(module: nn.Module) -> bool:
    """Whether a linear module's weight is codes and no numbers: integers (bitsandbytes), 8-bit
    floats that have a scale beside them, or a tensor class that unpacks itself (torchao,
    quanto)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return (
        not weight.is_floating_point()
        or weight.dtype.itemsize < 2
        or is_traceable_wrapper_subclass(weight)
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more: whoever has its weight and bias can do
    without it.
    """
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not is_packed(module)
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's kind of linear layer, whose weight is (inputs, outputs)."""
    return isinstance(module, Conv1D)


def matrix(module: nn.Module) -> Tensor:
    """The weight (outputs, inputs) of a linear layer or a transposed one, without gradients: a
    view, so that writing into it changes the module."""
    weight = module.weight.detach()
    return weight.T if is_transposed(module) else weight


def sizes(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear-like module."""
    if is_transposed(module):
        outputs, inputs = matrix(module).shape
        return outputs, inputs
    return module.out_features, module.in_features


def not_plain(root: nn.Module) -> str | None:
    """The path in `root` and the class of the first linear-like module that is no plain one; None
    where all are.
    """
    for path, module in root.named_modules():
        if is_transposed(module):
            return f"{path or 'it'} (Conv1D, of which effattn.rehost makes a linear layer)"
        if hasattr(module, "in_features") and not is_plain(module):
            return f"{path or 'it'} ({type(module).__name__})"
    return None


def packing(module: nn.Module) -> str | None:
    """ "nf4", "fp4", "int8" or "fp8" where the weight is packed, a tensor class by its name, else
    None.
    """
    if not is_packed(module):
        return None
    weight = module.weight
    if is_traceable_wrapper_subclass(weight):
        return type(weight).__name__
    return getattr(weight, "quant_type", "fp8" if weight.is_floating_point() else "int8")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for inside in module.modules():
        if is_packed(inside):
            weight = inside.weight
            scales = getattr(weight, "SCB", None)
            if scales is None:
                scales = getattr(getattr(inside, "state", None), "SCB", None)
            yield from _state(getattr(weight, "quant_state", None))
            if scales is not None:
                yield scales


def _state(state) -> Iterator[Tensor]:
    """absmax, code and offset of bitsandbytes' QuantState, and those of the second one (double
    quantization).
    """
    if state is not None:
        yield from (
            one for one in (state.absmax, state.code, state.offset) if isinstance(one, Tensor)
        )
        yield from _state(state.state2)


def numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: two in a byte where it is packed in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
