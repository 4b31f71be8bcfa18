"""Where a checkpoint is, its configuration and its tokenizer: the part of loading that reads no
weights.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch

from effattn.errors import check_choice
from effattn.hf import trusted
from effattn.hf.names import METHOD
from effattn.hf.trusted import KEY
from effattn.hf.weight_files import one_line, read_json

SMOLLM2, GGUF = "smollm2", ".gguf"  # names of models that become folders
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # of a hub name
VOCABULARY = re.compile(r"(tokenizer\.json|tekken\.json|vocab\..*|.*\.(model|tiktoken))")


def resolve(name: str | Path, dtype: torch.dtype | str = "auto") -> str:
    """What transformers loads `name` from: a folder ("embedded" and "smollm2" have one too, and a
    GGUF file becomes one), or else a hub name as it is.

    dtype: that a GGUF file is dequantized to (`effattn.hf.gguf_files`). ValueError, without
    touching the network but for "smollm2", for what can be neither.
    """
    if str(name) == "embedded":
        from effattn import embedded

        return str(embedded.directory())
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(
                f"model: the folder {str(name)!r} holds an adapter (adapter_config.json); valid "
                "is the whole model, saved after peft's merge_and_unload()"
            )
        if not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"model: the folder {str(name)!r} has no config.json, it is not a checkpoint"
            )
        return str(name)
    if str(name) == SMOLLM2 or is_gguf(name):
        from effattn.hf import gguf_files, smollm2

        file = smollm2.gguf() if str(name) == SMOLLM2 else name
        return str(gguf_files.converted(file, dtype_of(dtype)))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise ValueError(
            _not_found(name, "it is no folder, and no hub name (owner/name) looks like that")
        )
    return str(name)


def is_gguf(name: str | Path) -> bool:
    """Whether `name` is that of a GGUF file, and no folder."""
    return Path(name).suffix.lower() == GGUF and not Path(name).is_dir()


def folder_of(name: str | Path) -> Path:
    """The checkpoint's folder; a hub name's files are downloaded. ValueError for what does not
    exist.
    """
    found = resolve(name)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found, allow_patterns=CHECKPOINT_FILES))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: got {name!r}, which is no folder, and not found as a hub name: {reason}"
        ) from error


def read_config(name: str, asked: str | Path):
    """The configuration of the checkpoint `name` (a folder or hub name); of one whose model_type is
    "effattn", that of the model inside. Its attribute "effattn", where it has one, is what was
    swapped.

    The cheap part of loading comes first, so that an unknown name is one clear error and not the
    hub library's. ValueError for files that hold no configuration, and for entries that `trusted`
    does not let pass."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if Path(name).is_dir():
        found = read_json(Path(name) / "config.json")
        if (Path(name) / "generation_config.json").exists():
            # transformers takes its own settings for broken ones
            read_json(Path(name) / "generation_config.json")
    else:
        try:
            found, _ = PreTrainedConfig.get_config_dict(name)
        except (OSError, ValueError) as error:
            raise ValueError(_not_found(asked, one_line(error))) from None
    trusted.check_config(found)
    try:
        if found["model_type"] == KEY:
            kind = found[KEY]["model_type"]
            config = CONFIG_MAPPING[kind].from_dict(found | {"model_type": kind})
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        # what it holds is of the wrong kind: each class has its own way of saying so
        raise ValueError(
            f"model: {str(asked)!r}: config.json cannot be read: {one_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None) == METHOD:  # for transformers: here it is known
        del config.quantization_config
    if config._attn_implementation == KEY:  # a mark for plain transformers, which must not load it
        config._attn_implementation = None
    return config


def unplain(config: dict, found: dict) -> dict:
    """A config.json whose weights are not what its class expects: plain transformers refuses it,
    or asks `effattn.plugin` for it. found: what the entry "effattn" says of them."""
    ours = {KEY: {**found, "model_type": config["model_type"]}, "model_type": KEY}
    return {"quantization_config": dict(METHOD)} | config | ours


def load_tokenizer(name: str | Path):
    """The tokenizer of the checkpoint `name` (a folder, a GGUF file or a hub name). ValueError,
    naming the file, for a broken one.
    """
    from transformers import AutoTokenizer

    if is_gguf(name):
        name = resolve(name)
    folder = Path(name)
    if folder.is_dir():
        for file in TOKENIZER_FILES:
            if (folder / file).exists() or (folder / file).is_symlink():
                read_json(folder / file, limit=1 << 30)
        if not _vocabularies(folder):
            raise ValueError(
                f"tokenizer: {str(folder)!r} has none (no tokenizer.json, tokenizer.model or "
                "vocab file)"
            )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        blamed = _vocabularies(folder)[0] if folder.is_dir() else name
        raise ValueError(f"tokenizer: {blamed} cannot be read: {one_line(error)}") from error


def _vocabularies(folder: Path) -> list[Path]:
    """The files of a folder that hold a vocabulary."""
    return sorted(
        file for file in folder.iterdir() if VOCABULARY.fullmatch(file.name) and file.is_file()
    )


def _not_found(name: str | Path, why: str) -> str:
    near = difflib.get_close_matches(str(name), ["embedded", SMOLLM2], cutoff=0.8)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"model: got {str(name)!r}{hint}, which is not 'embedded', not an existing folder, "
        f"and not found as a hub name: {why}"
    )


def dtype_of(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype from its name; "auto" stays. ValueError for other names."""
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
        return dtype if dtype == "auto" else getattr(torch, dtype)
    return dtype
