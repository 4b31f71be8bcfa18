"""Tensors on disk in the place of a list of them: hidden states by batch, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import load_file, save_file
from torch import Tensor


class SpilledStates:
    """Tensors of every batch on disk, one safetensors file each.

    Takes the place of a list of tensors: indexed, assigned to, appended to, iterated over. count:
    how many there are, or will be. lasting: each is on the disk, whatever happens to the machine,
    before it counts as written."""

    def __init__(self, folder: Path, count: int = 0, lasting: bool = True):
        self.folder, self.count, self.lasting = Path(folder), count, lasting
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
        if self.lasting:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(self._file(number))

    def append(self, states: Tensor) -> None:
        """One more, behind the others."""
        self[self.count] = states
        self.count += 1


States: TypeAlias = list[Tensor] | SpilledStates  # (batch, length, D) each, by batch
