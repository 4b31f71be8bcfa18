"""What a model type becomes, and what its file says of it.

    @register("gptj")
    class GptJ(Host): ...        # of models whose model_type is "gptj"

D: hidden size; H: heads; d: size of a head; F: inner size of the FFN; V: vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effattn.axes import Axis

Weights = dict[str, Tensor]  # by the new class's names

# What a config says of text and training, whatever the class.
COMMON = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
)


class Host:
    """How models of one type become models of another class. Each function is asked with the old
    model or its config alone."""

    name: ClassVar[str]  # set by `register`
    layers: ClassVar[str]  # where its layers are
    to: ClassVar[str]  # the model type of what comes out
    to_layers: ClassVar[str]  # and where that has its layers

    @classmethod
    def refuses(cls, config: Any) -> str:
        """Why a model of this config cannot become one; empty: it can."""
        return ""

    @classmethod
    def config(cls, config: Any) -> dict:
        """What the new config says beside what `COMMON` names."""
        raise NotImplementedError

    @classmethod
    def outside(cls, model: Any) -> Weights:
        """The weights around the layers."""
        raise NotImplementedError

    @classmethod
    def layer(cls, block: nn.Module, config: Any) -> Weights:
        """The weights of one layer, by their names in it."""
        raise NotImplementedError


HOSTS: Axis[Host] = Axis("model", "host", "effattn.rehosting.hosts")
register: Callable = HOSTS.register


def linear(name: str, weight: Tensor, bias: Tensor | None = None) -> Weights:
    """A linear module's weights; a bias of zeros where the old one had none."""
    zeros = weight.new_zeros(len(weight))
    return {f"{name}.weight": weight, f"{name}.bias": zeros if bias is None else bias}


def copied(name: str, module: nn.Module) -> Weights:
    """A module's weights as they are, with zeros for a bias that it has not."""
    return linear(name, module.weight, module.bias)


def norm(name: str, module: nn.LayerNorm) -> Weights:
    """A LayerNorm's weights; of one without gains, ones and zeros."""
    like = dict(dtype=module.weight.dtype) if module.weight is not None else {}
    ones = torch.ones(module.normalized_shape, **like)
    return {
        f"{name}.weight": ones if module.weight is None else module.weight,
        f"{name}.bias": torch.zeros_like(ones) if module.bias is None else module.bias,
    }


def folded(weight: Tensor, bias: Tensor | None, before: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """W (n, D) and b (n,) of what follows a LayerNorm, on its input without gains: W diag(g) and
    b + W beta, computed in fp64 and rounded once to W's dtype."""
    wide = weight.detach().double()
    new = torch.zeros(len(wide), dtype=wide.dtype, device=wide.device)
    new = new if bias is None else bias.detach().double()
    if before.bias is not None:
        new = new + wide @ before.bias.detach().double()
    if before.weight is not None:
        wide = wide * before.weight.detach().double()
    return wide.to(weight.dtype), new.to(weight.dtype)
