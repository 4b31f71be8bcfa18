"""A model whose weights stay in their files: one decoder layer has them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import loading, weight_files
from effattn.hf.packing import require_plain_files
from effattn.hf.source import read_config
from effattn.hf.trusted import KEY


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

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | None = None,
        shape: Callable[[nn.Module], None] | None = None,
    ):
        """shape: what makes the new model's modules those of a checkpoint that plain transformers
        does not know."""
        from accelerate import init_empty_weights

        self.checkpoint, self.device = checkpoint, device or torch.device("cpu")
        config = read_config(str(checkpoint.folder), checkpoint.folder)
        if hasattr(config, KEY) and shape is None:
            raise Unsupported(
                f"model: {str(checkpoint.folder)!r} is a swapped checkpoint, which is not read "
                "layer by layer; valid is effattn.load, the same on the model (such as "
                "effattn.prune.oneshot), and effattn.save"
            )
        config.__dict__.pop(KEY, None)
        loading.check_causal(config, checkpoint.folder)
        require_plain_files(config, checkpoint.folder, "working from file to file")
        # rotary frequencies are computed, not stored
        with init_empty_weights(include_buffers=False):
            model = (
                loading.class_of(config)
                ._from_config(config, dtype=config.dtype or torch.float32)
                .eval()
            )
            if shape is not None:
                shape(model)
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
                f"that {type(model).__name__} has are missing); save it once with this version of "
                "transformers"
            )

        loading.check_shapes(model, checkpoint.stored, self.stored)
        self.own = set(model.state_dict())
        if unknown := [
            here
            for here in self.stored
            if here not in self.own and not loading.left_out(model, here)
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
        block = self.parts.layers[index].block
        with self._filled(block, self.prefixes[index]):
            try:
                yield self.parts.layers[index]
            finally:
                _empty(block)  # which may have other modules by now

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


def _empty(root: nn.Module) -> None:
    """Puts everything in `root` that is in a checkpoint onto the meta device."""
    for module in root.modules():
        for name in _stored(module):
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
