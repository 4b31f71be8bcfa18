"""`attn_implementation="effattn:sliding(window=512, sinks=4)"`: a swap of all layers' pattern, by
name, wherever transformers takes the name of an attention.

    AutoModelForCausalLM.from_pretrained(name, attn_implementation="effattn:sliding(window=512)")
    model.set_attn_implementation("effattn:lsh(rounds=4)")
    effattn.restore(model)                         # and back

transformers' table of attentions holds names, and these have options: the two methods that take
one are wrapped. Every other name goes through as it is."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from effattn.hf import names

PREFIX = "effattn:"
WRAPPED = "_effattn_wrapped"
DIFFERS = "per_layer_config"  # in config.json
SOURCE = "pretrained_model_name_or_path"


def spec_of(name: Any) -> str | None:
    """The pattern in the name of an attention; None where it is another's name."""
    is_ours = isinstance(name, str) and name.startswith(PREFIX)
    return name.removeprefix(PREFIX) if is_ours else None


def register() -> None:
    """Makes the names known to transformers' models."""
    from transformers import modeling_utils

    cls: Any = modeling_utils.PreTrainedModel
    if hasattr(cls, WRAPPED):
        return
    setattr(cls, WRAPPED, True)
    cls.from_pretrained = classmethod(_loading(cls.from_pretrained.__func__))
    cls.set_attn_implementation = _setting(cls.set_attn_implementation)


def _loading(load):
    """`from_pretrained`, which swaps what it has loaded where it is asked for one of our names."""

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        config, asked = kwargs.get("config"), kwargs.get("attn_implementation")
        spec = spec_of(asked)
        # an Auto class has put the name into the configuration that it has read
        if spec is None and (spec := spec_of(getattr(config, "_attn_implementation", None))):
            config._attn_implementation = None
        _build_layers(cls, config)
        if config is None and not hasattr(cls, "builds_layers"):
            _name_method(args[0] if args else kwargs.get(SOURCE), kwargs)
        if spec is None:
            return load(cls, *args, **kwargs)
        kwargs.pop("attn_implementation", None)
        _check(spec)
        found = load(cls, *args, **kwargs)
        _swap(found[0] if isinstance(found, tuple) else found, spec)
        return found

    return from_pretrained


def _build_layers(cls, config) -> None:
    """Has layers that differ built by effattn where the config says so and nobody is named that
    does it: transformers' own `save_pretrained` of such a model names no method."""
    differ = getattr(config, "__dict__", {}).get(names.DIFFER)
    method = getattr(config, "quantization_config", None)
    if differ is not None and method is None and not hasattr(cls, "builds_layers"):
        config.quantization_config = dict(names.METHOD)


def _name_method(source: Any, kwargs: dict[str, Any]) -> None:
    """The same, as an argument, where a class by itself reads the configuration of a folder."""
    if "quantization_config" in kwargs or not isinstance(source, str | os.PathLike):
        return
    file = Path(source, kwargs.get("subfolder") or "", "config.json")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what is wrong with it transformers says
        return
    if isinstance(read, dict) and DIFFERS in read and "quantization_config" not in read:
        from effattn.plugin.method import EffattnQuantizationConfig

        kwargs["quantization_config"] = EffattnQuantizationConfig()


def _setting(set_implementation):
    """`set_attn_implementation`, which swaps where it is given one of our names."""

    @functools.wraps(set_implementation)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        spec = spec_of(attn_implementation)
        if spec is None:
            return set_implementation(self, attn_implementation, *args, **kwargs)
        return _swap(self, spec)

    return set_attn_implementation


def _check(spec: str) -> None:
    """ValueError for a pattern that there is not, before anything is loaded."""
    from effattn import registry

    registry.backend(spec)


def _swap(model, spec: str) -> None:
    from effattn.surgery import swapping

    swapping.swap(model, spec)
