"""One decoder layer at a time: its linear layers, what they see, and a model whose weights are
still in their files.

Everything runs through the model's own forward (`effattn.calibration.layerwise`) and knows no
architecture.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import LayerRunner
from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy as hf
from effattn.hf import loading, weight_files
from effattn.hf.packing import require_plain_files
from effattn.hf.source import KEY, read_config
from effattn.hf.weights import is_plain
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
                f"({type(module).__name__}), whose weight "
                "is codes in buffers; valid are models whose weights are all nn.Linear"
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
                    f"({type(module).__name__}, "
                    f"{str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}), which is "
                    "no plain linear "
                    f"layer; valid are models whose {modules} weights are all nn.Linear{others}"
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


class _Stop(Exception):
    pass


def feed(
    runner: LayerRunner,
    index: int,
    hidden: Iterable[Tensor],
    linear: nn.Linear,
    see: Callable[[Tensor], None],
):
    """Runs layer `index` on every batch of `hidden`, no further than to `linear`; calls `see` with
    what it gets.
    """

    def hook(_, args):
        see(args[0])
        raise _Stop

    handle = linear.register_forward_pre_hook(hook)
    try:
        for states in hidden:
            try:
                runner.call(index, states)
            except _Stop:
                continue
    finally:
        handle.remove()


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


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library can: it keeps hundreds of megabytes
    between layers.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


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


# ---- a checkpoint that stays in its files
# ---------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a safetensors checkpoint by name, each read when it is asked for. Nothing is
    ever written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.stored = weight_files.stored(folder)
        self.files: dict[str, str] = {name: one.file for name, one in self.stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of tensors. ValueError naming the first that holds NaN or Inf."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found = {}
        for file, inside in by_file.items():
            found |= weight_files.read(self.folder / file, inside)
        return found

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        """Every tensor's shape and safetensors dtype, without reading it."""
        return {name: (list(one.shape), one.dtype) for name, one in self.stored.items()}


class StreamedModel:
    """A model on the meta device: parts of it are filled from a checkpoint while they are needed,
    and emptied again.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None):
        from accelerate import init_empty_weights

        self.checkpoint, self.device = checkpoint, device or torch.device("cpu")
        config = read_config(str(checkpoint.folder), checkpoint.folder)
        if hasattr(config, KEY):
            raise Unsupported(
                f"model: {str(checkpoint.folder)!r} is a swapped checkpoint, which is not pruned "
                "from file to file; "
                "valid is effattn.load, effattn.prune.oneshot on the model, and effattn.save"
            )
        loading.check_causal(config, checkpoint.folder)
        require_plain_files(config, checkpoint.folder, "pruning from files")
        # rotary frequencies are computed, not stored
        with init_empty_weights(include_buffers=False):
            model = (
                loading.class_of(config)
                ._from_config(config, dtype=config.dtype or torch.float32)
                .eval()
            )
        model.tie_weights()
        for module in model.modules():  # what is not stored
            for name in module._non_persistent_buffers_set:
                if module._buffers.get(name) is not None:
                    module._buffers[name] = module._buffers[name].to(self.device)
        self.parts = hf.of(model)
        self.stored = _stored_names(model, checkpoint.files)
        names = {module: name for name, module in model.named_modules()}
        self.prefixes = [f"{names[layer.block]}." for layer in self.parts]
        tied = [names[model.get_output_embeddings()] + "."] if self.parts.head is None else []
        missing = [
            name
            for name in model.state_dict()
            if name not in self.stored and not any(name.startswith(head) for head in tied)
        ]
        if missing:
            raise Unsupported(
                f"model: {checkpoint.folder} has no {missing[0]!r} ({len(missing)} of the names "
                "that "
                f"{type(model).__name__} has are missing); save it once with this version of "
                "transformers"
            )

        loading.check_shapes(model, checkpoint.stored, self.stored)
        own = model.state_dict()
        if unknown := [
            here for here in self.stored if here not in own and not loading.left_out(model, here)
        ]:
            loading.refuse("unexpected keys", unknown)

    def names(self, index: int | None) -> list[str]:
        """The checkpoint's own names of the tensors of decoder layer `index`, or of what is outside
        of all of them.
        """
        if index is not None:
            return [
                there
                for here, there in self.stored.items()
                if here.startswith(self.prefixes[index])
            ]
        return [
            there
            for here, there in self.stored.items()
            if not any(here.startswith(prefix) for prefix in self.prefixes)
        ]

    @contextmanager
    def layer(self, index: int) -> Iterator[hf.Layer]:
        """While open, decoder layer `index` has its weights."""
        with self._filled(self.parts.layers[index].block, self.prefixes[index]):
            yield self.parts.layers[index]

    @contextmanager
    def around(self) -> Iterator[None]:
        """While open, everything outside of the decoder layers has its weights, apart from an
        output embedding.
        """
        blocks = {each for layer in self.parts for each in layer.block.modules()}
        with self._filled(self.parts.model, "", leave=blocks | {self.parts.head}):
            yield

    @contextmanager
    def _filled(self, root: nn.Module, prefix: str, leave: set = frozenset()) -> Iterator[None]:
        wanted: dict[str, tuple[nn.Module, str]] = {}
        for path, module in root.named_modules():
            for name in () if module in leave else _stored(module):
                wanted[f"{prefix}{path}{'.' if path else ''}{name}"] = (module, name)
        tensors = self.checkpoint.read(self.stored[name] for name in wanted if name in self.stored)
        for full, (module, name) in wanted.items():
            if full in self.stored:
                _set(module, name, tensors.pop(self.stored[full]).to(self.device))
        if (
            self.parts.head is None
            and (head := self.parts.model.get_output_embeddings()) is not None
        ):
            head.weight = self.parts.embeddings.weight
        try:
            yield
        finally:
            for module, name in wanted.values():
                _set(module, name, getattr(module, name).to("meta"))


def _stored_names(model: nn.Module, files: Iterable[str]) -> dict[str, str]:
    """The name in the model -> the name in the files, of every tensor there: transformers renames
    some as it loads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [
        one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)
    ]
    own, found = set(model.state_dict()), {}
    for there in files:
        here = there
        for renaming in renamings if there not in own else ():
            here, _ = renaming.rename_source_key(here)
        found[here if here in own else there] = there
    return found


def _stored(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and buffers that are in a checkpoint."""
    buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
    return [name for name in (*module._parameters, *buffers) if getattr(module, name) is not None]


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    else:
        module._buffers[name] = tensor
