"""The one place that knows how a transformers model is built.

    for layer in anatomy.of(model).layers:
        layer.k.by_head            # (kv_heads, head_dim, hidden), a view of the layer's own weight

Everything that converts, prunes, swaps or costs a model goes through it. What differs between
architectures is a line each in `effattn.hf.families`.

Shapes: D hidden size, H query heads, K key/value heads, d head size, R rotary dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from effattn.errors import Unsupported
from effattn.hf import refusals
from effattn.hf.adapters import require_unwrapped
from effattn.hf.families import ENCODERS as ENCODERS
from effattn.hf.families import FAMILIES as FAMILIES
from effattn.hf.families import trained_length
from effattn.hf.layer import Layer as Layer
from effattn.hf.layer import Rotary as Rotary
from effattn.hf.layer import get
from effattn.hf.packing import steady
from effattn.hf.placement import inside


@dataclass
class Anatomy:
    """A whole model. `layers` are in order; `head` is None when the output embedding is the
    input's.
    """

    model: PreTrainedModel
    config: Any
    family: str
    layers: list[Layer]
    embeddings: nn.Embedding
    head: nn.Module | None
    final_norm: nn.Module | None
    positions: nn.Module | None = None  # the table of learned positions

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def heads(self) -> int:
        """Query heads of the first layer."""
        return self.layers[0].heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the first layer."""
        return self.layers[0].kv_heads

    @property
    def head_dim(self) -> int:
        """Head size of the first layer."""
        return self.layers[0].head_dim

    @property
    def trained_length(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None where its config does
        not say."""
        return trained_length(self.config)

    @property
    def causal(self) -> bool:
        """Whether the model can generate: no token sees a later one."""
        return all(layer.causal for layer in self.layers)

    @property
    def predicts_next(self) -> bool:
        """Whether it gives logits of next tokens: no encoder, no classifier, no model without a
        head.
        """
        return self.causal and self.model.get_output_embeddings() is not None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from the final norm's output (..., D): the head and what the class does
        after it.
        """
        # the head by its own code: its weight may be packed, or elsewhere; then what the classes do
        # in their own forward, which has no name of its own
        head = self.model.get_output_embeddings()
        logits = (
            nn.functional.linear(hidden, self.embeddings.weight) if head is None else head(hidden)
        )
        if getattr(self.config, "logit_scale", None) is not None:  # Cohere
            logits = logits * self.config.logit_scale
        if getattr(self.config, "logits_scaling", None) is not None:  # Granite
            logits = logits / self.config.logits_scaling
        cap = getattr(self.config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def require_gqa(self) -> None:
        """Raises Unsupported unless plain transformers can hold fewer KV heads for this class, and
        its heads can be merged: they are rows of a weight."""
        reason = self.layers[0].family.gqa
        if len({(layer.heads, layer.kv_heads) for layer in self.layers}) > 1:
            reason = "its layers differ in theirs"
        if reason:
            raise Unsupported(f"{type(self.model).__name__} cannot have fewer KV heads: {reason}")
        for layer in self.layers:
            for projection in (layer.q, layer.k, layer.v, layer.o):
                projection.by_head  # noqa: B018 - raises where there is none

    def check_kv_heads(self, kv_heads: int) -> None:
        """Raises Unsupported for a number of KV heads that the class cannot hold."""
        if self.layers[0].family.fused == "multi_query" and kv_heads not in (1, self.kv_heads):
            raise Unsupported(
                f"{type(self.model).__name__} cannot have {kv_heads} KV heads: it holds all "
                f"{self.heads}, or one (multi_query); valid is 1"
            )

    def kv_fields(self, kv_heads: int) -> dict[str, object]:
        """What a config says of KV heads, and of the head size, explicitly."""
        if self.layers[0].family.fused == "multi_query":
            return {"multi_query": kv_heads == 1, "num_key_value_heads": kv_heads}
        return {"num_key_value_heads": kv_heads, "head_dim": self.head_dim}

    def set_kv_heads(self, kv_heads: int) -> None:
        """Writes the KV heads into the config."""
        for name, value in self.kv_fields(kv_heads).items():
            setattr(self.config, name, value)


def of(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers causal LM, or of an encoder (with any head, or none).

    Raises Unsupported, naming the class, for unknown ones.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: what is read is the same
    require_unwrapped(model)
    config, family = refusals.family_of(model)
    blocks = get(model.base_model if family.encoder else model, family.layers)
    if blocks is None:
        raise refusals.headless(model, config)
    rotary = inside(get(model, family.rotary)) if family.rotary else None
    layers = []
    for index, block in enumerate(blocks):
        attention = inside(get(block, family.attention))
        # layers that differ have configs of their own
        heads = getattr(attention, "config", config).num_attention_heads
        parts = [getattr(block, name) for name in family.ffn]
        ffn = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
        names = ("head_dim", "head_size", "attention_head_size")
        head_dim = next(size for name in names if (size := getattr(attention, name, None)))
        layers.append(Layer(index, block, attention, ffn, heads, head_dim, family, config, rotary))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    steady(model)  # from here on bitsandbytes rearranges no weight that is read
    final_norm, positions = (get(model, path) for path in (family.final_norm, family.positions))
    return Anatomy(
        model,
        config,
        config.model_type,
        layers,
        embeddings,
        None if tied else head,
        final_norm,
        positions,
    )
