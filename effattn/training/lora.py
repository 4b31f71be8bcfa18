"""Low-rank adapters on the attention projections while distilling, by peft, and merged into the
weights afterwards.
"""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager

import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.adapters import merge
from effattn.training.lending import Settings


def check_peft() -> None:
    """Unsupported without peft."""
    if importlib.util.find_spec("peft") is None:
        raise Unsupported(
            "lora: peft is not installed; pip install 'effattn[lora]', or leave out --lora"
        )


@contextmanager
def adapters(model: nn.Module, rank: int, plus: bool = False):
    """Puts LoRA (arXiv:2106.09685) of `rank` on q, k, v and o of every layer; yields the parameters
    to train: the adapters', in fp32 or more, and those of the backends; all others are frozen. On
    leaving, the adapters are merged: the model has its own modules and flags again.

    plus: the norms and the embeddings are trained, too, LongLoRA's LoRA+ (arXiv:2309.12307, section
    3.3), with which long contexts are learned where adapters alone fall short."""
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    targets = {
        module
        for layer in hf.of(model)
        for module in (layer.q.module, layer.k.module, layer.v.module, layer.o.module)
    }
    names = [name for name, module in model.named_modules() if module in targets]
    settings, others = Settings(model), set(norms_and_embeddings(model)) if plus else set()
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    try:
        trained = []
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(
                    torch.promote_types(parameter.dtype, torch.float32)
                )
            learned = parameter in others or hooks.PATTERN in name.split(".")
            if "lora_" in name or learned:
                trained.append(parameter.requires_grad_(True))
        yield trained
    finally:
        merge(model)  # ValueError for what a weight's dtype cannot hold
        settings.put_back()


def norms_and_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """What LoRA+ trains beside the adapters: the norms' gains and biases, the token embeddings."""
    norms = [one for one in model.modules() if "norm" in type(one).__name__.lower()]
    return [
        parameter
        for module in (*norms, hf.of(model).embeddings)
        for parameter in module.parameters(recurse=False)
    ]
