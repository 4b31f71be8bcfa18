"""Exports that are plain checkpoints: for transformers where effattn is not installed, and for
servers that read such folders.

A window in some layers, without sinks, is what some classes do by `layer_types`: a swapped Llama
becomes a Ministral, which has the same weights and honours it. (A Llama whose config says
`layer_types` gets caches of that window under a mask that has none: that is never written.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy, loading, verify
from effattn.specs import parse_spec
from effattn.surgery import record
from effattn.surgery.swapping import restore

FULL, SLIDING = "full_attention", "sliding_attention"
# who honours `layer_types`: itself, or the class that has the same weights
HONOURS = {"llama": "ministral", "qwen2": "qwen2", "qwen3": "qwen3"}
# what vLLM's own classes read, as its sources list them
SERVED = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
)
SERVED += ("granite", "stablelm", "starcoder2", "phi", "gpt_neox", "opt", "mixtral", "qwen3_moe")
TILE = 256  # FFN dimensions that servers' kernels take at a time
VERIFIED = 64  # tokens whose logits are compared


def windows(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model, restored and of a class that does its windows by itself where its swap is windows
    alone; and what was done, in words. As it is, without words, where it is not so."""
    said = record.of(model)
    found = _windows_of(said.get("pattern", {})) if said.keys() == {"pattern"} else None
    kind = HONOURS.get(model.config.model_type)
    if found is None or kind is None:
        return model, []
    layers, window = found
    config = model.config
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if kind == "ministral" and biased:
        return model, []
    restore(model)
    fields = config.to_dict() | {
        "model_type": kind,
        "sliding_window": window,
        "layer_types": [
            SLIDING if index in layers else FULL for index in range(config.num_hidden_layers)
        ],
        "use_sliding_window": True,
        "architectures": None,
    }
    # what Qwen derives its own list from, were there none
    fields |= {"max_window_layers": 0} if kind != "ministral" else {}
    new = _built(model, kind, fields)
    return new, [f"windows of {window} in {len(layers)} layers are {type(new).__name__}'s own"]


def _windows_of(specs: dict[str, str]) -> tuple[set[int], int] | None:
    """The layers with a window, and the window, where that is all that differs; else None."""
    parsed = {int(index): parse_spec(spec) for index, spec in specs.items()}
    sizes = {options.get("window") for _, options in parsed.values()}
    alone = all(
        name == "sliding" and not {key for key in options if options[key]} - {"window", "impl"}
        for name, options in parsed.values()
    )
    return (set(parsed), sizes.pop()) if parsed and alone and len(sizes) == 1 else None


def _built(model: nn.Module, kind: str, fields: dict[str, Any]) -> nn.Module:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind].from_dict(fields)
    if model.get_input_embeddings().weight.is_meta:  # an outline has no numbers to take over
        return loading.empty(config)
    new = loading.from_state(loading.class_of(config), config, model.state_dict(), model.dtype)
    new.generation_config = model.generation_config
    return new


def check_vllm(parts: anatomy.Anatomy) -> None:
    """Unsupported for a class that vLLM has not."""
    if parts.family not in SERVED:
        raise Unsupported(
            f"vllm: {type(parts.model).__name__} ({parts.family}) is none of the classes that "
            f"vLLM's sources list; valid are {', '.join(SERVED)}"
        )


def notes_for_vllm(parts: anatomy.Anatomy) -> list[str]:
    """What someone who serves it should know, in words."""
    said = ["no server was run: what vLLM makes of it is read from its sources"]
    heads = parts.kv_heads
    said.append(f"tensor parallelism: a size that divides {heads} K/V heads, or is a multiple")
    if parts.family == "ministral":
        said.append("vLLM's Transformers backend serves it, whose masks follow layer_types")
    if parts.layers[0].family.ffn_in and parts.layers[0].feed_forward.size % TILE:
        said.append(f"its FFN is no multiple of {TILE}, which kernels are slower for")
    return said


def write(
    model: nn.Module,
    tokenizer,
    folder: Path,
    config: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
    added: dict[str, Tensor] | None = None,
) -> None:
    """Writes the checkpoint as transformers does. config, state: other settings and weights than
    the model's own. added: tensors beside the weights."""
    restore(model)  # what is left of a swap is what the model has by itself
    state = model.state_dict() if state is None and added else state
    if state is None:
        model.save_pretrained(folder)
    else:
        _write_weights(model, state | (added or {}), folder)
    if config is not None:
        text = json.dumps(config, indent=2, default=str)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _write_weights(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Settings, and these weights; of tied ones the first name."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    model.config.save_pretrained(folder)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)
    save_torch_state_dict(kept, folder)


def check(model: nn.Module, folder: Path, text: Tensor) -> dict[str, object]:
    """A fresh process without effattn loads the checkpoint; RuntimeError says where it computes
    something else."""
    facts = verify.verify_plain(folder, model, text[:VERIFIED])
    engine = f"transformers without effattn, {type(model).__name__}"
    return {"engine": engine, "tokens": VERIFIED} | facts
