"""`rehost`: a new model of another class that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.evaluate.loss import kl_chunked
from effattn.hf.adapters import require_own_weights, require_unwrapped
from effattn.hf.beginning import SETTLED
from effattn.hf.placement import check_finite, input_device, require_here
from effattn.hf.verify import TOLERANCE
from effattn.hf.weights import packing
from effattn.rehosting.base import COMMON, HOSTS, Host
from effattn.surgery import swapping


@torch.no_grad()
def rehost(model: nn.Module, progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """A new model of a class that can hold fewer key/value heads, with the logits of `model`, which
    is not changed: GPT-NeoX (Pythia) and GPT-J become Phi, OPT and GPT-2 become GPTBigCode.

    Same dtype, device, mode and generation settings. fp64 and fp32 weights give the same logits but
    for rounding; where norms' gains go into weights of half precision (GPT-NeoX), these are rounded
    once more. Padding on the left needs position_ids with GPTBigCode, which `generate()` gives.
    progress: called with (layers done, layers).

    Raises Unsupported, naming the reason and what can be re-hosted, for all other models; for one
    that is swapped, whose weights are packed or not all here, and for settings that the other class
    does not have."""
    require_unwrapped(model)
    require_own_weights(model)
    host = host_of(model)
    require_here(model, "rehost")
    check_finite(model)
    old = model.config
    config: Any = transformers.AutoConfig.for_model(host.to, **_said(host, old))
    cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [cls.__name__]
    state = state_of(host, model, progress)
    new = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype, ignore_mismatched_sizes=False
    )
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    new.config._name_or_path = old._name_or_path
    if hasattr(model, SETTLED):
        setattr(new, SETTLED, getattr(model, SETTLED))
    return new.to(model.device).train(model.training)


def host_of(model: nn.Module) -> type[Host]:
    """What a model's type becomes. Unsupported, with the reason, for a model that cannot become
    it."""
    kind, name = getattr(getattr(model, "config", None), "model_type", None), type(model).__name__
    hosts = HOSTS.members()
    can = ", ".join(f"{one} (to {host.to})" for one, host in hosts.items())
    if kind not in hosts:
        raise Unsupported(f"rehost: {name} ({kind}) has no other class; those that have: {can}")
    expected = transformers.AutoModelForCausalLM._model_mapping[type(model.config)]
    if not isinstance(model, expected):
        raise Unsupported(f"rehost: got {name}, valid is the causal LM, {expected.__name__}")
    if reason := hosts[kind].refuses(model.config):
        raise Unsupported(f"rehost: this {name} cannot become {hosts[kind].to}: {reason}")
    if swapping.active(model) is not None:
        raise Unsupported(
            f"rehost: {name} is swapped: effattn.restore(model) first, and swap what comes out"
        )
    if any(packing(module) for module in model.modules()):
        raise Unsupported(f"rehost: {name} has quantized weights; valid are the model's own")
    return hosts[kind]


def state_of(
    host: type[Host], model: Any, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """The new model's state_dict."""
    blocks = model.get_submodule(host.layers)
    state = dict(host.outside(model))
    for index, block in enumerate(blocks):
        found = host.layer(block, model.config)
        state |= {f"{host.to_layers}.{index}.{name}": tensor for name, tensor in found.items()}
        if progress:
            progress(index + 1, len(blocks))
    # of its own memory each: views of the old model's would be written into with it
    own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        own.pop("lm_head.weight")
    return own


def _said(host: type[Host], old: Any) -> dict:
    common = {name: getattr(old, name) for name in COMMON if hasattr(old, name)}
    return common | {"dtype": old.dtype} | host.config(old)


@torch.no_grad()
def compared(
    old: nn.Module,
    new: nn.Module,
    tokens: Tensor,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """How far the logits of `new` are from those of `old` on tokens (N,) int64, in windows of
    `length`: {"tokens", "max_difference", "max" (the largest of the old ones), "kl" (nats a
    token)}.

    RuntimeError when they are further apart than rounding in the weights' dtype explains."""
    device, windows = input_device(new), tokens.split(length)
    worst = largest = divergence = 0.0
    for number, ids in enumerate(windows):
        ours, theirs = (
            one(input_ids=ids[None].to(device), use_cache=False).logits[0].double()
            for one in (new, old)
        )
        worst = max(worst, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        divergence += float(kl_chunked(theirs, ours).sum())
        if progress:
            progress(number + 1, len(windows))
    limit = TOLERANCE[new.dtype.itemsize] * largest
    if not worst <= limit:
        raise RuntimeError(
            f"rehost: the new model gives other logits (largest difference {worst:.3g} > "
            f"{limit:.3g})"
        )
    kl = max(divergence / len(tokens), 0.0)
    return {"tokens": len(tokens), "max_difference": worst, "max": largest, "kl": kl}
