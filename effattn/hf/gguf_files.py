"""A model in one GGUF file, as llama.cpp has it: dequantized once, by transformers' own loader,
into a plain folder, which everything else then loads like any checkpoint.

    load_model("SmolLM2-135M-Instruct.Q4_1.gguf")     # and wherever else a model is named

The folder lies in the cache (`cache_folder`), by the file's path, size and date."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from effattn.hf.weight_files import one_line
from effattn.locking import open_locked
from effattn.outputs import atomic_folder

SUFFIX, MAGIC = ".gguf", b"GGUF"
VARIABLE = "EFFATTN_CACHE"
INSTALL = "pip install 'effattn[gguf]'"


def cache_folder() -> Path:
    """Where what is fetched and converted is kept: $EFFATTN_CACHE, else effattn in
    $XDG_CACHE_HOME, else in ~/.cache. Whoever removes it loses time only."""
    if said := os.environ.get(VARIABLE):
        return Path(said).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effattn"


@contextmanager
def held() -> Iterator[Path]:
    """The cache, made where there is none, for one process at a time: others wait, as those of one
    training do."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)

    def opened(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    descriptor = open_locked(folder / ".lock", opened, wait=True)
    try:
        yield folder
    finally:
        os.close(descriptor)


def converted(file: str | Path, dtype: torch.dtype | str = "auto") -> Path:
    """The folder of plain safetensors, config and tokenizer that a GGUF file becomes.

    dtype "auto" stores bfloat16: these models were trained in it, a block's few bits and its scale
    fit into its 8 bits up to errors far below those of the quantization, and float32 would take
    twice the memory in all that follows. A dtype is stored as it is asked for, without that
    rounding. ValueError in one line where `gguf` is not installed, for a file that is none or
    broken, and for an architecture that transformers does not read."""
    file = Path(file).resolve()
    check(file)
    stored = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    facts = file.stat()
    key = f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0{stored}"
    name = f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = cache_folder() / "gguf" / name
    if not folder.is_dir():
        with held():
            if not folder.is_dir():  # another process may have made it while this one waited
                _convert(file, folder, stored)
    return folder


def check(file: Path) -> None:
    """ValueError for a file that is no GGUF, and where what reads them is missing."""
    if not file.is_file():
        raise ValueError(f"model: {str(file)!r} does not exist, valid is a GGUF file")
    with file.open("rb") as body:
        begins = body.read(len(MAGIC))
    if begins != MAGIC:
        raise ValueError(
            f"model: {str(file)!r} is no GGUF file: it begins with {begins!r}, not {MAGIC!r}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model: {str(file)!r} needs the package gguf: {INSTALL}")


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes `folder`, whole or not at all."""
    import transformers

    options = {"gguf_file": file.name, "trust_remote_code": False}
    plain: dict[str, object] = {}
    if hasattr(transformers, "GgufConfig"):  # older versions dequantize by themselves
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, **options, **plain
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each reader has its own way of saying that a file is broken
        raise ValueError(f"model: {str(file)!r} cannot be read: {one_line(error)}") from error
    # Its weights are plain from here on, and what it says of the file would be wrong.
    vars(model).pop("hf_quantizer", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    del model
    gc.collect()  # a model refers to itself; it is loaded again from the folder
