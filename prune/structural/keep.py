"""What stays of a model that is cut: indices, checked against its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.hf import anatomy as hf
from effattn.hf.uneven import overrides


@dataclass(frozen=True)
class Keep:
    """What stays, as int64 indices; None: everything.

    hidden: (D',) of the residual stream's dimensions. heads and ffn: a tensor for each layer that
    stays, in order: K/V groups (a K/V head with its query heads; in multi-head
    attention a head), inner dimensions of the FFN. Of different lengths, layers differ
    (`effattn.hf.uneven`); of length 0, the layer's attention or FFN is left out. layers: (L',).
    Their order does not matter: what stays keeps the model's."""

    hidden: Tensor | None = None
    heads: Sequence[Tensor] | None = None
    ffn: Sequence[Tensor] | None = None
    layers: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """What a transformers config says of the axes that can be cut."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @classmethod
    def of(cls, config) -> Sizes:
        """Of a config, an encoder's or a text model's; of layers that differ, the first's."""
        config = config.get_text_config()
        config = config.per_layer_config[0] if overrides(config) else config
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, heads, kv_heads, head_dim, config.num_hidden_layers)


def checked(parts: hf.Anatomy, keep: Keep, uniform: bool = True) -> Keep:
    """`keep` with its indices validated, sorted and on the CPU. ValueError, naming the index, for
    what the model does not have, and where `uniform` for layers that would differ."""
    if not isinstance(keep, Keep):
        raise ValueError(
            f"keep: got {type(keep).__name__}, valid is an effattn.prune.structural.slicing.Keep"
        )
    count = len(parts.layers)
    layers = _indices("keep.layers", keep.layers, count)
    staying = range(count) if layers is None else layers.tolist()
    hidden = _indices("keep.hidden", keep.hidden, Sizes.of(parts.config).hidden)
    found: dict[str, list[Tensor] | None] = {}
    for name in ("heads", "ffn"):
        given = getattr(keep, name)
        if given is None:
            found[name] = None
            continue
        if len(given) != len(staying):
            raise ValueError(
                f"keep.{name}: got {len(given)} tensors, valid is one for each of {len(staying)} "
                "layers"
            )
        size = [
            parts.layers[i].kv_heads if name == "heads" else parts.layers[i].feed_forward.size
            for i in staying
        ]
        least = 1 if uniform else 0
        found[name] = rows = [
            _checked(f"keep.{name}[{i}]", one, size[i], least) for i, one in enumerate(given)
        ]
        counts = sorted({len(one) for one in rows})
        if uniform and len(counts) > 1:
            raise ValueError(
                f"keep.{name}: got {', '.join(map(str, counts))} by layer; a config holds one "
                "number, the same for all, unless uniform=False"
            )
    return Keep(hidden, found["heads"], found["ffn"], layers)


def _indices(argument: str, got: Tensor | None, size: int) -> Tensor | None:
    return None if got is None else _checked(argument, got, size)


def _checked(argument: str, got: Tensor, size: int, least: int = 1) -> Tensor:
    """Indices below `size`, sorted and on the CPU; at least so many. ValueError, naming the
    argument, for others."""
    is_list = isinstance(got, Tensor) and got.dtype == torch.int64 and got.dim() == 1
    if not is_list or len(got) < least:
        told = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(
            f"{argument}: got {told}, valid is an int64 tensor (n,) of indices, n at least {least}"
        )
    got = got.detach().cpu().unique()  # sorted
    if len(got) and (int(got[0]) < 0 or int(got[-1]) >= size):
        raise ValueError(
            f"{argument}: indices run from {int(got[0])} to {int(got[-1])}, valid are 0 to "
            f"{size - 1}"
        )
    return got
