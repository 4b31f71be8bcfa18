"""Where a checkpoint is, and what its config.json says: the part of loading that reads no weights."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch

from effattn.errors import check_choice

KEY = "effattn"  # in config.json
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def resolve(name: str | Path) -> str:
    """What transformers loads `name` from: a folder ("embedded" has one too), or else a hub name as it is.

    ValueError, without touching the network, for what can be neither.
    """
    if str(name) == "embedded":
        from effattn import embedded

        return str(embedded.directory())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model: the folder {str(name)!r} has no config.json, it is not a checkpoint")
        return str(name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise ValueError(_not_found(name, "it is no folder, and no hub name (owner/name) looks like that"))
    return str(name)


def read_config(name: str, asked: str | Path):
    """The cheap part first, so that an unknown name is one clear error and not the hub library's.

    Of a checkpoint whose model_type is "effattn", the configuration of the model inside.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        if config.get("model_type") != KEY:
            return AutoConfig.from_pretrained(name)
        kind = config.get(KEY, {}).get("model_type")
        check_choice("config.json: effattn: model_type", kind, CONFIG_MAPPING)
        return CONFIG_MAPPING[kind].from_dict(config | {"model_type": kind})
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"model: the folder {name!r} cannot be read: {error}") from error
        raise ValueError(_not_found(asked, str(error).splitlines()[0])) from None


def _not_found(name: str | Path, why: str) -> str:
    hint = " (did you mean 'embedded'?)" if difflib.get_close_matches(str(name), ["embedded"], cutoff=0.8) else ""
    return (
        f"model: got {str(name)!r}{hint}, which is not 'embedded', not an existing folder, "
        f"and not found as a hub name: {why}"
    )


def dtype_of(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
        return dtype if dtype == "auto" else getattr(torch, dtype)
    return dtype
