"""The safetensors files of a checkpoint folder: which there are, what they hold, and their tensors,
one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
LINE = 400  # characters of an error
JSON_BYTES = 64 << 20  # of a file that describes a checkpoint


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file's name, its shape, and its dtype as safetensors calls it
    ("BF16").
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def stored(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, in the files' order; of shards, those that the index
    names.

    As transformers does, model.safetensors comes before an index. ValueError, naming the file, for
    one that is missing, truncated or no safetensors file, for an index that points elsewhere, and
    for weights that are there as pickle only."""
    folder, named = Path(folder), {}
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        named = weight_map(folder / INDEX)
        files = list(dict.fromkeys(named.values()))
    else:
        raise ValueError(_no_weights(folder))
    found: dict[str, Stored] = {}
    for file in files:
        for name, one in header(folder / file).items():
            if name in found:
                raise ValueError(
                    f"weights: {name} is both in {found[name].file} and in {file} of "
                    f"{str(folder)!r}"
                )
            found[name] = one
    lost = [name for name, file in named.items() if name not in found or found[name].file != file]
    if lost:
        raise ValueError(
            f"weights: {folder / INDEX} promises {shortened(lost)}, which its files do not have"
        )
    return {name: one for name, one in found.items() if name in named} if named else found


def file_bytes(folder: str | Path) -> int | None:
    """Bytes of a checkpoint's weight files; None for what is no folder here (a hub name). Raises
    what `stored` does."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    return sum(
        (folder / file).stat().st_size for file in {one.file for one in stored(folder).values()}
    )


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded checkpoint. ValueError for anything but files beside
    the index.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"weights: {index}: weight_map: got {found!r:.80}, valid is an object from tensors to "
            "files"
        )
    for name, file in found.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(
                f"weights: {index}: {name!r:.80} is in {file!r:.80}, valid is the name of a "
                ".safetensors file beside it"
            )
    if missing := sorted({file for file in found.values() if not (index.parent / file).is_file()}):
        raise ValueError(
            f"weights: {str(index.parent)!r} lacks {shortened(missing)}, which its index names"
        )
    return found


def header(file: Path) -> dict[str, Stored]:
    """Every tensor of one file. ValueError, naming it, unless it is a whole safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {
                name: Stored(file.name, tuple(one.get_shape()), one.get_dtype())
                for name, one in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights: {file} cannot be read: {one_line(error)}; it is truncated, or no "
            "safetensors file"
        ) from error


def read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of tensors of one file. ValueError naming the first that holds NaN or Inf."""
    found = {}
    with safe_open(file, "pt") as opened:
        for name in names:
            # not a map of the file, which would stay in memory
            tensor = opened.get_tensor(name).clone()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(
                    f"weights: {name} holds NaN or Inf ({bad} of {tensor.numel()} values)"
                )
            found[name] = tensor
    return found


def read_json(file: Path, limit: int = JSON_BYTES) -> dict:
    """The object in a JSON file. ValueError, naming the file, for anything else."""

    def refuse(why: object):
        raise ValueError(f"{file} cannot be read: {why}") from None

    if not file.is_file():
        refuse(
            "it is no regular file" if file.is_symlink() or file.exists() else "it does not exist"
        )
    if file.stat().st_size > limit:
        refuse(f"it has more than {limit:,} bytes")
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        refuse(f"it is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x})")
    except RecursionError:
        refuse("it is nested too deeply")
    except (OSError, ValueError) as error:
        refuse(
            f"it is not JSON ({one_line(error)})"
            if isinstance(error, ValueError)
            else one_line(error)
        )
    if not isinstance(found, dict):
        refuse(f"it holds {type(found).__name__}, valid is a JSON object")
    return found


def shortened(names, most: int = 6) -> str:
    """The first names, and how many more there are."""
    names = list(map(str, names))
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    """An error's message in one line, which may quote what it is about only so far."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def _no_weights(folder: Path) -> str:
    others = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if others:
        return (
            f"weights: {str(folder)!r} has {shortened(others)} and no {SINGLE}: pickled weights "
            "can run code and are never read; valid is a safetensors checkpoint"
        )
    return (
        f"weights: {str(folder)!r} has neither {INDEX} nor {SINGLE}; valid is a safetensors "
        "checkpoint"
    )
