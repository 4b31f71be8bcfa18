"""The safetensors files of a checkpoint that is changed from file to file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from effattn.hf import weight_files
from effattn.hf.streamed import Checkpoint, StreamedModel
from effattn.reports.files import write_text_atomic

BYTES = {  # of one number, by safetensors' names
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)
# of a source; they would be wrong of what comes of it
REPORTS = ("report.json", "report.md", "report.html", "card.json", "pruning.json")


def size(shape: list[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * BYTES[dtype]


def around_layers(model: StreamedModel) -> list[list[str]]:
    """What lies outside of the layers, in files about as large as a layer's."""
    shapes = model.checkpoint.shapes()
    sizes = {name: size(shape, dtype) for name, (shape, dtype) in shapes.items()}
    limit = max(
        sum(sizes[name] for name in model.names(index)) for index in range(len(model.prefixes))
    )
    shards: list[list[str]] = []
    for name in model.names(None):
        if not shards or sum(sizes[other] for other in shards[-1]) + sizes[name] > limit:
            shards.append([])
        shards[-1].append(name)
    return shards


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, whole or not at all: on disk before it has its name."""
    temporary = file.with_suffix(".tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, {"format": "pt"})
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    temporary.replace(file)


def write_index(folder: Path, files: Iterable[str]) -> None:
    """The index of a checkpoint in these of the folder's files."""
    weight_map, total = {}, 0
    for file in files:
        for name, one in weight_files.header(folder / file).items():
            weight_map[name] = file
            total += size(list(one.shape), one.dtype)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text_atomic(folder / weight_files.INDEX, json.dumps(index, indent=1) + "\n")


def copy_others(source: Path, folder: Path) -> None:
    """What belongs to a checkpoint and holds no weights, such as its tokenizer and its config."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(OTHER_WEIGHTS) and file.name not in REPORTS:
            shutil.copyfile(file, folder / file.name)


def fingerprint(checkpoint: Checkpoint, tokens: Tensor) -> dict:
    """What a run must have in common with the unfinished one, beside its settings."""
    files = sorted({*checkpoint.files.values(), "config.json"})
    stats = [(file, (checkpoint.folder / file).stat()) for file in files]
    return {
        "source": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
