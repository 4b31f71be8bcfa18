"""Checkpoints with the conventions that vLLM's loader reads. No server runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from effattn.embedded import corpus
from effattn.encoding import encode
from effattn.errors import Unsupported
from effattn.exporting import kv_scales, plain, vllm_layers
from effattn.exporting.targets.base import Source, Target, register
from effattn.hf import anatomy, uneven


@register("vllm")
class Vllm(Target):
    """A folder of a class that vLLM's sources list; layers that differ as `block_configs`."""

    caches = (kv_scales.FORMAT,)

    @classmethod
    def require(cls, check: bool) -> None:
        if check:
            raise Unsupported("check: vLLM is not run by effattn; valid is check=False")

    @classmethod
    def adapt(cls, model: nn.Module) -> tuple[nn.Module, list[str]]:
        # vLLM's own classes of Qwen refuse windows in some layers
        return plain.windows(model) if model.config.model_type == "llama" else (model, [])

    @classmethod
    def refuse(cls, source: Source, format: str | None) -> None:
        parts = anatomy.of(source.model)
        plain.check_vllm(parts)
        vllm_layers.check(parts)
        if source.kv_cache is not None:
            kv_scales.check(parts, source.kv_skip)
        source.notes += plain.notes_for_vllm(parts)

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        parts = anatomy.of(source.model)
        config: dict[str, Any] | None = None
        added: dict[str, Tensor] = {}
        state: dict[str, Tensor] | None = None
        if source.kv_cache is not None:
            added = kv_scales.measure(source.model, _text(source), source.kv_skip)
            source.notes.append(f"serve it with {kv_scales.command(source.kv_skip)}")
        if uneven.overrides(parts.config):
            config = vllm_layers.config_of(parts)
            heads = config["num_attention_heads"]
            state, zeros = vllm_layers.padded(parts, heads)
            source.notes.append(
                f"layers that differ are block_configs of vLLM's AnyModel, which DeciLM reads too; "
                f"{zeros} of {heads * len(parts.layers)} query heads are zeros"
            )
        plain.write(source.model, source.tokenizer, folder, config, state, added)
        if added:
            _say_scheme(folder)


def _text(source: Source) -> Tensor:
    """Tokens whose keys and values scales are made of: those given, or Python's sources."""
    if callable(source.calibration):
        return source.calibration(source.tokenizer)
    if source.calibration is not None:
        return source.calibration
    documents = (text for _, text in corpus.documents("train"))
    return encode(documents, source.tokenizer, kv_scales.TOKENS)


def _say_scheme(folder: Path) -> None:
    file = folder / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    said["quantization_config"] = kv_scales.SCHEME
    file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
