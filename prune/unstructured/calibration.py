"""What one-shot pruning is calibrated on: tokens cut into windows, and their hidden states at one
layer boundary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from effattn.calibration.layerwise import windows
from effattn.hf.families import trained_length

LENGTH = 2048  # tokens of a window, where the model was trained for as many
BATCH_TOKENS = 2048  # tokens of a batch of windows


def check_tokens(tokens: Tensor, vocabulary: int, length: int) -> None:
    """ValueError unless tokens are int64 (N,), in the vocabulary, and make at least one window."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
        got = (
            f"{tokens.dtype} {tuple(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"tokens: got {got}, valid is an int64 tensor (N,) of token ids")
    if len(tokens) < length:
        raise ValueError(
            f"tokens: got {len(tokens):,}, less than a window of {length:,}; give more text, or a "
            "smaller length"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"tokens: ids run from {low} to {high}, the model's vocabulary is 0 to {vocabulary - 1}"
        )


def window_length(config, length: int | None) -> int:
    """`length`, or as many tokens as the model was trained for, up to `LENGTH`. ValueError for less
    than 8.
    """
    if length is None:
        return min(LENGTH, trained_length(config) or LENGTH)
    if length < 8:
        raise ValueError(f"length: got {length}, valid is 8 tokens or more")
    return length


def batches_of(tokens: Tensor, length: int, bos: int | None = None) -> list[Tensor]:
    """Windows of `length` tokens, a few at a time: (batch, length) each. bos: the token that takes
    the place of each one's first."""
    return windows(tokens, length, max(1, BATCH_TOKENS // length), bos)


class SpilledStates:
    """Hidden states of every batch on disk, one safetensors file each: they are read one at a time.

    Takes the place of a list of tensors (batch, length, D): indexed, assigned to, iterated over.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = Path(folder), count
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(self.count))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def __getitem__(self, number: int) -> Tensor:
        return load_file(self._file(number))["hidden"].clone()  # what is read is a map of the file

    def __setitem__(self, number: int, states: Tensor) -> None:
        temporary = self._file(number).with_suffix(".tmp")
        save_file({"hidden": states.contiguous()}, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._file(number))
