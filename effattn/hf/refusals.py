"""Which models `effattn.hf.anatomy` reads, and what to give instead of one that it does not."""

from __future__ import annotations

import difflib
import re

from torch import nn
from transformers import PreTrainedModel

from effattn.errors import Unsupported
from effattn.hf.families import ENCODERS, FAMILIES, REFUSED, Family


def family_of(model: nn.Module) -> tuple[object, Family]:
    """(text config, family) of a transformers model. Raises Unsupported with what to give
    instead.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(f"model: got {name}, {_inside(model)}")
    config = model.config.get_text_config()
    kind = config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{name} ({kind}) is not supported: it is an encoder-decoder model, valid are causal "
            "LMs and encoders"
        )
    if kind in FAMILIES and getattr(config, "add_cross_attention", False):
        raise Unsupported(
            f"{name} ({kind}) is not supported: it attends to an encoder (add_cross_attention), "
            "valid are causal LMs by themselves"
        )
    if kind in REFUSED:
        raise Unsupported(f"{name} ({kind}) is not supported: {REFUSED[kind]}")
    known = FAMILIES | ENCODERS
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise Unsupported(
            f"{name} ({kind}) is not supported{f'; the nearest is {near[0]}' if near else ''}; "
            f"supported are {', '.join(sorted(known))}"
        )
    return config, known[kind]


def headless(model: PreTrainedModel, config) -> Unsupported:
    """The error for a model of a known family whose layers are not where its causal LM has them.
    config: its text config. It can be put into a causal LM, which then shares its modules."""
    name = type(model).__name__
    if config is model.config:
        why, its_config, part = "it has no output head", "model.config", "model"
    else:
        why, its_config = "its language model is one part of it", "model.config.get_text_config()"
        part = f"model.{_path(model, lambda one: one.config is config)}"
    head = (
        "; lm.lm_head = model.lm_head"
        if isinstance(getattr(model, "lm_head", None), nn.Module)
        else ""
    )
    return Unsupported(
        f"model: got {name}, {why}, valid is a causal LM (AutoModelForCausalLM); made of the same "
        f"modules: lm = transformers.AutoModelForCausalLM.from_config({its_config}); "
        f"lm.{_prefix(model, config)} = {part}{head}; effattn.swap(lm, ...) changes {name} too"
    )


def _prefix(model: PreTrainedModel, config) -> str:
    """What a causal LM calls its model without a head."""
    inner = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part.config is config
    ]
    return inner[-1].base_model_prefix


def _path(model, wanted) -> str | None:
    """Where the first transformers model that is `wanted` lies in a module; None without one."""
    parts = model.named_modules() if isinstance(model, nn.Module) else []
    return next(
        (
            path
            for path, part in parts
            if path and isinstance(part, PreTrainedModel) and wanted(part)
        ),
        None,
    )


def _inside(model) -> str:
    """What to give instead of something that is no transformers model: the one inside it, if there
    is one.
    """
    if hasattr(model, "get_base_model"):  # PEFT's own way to it
        return "which wraps a transformers model; valid is that one: model.get_base_model()"
    if isinstance(getattr(model, "model", None), PreTrainedModel) and not isinstance(
        model, nn.Module
    ):
        # a pipeline, a Trainer
        return "which holds a transformers model; valid is that one: its .model"
    path = _path(model, lambda one: True)
    if path is not None:
        place = f"get_submodule({path!r})" if re.search(r"\b\d", path) else path
        return f"which wraps a transformers model; valid is that one: model.{place}"
    if isinstance(model, str):
        return f"valid is a loaded model: effattn.load({model!r})"
    return "valid is a transformers causal LM or encoder, not one that was traced or exported"
