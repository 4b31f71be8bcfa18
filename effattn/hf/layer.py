"""One layer of a live model: its modules, and its attention as q, k, v and o by head.

Shapes: D hidden size, H query heads, K key/value heads, d head size, R rotary dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from torch import nn

from effattn.errors import Unsupported
from effattn.hf.families import Family, no_rope, rope_factor, sliding_window, trained_length
from effattn.hf.feedforward import FeedForward
from effattn.hf.names import LATENT
from effattn.hf.placement import bare
from effattn.hf.projection import Projection, set_linear
from effattn.positions.rope import Rope
from effattn.projections.latent import LatentMemory


@dataclass(frozen=True)
class Rotary:
    """Where one layer's rotary frequencies live: they follow the model's device, and whatever is
    written into it.
    """

    module: nn.Module
    prefix: str  # of its attributes, where each type of layer has frequencies of its own (Gemma 3)
    interleaved: bool

    @property
    def kind(self) -> str:
        """transformers' name of the rule that made the frequencies."""
        kind = self.module.rope_type
        return kind[self.layer_type] if isinstance(kind, dict) else kind

    @property
    def layer_type(self) -> str:
        """The type of layers that these frequencies are for; "" where all layers have the same."""
        return self.prefix.removesuffix("_")

    def rope(self) -> Rope:
        """The layer's rotation, as it is now."""
        inv_freq = getattr(self.module, f"{self.prefix}inv_freq")
        return Rope(
            inv_freq,
            getattr(self.module, f"{self.prefix}attention_scaling"),
            interleaved=self.interleaved,
        )

    def embeddings(
        self, like: torch.Tensor, position_ids: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, ...]:
        """cos and sin as the model's own module would make them with the frequencies of `rope`, in
        `like`'s dtype.
        """
        # The model's own module on other frequencies: how cos and sin are laid out is its business.
        # A twin, whose rule is none, or it would put its own frequencies back.
        module = bare(self.module)
        module._buffers[f"{self.prefix}inv_freq"] = rope.inv_freq.to(like.device)
        setattr(module, f"{self.prefix}attention_scaling", rope.attention_scaling)
        kind = module.rope_type
        module.rope_type = (
            {**kind, self.layer_type: "default"} if isinstance(kind, dict) else "default"
        )
        kinds = {"layer_type": self.layer_type} if self.prefix else {}
        cos, sin = module(
            like.new_empty(0, dtype=torch.float32), position_ids.to(like.device), **kinds
        )
        return cos.to(like.dtype), sin.to(like.dtype)


@dataclass
class Layer:
    """One layer: its modules, and its attention as q, k, v, o by head. `attention` is the module
    that calls transformers' attention functions."""

    index: int
    block: nn.Module
    attention: nn.Module
    ffn: nn.Module
    heads: int
    head_dim: int
    family: Family = field(repr=False)
    config: Any = field(repr=False)
    rotary_module: nn.Module | None = field(default=None, repr=False)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        # classes that know no GQA have no such attribute
        groups = getattr(self.attention, "num_key_value_groups", 1)
        return self.heads // groups

    @property
    def attends(self) -> bool:
        """Whether it has an attention at all (`effattn.hf.uneven`)."""
        return self.heads > 0

    @property
    def value_dim(self) -> int:
        """Size of a head's values."""
        return self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that this layer's keys and values of one token take, in the model's dtype; or what
        is remembered instead of them.
        """
        if self.latent is not None:
            return self.latent.rank * self.dtype.itemsize
        return self.kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    @property
    def latent(self) -> LatentMemory | None:
        """What makes the latents that are remembered instead of keys and values; None without."""
        return self.attention._modules.get(LATENT)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values: the weights', or where those are packed (bitsandbytes) that of the
        layer's norms.
        """
        here = chain([self.k.like], self.block.parameters())
        return next(p.dtype for p in here if p.is_floating_point() and p.dtype.itemsize > 1)

    def _module(self, name: str) -> nn.Module:
        path = getattr(self.family, name)
        found = get(self.attention, path)
        return get(self.block, path) if found is None else found

    def _projection(self, name: str, heads: int, order: int) -> Projection:
        module = self._module(name)
        if self.fused == "per_head":
            return Projection(
                module, heads, self.head_dim, order * self.head_dim, 3 * self.head_dim
            )
        # fused and stacked: the rows of q, then of k, then of v
        start = (
            [0, self.heads, self.heads + self.kv_heads][order] * self.head_dim if self.fused else 0
        )
        return Projection(module, heads, self.head_dim, start)

    @property
    def fused(self) -> str | None:
        """How one module holds q, k and v, "stacked" or "per_head"; None where each has its own."""
        if self.family.fused == "multi_query":
            return "stacked" if self.attention.multi_query else "per_head"
        return self.family.fused

    @property
    def q(self) -> Projection:
        """The query projection, a view where it is fused."""
        return self._projection("q", self.heads, 0)

    @property
    def k(self) -> Projection:
        """The key projection, a view where it is fused."""
        return self._projection("k", self.kv_heads, 1)

    @property
    def v(self) -> Projection:
        """The value projection, a view where it is fused."""
        return self._projection("v", self.kv_heads, 2)

    @property
    def o(self) -> Projection:
        """The output projection, from all heads."""
        return Projection(self._module("o"), self.heads, self.head_dim, output=True)

    @property
    def feed_forward(self) -> FeedForward:
        """The FFN by its inner dimensions. Raises Unsupported for mixtures of experts."""
        if not self.family.ffn_in:
            raise Unsupported(
                f"ffn: {self.config.model_type} has experts, which have no inner dimensions in "
                "common"
            )
        inputs = (self.block.get_submodule(path) for path in self.family.ffn_in)
        return FeedForward(tuple(inputs), self.block.get_submodule(self.family.ffn_out))

    @property
    def qkv_modules(self) -> list[nn.Module]:
        """The modules that hold q, k, v and o, each once; of a layer without attention none."""
        if not self.attends:
            return []
        return list(dict.fromkeys(self._module(name) for name in "qkvo"))

    @property
    def qkv_paths(self) -> list[str]:
        """Where q, k and v are from `attention`, each module once."""
        return list(dict.fromkeys(getattr(self.family, name) for name in "qkv"))

    @property
    def q_norm(self) -> nn.Module | None:
        """The norm of queries, None without one."""
        return self._norm(self.family.q_norm)

    @property
    def k_norm(self) -> nn.Module | None:
        """The norm of keys, None without one."""
        return self._norm(self.family.k_norm)

    def _norm(self, name: str) -> nn.Module | None:
        norm = getattr(self.attention, name, None)
        return norm if isinstance(norm, nn.Module) else None

    @property
    def norms(self) -> list[nn.Module]:
        """Every normalisation in the layer that has parameters of its own."""
        found = [
            m for name, m in self.block.named_modules() if "norm" in name.rpartition(".")[2].lower()
        ]
        return [m for m in found if not any(m is not n and m in n.modules() for n in found)]

    @property
    def causal(self) -> bool:
        """Whether a token's attention ends at the token itself."""
        return getattr(self.attention, "is_causal", True) and getattr(
            self.config, "is_causal", True
        )

    @property
    def own_window(self) -> int | None:
        """The window that the layer's own attention has past any length, in tokens; None: full
        attention.
        """
        return sliding_window(self.attention, self.config)

    @property
    def window(self) -> int | None:
        """The layer's own sliding window, for descriptions: None also where no trained sequence
        exceeds it.
        """
        window, length = self.own_window, trained_length(self.config)
        return None if None not in (window, length) and window >= length else window

    @property
    def softcap(self) -> float | None:
        """The cap of the attention scores (Gemma 2); None without one."""
        return getattr(self.config, "attn_logit_softcapping", None)

    @property
    def clip(self) -> float | None:
        """The bound that q, k and v are clipped to after projection (OLMo's clip_qkv); None without
        one.
        """
        return getattr(self.config, "clip_qkv", None)

    @property
    def sinks(self) -> nn.Parameter | None:
        """A learned logit of each query head in its softmax, (H,) (gpt-oss); None without."""
        return getattr(self.attention, "sinks", None)

    @property
    def learned_sinks(self) -> bool:
        """Whether a learned logit per head stands in the softmax."""
        return self.sinks is not None

    @property
    def rotary_dims(self) -> int:
        """How many of a head's dimensions RoPE turns; 0 in layers without RoPE."""
        if not self.attends or not self.family.rotary or no_rope(self.config, self.attention):
            return 0
        return int(self.head_dim * rope_factor(self.config, self.attention))

    @property
    def rotary(self) -> Rotary | None:
        """Where the layer's rotary frequencies are; None in layers without RoPE."""
        return self.rotary_in(self.rotary_module) if self.rotary_dims else None

    def rotary_in(self, module: nn.Module) -> Rotary:
        """Where they are in another rotary module of the same class."""
        kind = (getattr(self.config, "layer_types", None) or [""] * (self.index + 1))[self.index]
        prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
        return Rotary(module, prefix, self.family.interleaved)

    def rotary_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row indices inside a head of the real and the imaginary part of each frequency, (R/2,)
        each.
        """
        dims = torch.arange(self.rotary_dims)
        if self.family.interleaved:
            return dims[0::2], dims[1::2]
        return dims[: len(dims) // 2], dims[len(dims) // 2 :]

    @torch.no_grad()
    def set_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> None:
        """Writes new projections, possibly with fewer KV heads. The module objects stay, so hooks
        stay on.

        q (H, d, D + 1), k and v (K', d, D + 1) with the bias as last column; o (H, D, d).
        """
        if self.family.fused == "per_head":
            raise Unsupported(f"{self.config.model_type}: {self.family.gqa}")
        kv_heads = k.shape[0]
        if self.family.fused == "multi_query":
            assert kv_heads == 1  # `Anatomy.check_kv_heads` has refused others
            size = {"multi_query": True, "kv_heads": 1, "kv_dim": self.head_dim}
            vars(self.attention).update(size)
        new = {"q": q, "k": k, "v": v}
        if self.family.fused:
            set_linear(
                self.q.module,
                torch.cat([part.reshape(-1, part.shape[-1]) for part in new.values()]),
            )
        else:
            for name, part in new.items():
                set_linear(self._module(name), part.reshape(-1, part.shape[-1]))
        self.o.module.weight.copy_(rearrange(o, "h D d -> D (h d)"))
        self.attention.num_key_value_groups = self.heads // kv_heads
        if hasattr(self.attention, "num_key_value_heads"):
            self.attention.num_key_value_heads = kv_heads

    @torch.no_grad()
    def merge_norms(self, queries: list[int], groups: list[list[int]]) -> None:
        """Moves per-head query norms into the order `queries`, and gives each group of KV heads the
        mean of its key norms. Norms that all heads share stay as they are. Call before
        `set_heads`."""
        for norm, size, pick in (
            (self.q_norm, self.heads, queries),
            (self.k_norm, self.kv_heads, groups),
        ):
            if norm is None:
                continue
            if hasattr(norm, "norms"):  # one module a head (StableLM)
                parts = list(norm.norms)
                for name, _ in parts[0].named_parameters():
                    stacked = _pick(torch.stack([getattr(part, name) for part in parts]), pick)
                    for part, value in zip(parts, stacked, strict=False):
                        getattr(part, name).copy_(value)
                norm.norms = nn.ModuleList(parts[: len(pick)])
                norm.num_heads = len(pick)
                continue
            for name, old in list(norm.named_parameters()):
                if old.numel() != size * self.head_dim or size * self.head_dim == self.head_dim:
                    continue  # shared by all heads
                new = _pick(old.view(size, self.head_dim), pick)
                new = new.reshape(-1) if old.dim() == 1 else new
                setattr(norm, name, nn.Parameter(new.contiguous(), requires_grad=old.requires_grad))


def _pick(per_head: torch.Tensor, pick: list) -> torch.Tensor:
    """Rows of (heads, ...) in the order `pick`; where an entry is a list of heads, their mean."""
    return torch.stack(
        [per_head[entry].mean(0) if isinstance(entry, list) else per_head[entry] for entry in pick]
    )


def get(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`; None without one, or without a path."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module
