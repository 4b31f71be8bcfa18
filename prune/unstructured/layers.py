"""One decoder layer at a time: its linear layers, what they see, and the precision it runs in.

Everything runs through the model's own forward (`effattn.calibration.layerwise`) and knows no
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import LayerRunner
from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy as hf
from effattn.hf.weights import is_plain
from effattn.profiling.memory import give_memory_back as give_memory_back
from effattn.training import lending as training

MODULES = ("all", "attention", "ffn")


# ---- the linear layers of a block
# -----------------------------------------------------------------------------------


def linears(layer: hf.Layer, modules: str = "all") -> dict[str, nn.Linear]:
    """The linear layers of one decoder layer by their path from it: all, or those of its attention
    or FFN.

    Unsupported, by name, for weights that are no plain linear layer: fused experts, structured or
    quantized ones."""
    check_choice("modules", modules, MODULES)
    inside: set[nn.Module] = set()
    if modules != "ffn":
        inside.update(
            each for root in (layer.attention, *layer.qkv_modules) for each in root.modules()
        )
    if modules != "attention":
        inside.update(layer.ffn.modules())
    inside -= {each for norm in layer.norms for each in norm.modules()}
    found = {}
    for path, module in layer.block.named_modules():
        if module not in inside:
            continue
        if hasattr(module, "in_features") and not list(module.parameters(recurse=False)):
            raise Unsupported(
                f"modules: {modules!r} of layer {layer.index} includes {path} "
                f"({type(module).__name__}), whose weight is codes in buffers; valid are models "
                "whose weights are all nn.Linear"
            )
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2:
                continue
            if not is_plain(module):
                others = (
                    " ('attention' may do)"
                    if module in set(layer.ffn.modules()) and modules == "all"
                    else ""
                )
                raise Unsupported(
                    f"modules: {modules!r} of layer {layer.index} includes {path}.{name} "
                    f"({type(module).__name__}, {str(weight.dtype).removeprefix('torch.')} "
                    f"{tuple(weight.shape)}), which is no plain linear layer; valid are models "
                    f"whose {modules} weights are all nn.Linear{others}"
                )
            found[path] = module
    return found


def input_groups(
    layers: dict[str, nn.Linear], forward: Callable[[], Tensor]
) -> tuple[list[list[str]], Tensor]:
    """Which of `layers` see the same tensor, in the order in which they are called, and what
    `forward` returned.

    q, k and v are one group, gate and up another. Unsupported for layers that are called never, or
    for several inputs."""
    seen: list[tuple[str, Tensor]] = []  # the tensors are kept, so that no address is used twice
    handles = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.append((path, args[0])))
        for path, module in layers.items()
    ]
    try:
        output = forward()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for path, x in seen:
        same = [
            names
            for y, names in groups
            if y is x or (y.data_ptr(), y.numel()) == (x.data_ptr(), x.numel())
        ]
        if same:
            same[0].append(path)
        else:
            groups.append((x, [path]))
    called = [path for _, names in groups for path in names]
    for path in layers:
        if called.count(path) != 1:
            raise Unsupported(
                f"{path}: called {called.count(path)} times in a forward pass, valid is once"
            )
    return [names for _, names in groups], output


# ---- precision
# -------------------------------------------------------------------------------------------------


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a layer is run in while it is pruned: fp32 on CPUs on which half precision is emulated
    (6 times slower).
    """
    half = dtype in (torch.bfloat16, torch.float16)
    native = device.type != "cpu" or (dtype == torch.bfloat16 and training.bf16_pays(on_cpu=True))
    return torch.float32 if half and not native else dtype


@contextmanager
def working(block: nn.Module, dtype: torch.dtype) -> Iterator[dict[nn.Parameter, torch.dtype]]:
    """While open, the block's floating-point parameters are in `dtype`; yields the dtypes they had,
    and get again.
    """
    stored = {p: p.dtype for p in block.parameters() if p.is_floating_point()}
    try:
        for parameter in stored:
            parameter.data = parameter.data.to(dtype)
        yield stored
    finally:
        for parameter, own in stored.items():
            parameter.data = parameter.data.to(own)


class Runner(LayerRunner):
    """A `LayerRunner` whose hidden states and layers' arguments are in `dtype`."""

    def __init__(self, parts: hf.Anatomy, batches: list[Tensor], dtype: torch.dtype):
        super().__init__(parts, batches)
        self.dtype = dtype
        self._arguments = {
            size: [(_cast(args, dtype), _cast(kwargs, dtype)) for args, kwargs in calls]
            for size, calls in self._arguments.items()
        }

    def embed_batch(self, batch: Tensor) -> Tensor:
        return super().embed_batch(batch).to(self.dtype)


def _cast(value, dtype: torch.dtype):
    """Floating-point tensors anywhere in tuples, lists and dicts, in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(one, dtype) for key, one in value.items()}
    return (
        type(value)(_cast(one, dtype) for one in value) if type(value) in (tuple, list) else value
    )
