"""The tasks of the arena: token sequences and their class, from seeds. A new one is a function here
with `@task`, and a test of its labels by another way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.arena import pathfinder
from effattn.arena.pathfinder import LEAST_SIDE
from effattn.evaluate.list_operations import OPERATIONS, listops_examples

PAD = 0
SYMBOLS = ["]", *map(str, range(10)), *(f"[{name}" for name in OPERATIONS)]
IDS = {symbol: number for number, symbol in enumerate(SYMBOLS, 1)}
NESTED = {64: 2, 256: 3, 1024: 5}  # symbols, at most -> how deep an expression nests
DEEPEST = 10  # in Long Range Arena
KEYS, VALUES = 8, 4  # of `recall`


@dataclass(frozen=True)
class Examples:
    """tokens (N, T) int64, PAD behind what is shorter; real (N, T) bool, what is no padding; labels
    (N,) int64."""

    tokens: Tensor
    real: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """vocabulary: token ids, PAD included. least: tokens of the longest input, at least. make:
    (examples, longest, seed) -> Examples."""

    name: str
    classes: int
    vocabulary: int
    least: int
    make: Callable[[int, int, int], Examples]


TASKS: dict[str, Task] = {}


def task(classes: int, vocabulary: int, least: int):
    """Registers a function as a task of its name."""

    def registered(make: Callable[[int, int, int], Examples]):
        kept = functools.lru_cache(maxsize=2)(make)  # every row learns from the same ones
        TASKS[make.__name__] = Task(make.__name__, classes, vocabulary, least, kept)
        return make

    return registered


@task(classes=10, vocabulary=len(SYMBOLS) + 1, least=32)
def listops(count: int, length: int, seed: int) -> Examples:
    """The value of a nested expression of at most `length` symbols and a quarter of that at
    least."""
    depth = next((nested for most, nested in NESTED.items() if length <= most), DEEPEST)
    how = {"depth": depth, "arguments": 5 if depth < DEEPEST else 10}
    found = listops_examples(count, least=length // 4, most=length, seed=seed, **how)
    tokens = torch.full((count, length), PAD)
    for row, (text, _) in zip(tokens, found, strict=True):
        ids = [IDS[symbol] for symbol in text.split()]
        row[: len(ids)] = torch.tensor(ids)
    return Examples(tokens, tokens != PAD, torch.tensor([value for _, value in found]))


@task(classes=VALUES, vocabulary=1 + KEYS + KEYS * VALUES, least=32)
def recall(count: int, length: int, seed: int) -> Examples:
    """The value of a key: the first token names it, one of the others, anywhere, is that key with
    its value, and all the rest are other keys with theirs. What cannot reach it has to guess."""
    chance = torch.Generator().manual_seed(seed)

    def drawn(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=chance)

    asked, labels = drawn(KEYS, count, 1), drawn(VALUES, count, 1)
    others = (asked + 1 + drawn(KEYS - 1, count, length)) % KEYS
    tokens = 1 + KEYS + VALUES * others + drawn(VALUES, count, length)
    place = 1 + drawn(length - 1, count, 1)
    tokens.scatter_(1, place, 1 + KEYS + VALUES * asked + labels)
    tokens[:, :1] = 1 + asked
    return Examples(tokens, torch.ones_like(tokens, dtype=torch.bool), labels[:, 0])


@task(classes=2, vocabulary=4, least=LEAST_SIDE**2)
def pathfinder_images(count: int, length: int, seed: int) -> Examples:
    """Whether two ends are of one path: pixels of the largest square that `length` holds."""
    side = int(length**0.5)
    images, labels = pathfinder.draw(count, side=side, seed=seed)
    tokens = images.flatten(1) + 1  # PAD is none of them
    return Examples(tokens, torch.ones_like(tokens, dtype=torch.bool), labels)
