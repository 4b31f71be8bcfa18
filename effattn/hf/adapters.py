"""Modules whose weight is not what they compute with: adapters, parametrizations, masks.

    require_own_weights(model)          # one line before anything is changed, or nothing
    merge(model)                        # LoRA, DoRA, IA3 (peft) into the weights, in place

Whatever reads weights and writes others (heads, projections, pruning, rotation, quantization,
checkpoints) would take such a part for the whole: what an adapter adds would be lost, or counted
twice."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from effattn.errors import Unsupported

_MERGE = "effattn.hf.adapters.merge(model)"


def require_own_weights(model: nn.Module) -> None:
    """Unsupported, in one line that names the first module and what to do, for wrapped models
    (`require_unwrapped`), compiled parts, adapters that are not merged (LoRA, DoRA, IA3, ...),
    parametrizations (weight_norm, spectral_norm) and the masks of torch.nn.utils.prune."""
    require_unwrapped(model)
    for name, module in model.named_modules():
        if reason := _compiled(name, module) or _adapter(module) or _parametrization(module):
            # "peft Linear"
            kind = f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"
            raise Unsupported(f"{type(model).__name__}: {name} ({kind}) {reason}")


def require_unwrapped(model: nn.Module) -> None:
    """Unsupported, naming the model inside, for what peft, torch.compile and data parallelism put
    around models.
    """
    kind = type(model).__name__
    if hasattr(model, "peft_type") and hasattr(model, "get_base_model"):
        raise Unsupported(
            f"model: got {kind} (peft), valid is the transformers model inside: "
            "model.merge_and_unload(), which merges its adapters; or, to swap patterns, positions "
            "or caches below them, model.get_base_model()"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise Unsupported(
            f"model: got {kind} (torch.compile), valid is the model inside, model._orig_mod; "
            "compile last"
        )
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise Unsupported(
            f"model: got {kind}, valid is the transformers model inside: model.module"
        )


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of peft's, around the model's own."""
    return any(
        isinstance(module._modules.get(name), nn.Module)
        for name in ("base_layer", "original_module")
    )


def _compiled(name: str, module: nn.Module) -> str | None:
    """Why a part in torch.compile's wrapper is none of the model's own; None for others."""
    if isinstance(module._modules.get("_orig_mod"), nn.Module):
        return (
            f"is compiled, put its own back and compile last: model.set_submodule({name!r}, "
            "module._orig_mod)"
        )
    return None


def _adapter(module: nn.Module) -> str | None:
    """Why a module of peft's is no plain one; None for others."""
    if not is_adapted(module):
        return None
    return f"has an adapter beside its weight, merge it first: {_MERGE}"


def _parametrization(module: nn.Module) -> str | None:
    """Why a weight is computed from others; None where it is a parameter."""
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"has a parametrized {name}, valid is one of its own: {remedy}"
    # torch's older ways keep a weight's parts under its name and a suffix
    own = module._parameters
    for name in {name.rpartition("_")[0] for name in own} - own.keys():
        if f"{name}_orig" in own and f"{name}_mask" in module._buffers:
            return (
                f"has a mask on its {name}, make it part of it first: "
                f"torch.nn.utils.prune.remove(module, {name!r})"
            )
        if f"{name}_g" in own and f"{name}_v" in own and hasattr(module, name):
            remedy = f"torch.nn.utils.remove_weight_norm(module, {name!r})"
            return f"has a weight-normed {name}, valid is one of its own: {remedy}"
        if f"{name}_orig" in own and f"{name}_u" in module._buffers:
            remedy = f"torch.nn.utils.remove_spectral_norm(module, {name!r})"
            return f"has a spectral-normed {name}, valid is one of its own: {remedy}"
    return None


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Merges peft's adapters into the weights, in place: the model has its own modules again, and
    is saved whole.

    model: one that adapters were added to (`add_adapter`, `inject_adapter_in_model`); of a
    PeftModel, `merge_and_unload` does this. Unsupported, before anything is changed, for adapters
    that no weight can hold; ValueError when a merged weight is not finite in its dtype. Returns the
    model."""
    # all checks first; then what wraps another wrapped module is merged after it, and the outermost
    # is replaced by what is inside it
    require_unwrapped(model)
    found = {name: module for name, module in model.named_modules() if is_adapted(module)}
    for name, module in found.items():
        if "base_layer" in module._modules and not hasattr(module, "merge"):
            raise Unsupported(
                f"{name}: {type(module).__name__} cannot be merged into a weight; delete the "
                "adapter"
            )
    _untie(model, found)
    for module in reversed(found.values()):  # those inside first
        if "base_layer" in module._modules:
            _settle(module)
    for name, module in found.items():
        if not any(name.startswith(f"{other}.") for other in found):
            model.set_submodule(name, _own(module))
    vars(model).pop("_hf_peft_config_loaded", None)  # transformers would save the adapters alone
    vars(model).pop("peft_config", None)
    return model


def _untie(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Gives adapted embeddings that share their weight one of their own: the adapter is for one of
    the two.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [end for end in ends if any(end is module for module in found.values())]
    if None in ends or not adapted or ends[0].weight is not ends[1].weight:
        return
    for end in adapted:
        base = end.get_base_layer() if "base_layer" in end._modules else end.original_module
        base.weight = nn.Parameter(
            base.weight.detach().clone(), requires_grad=base.weight.requires_grad
        )
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _settle(module: nn.Module) -> None:
    """Makes the wrapped module's weight what is computed now: with the active adapters, or where
    they are switched off without."""
    if not module.disable_adapters:
        module.merge(safe_merge=True)
    elif module.merged:
        module.unmerge()


def _own(module: nn.Module) -> nn.Module:
    """The module that stays of a merged one of peft's."""
    if "original_module" in module._modules:
        switched_off = module.disable_adapters or not module.active_adapters
        return (
            module.original_module
            if switched_off
            else module.modules_to_save[module.active_adapters[0]]
        )
    return module.get_base_layer()
