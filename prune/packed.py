"""Packing weights with zeros: the linear layers become really smaller, and faster where memory is
the limit.

    effattn.prune.oneshot(model, tokens, method="sparsegpt", sparsity=0.5)
    report = effattn.prune.pack(model, format="bitmask")           # in place
    effattn.save(model, "out")                   # stays packed; effattn.load("out")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from effattn.errors import check_choice
from effattn.hf import anatomy
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.hf.weights import is_plain
from effattn.projections.packed import FORMATS, PackedWeight
from effattn.prune.unstructured.nm import Sparsity
from effattn.surgery import checkpoint
from effattn.surgery.record import mark


@dataclass(frozen=True)
class PackReport:
    """`packed`: paths of the layers that are packed now; `dense`: path -> why a layer stays as it
    was. Bytes are those of all linear layers inside the model's layers."""

    packed: tuple[str, ...]
    dense: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        text = (
            f"{len(self.packed)} linear layers packed, {self.bytes_before:,} -> "
            f"{self.bytes_after:,} bytes ({self.bytes_after / self.bytes_before:.3f}x)"
        )
        if self.dense:
            name, why = next(iter(self.dense.items()))
            text += f"; {len(self.dense)} stay dense and save nothing, {name} for one: {why}"
        return text

    def facts(self, format: str) -> dict[str, str | int]:
        """For a report: numbers of layers, and bytes."""
        return {
            "format": format,
            "packed_layers": len(self.packed),
            "dense_layers": len(self.dense),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def check_format(argument: str, format: str, *sparsities: str | float) -> None:
    """ValueError, beginning with `argument`, for an unknown format, and for one that weights of
    these sparsities ("0.5", "2:4") do not fit."""
    kind = FORMATS.members()[check_choice(argument, format, FORMATS.members())]
    for one in map(Sparsity.parse, sparsities):
        if not kind.takes(one.share, one.m):
            valid = [
                name for name, kind in FORMATS.members().items() if kind.takes(one.share, one.m)
            ]
            raise ValueError(
                f"{argument}: {format!r} cannot hold weights of sparsity {one}; valid for them are "
                f"{', '.join(map(repr, valid)) or 'none'}"
            )


def pack(
    model: nn.Module, *, format: str = "2:4", impl: str = "auto", large: str = "unpack"
) -> PackReport:
    """Replaces the linear layers inside the model's layers whose zeros fit `format` by packed ones,
    in place. Others stay.

    format: "2:4" takes weights that are 2:4 sparse; "bitmask" zeros anywhere, where they are enough
    that the layer becomes smaller. impl and large: see `PackedWeight`; large="semi_structured" is
    2:4's. Packed layers compute the same and do not train; hooks of the linears are gone. Those
    that are packed already stay as they are. Returns a `PackReport`: what was packed, what was not
    and why, and the bytes before and after. Raises ValueError, changing nothing, where no layer
    fits, and Unsupported for weights that are not the model's own, or elsewhere."""
    kind = FORMATS.find(format)
    kind.check_options(impl, large)
    require_own_weights(model)
    parts = anatomy.of(model)
    require_here(model, "prune.pack")
    inside = {module for layer in parts.layers for module in layer.block.modules()}
    found = {
        name: m
        for name, m in model.named_modules()
        if m in inside and isinstance(m, nn.Linear | PackedWeight)
    }
    new, dense = {}, {}
    for name, module in found.items():
        if isinstance(module, PackedWeight):
            continue
        if not is_plain(module):
            dense[name] = f"{type(module).__name__} is no plain linear layer"
            continue
        try:
            new[name] = kind.from_linear(module, impl=impl, large=large)
        except ValueError as error:
            dense[name] = str(error)
    if not new and not any(isinstance(m, PackedWeight) for m in found.values()):
        name, why = next(iter(dense.items()))
        others = ", ".join(repr(one) for one in FORMATS.members() if one != format)
        raise ValueError(
            f"model: none of its {len(dense)} linear layers {kind.FITS} ({name}: {why}); "
            f"effattn.prune.oneshot(model, tokens, {kind.MADE}) makes them so; other formats are "
            f"{others}"
        )
    before = sum(_nbytes(module) for module in found.values())
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    mark(model)
    after = sum(_nbytes(new.get(name, module)) for name, module in found.items())
    return PackReport(tuple(new), dense, before, after)


def _nbytes(module: nn.Module) -> int:
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def save_packed(model: PreTrainedModel, format: str, folder: Path, tokenizer, ids: Tensor) -> dict:
    """Packs the model, in place, saves it in `folder` with its tokenizer, and loads it again. ids:
    (T,) int64 to compare logits on. Returns {"packing": `PackReport.facts`, "verification"}; raises
    RuntimeError when another model comes back, and what `pack` does."""
    facts = pack(model, format=format).facts(format)
    model.config.use_cache = True
    checkpoint.save(model, folder, tokenizer)
    _, proof = checkpoint.load_again(folder, model, ids)
    return {"packing": facts, "verification": proof}
