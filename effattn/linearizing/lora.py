"""Low-rank adapters on the attention projections while distilling, by peft, and merged into the weights afterwards."""

from __future__ import annotations

from contextlib import contextmanager

from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.adapters import merge


@contextmanager
def adapters(model: nn.Module, rank: int):
    """Puts LoRA (arXiv:2106.09685) of `rank` on q, k, v and o of every layer; yields the parameters to train: the
    adapters', and those of the backends. On leaving, the adapters are merged: the model has its own modules again."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise Unsupported("lora: peft is not installed; pip install 'effattn[lora]', or leave out --lora") from None
    targets = {module for layer in hf.of(model) for module in (layer.q.module, layer.k.module, layer.v.module,
                                                               layer.o.module)}  # fmt: skip
    names = [name for name, module in model.named_modules() if module in targets]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    try:
        yield [p for name, p in model.named_parameters() if "lora_" in name or hooks.PATTERN in name.split(".")]
    finally:
        merge(model)
