"""Pathfinder (arXiv:1805.08315; in Long Range Arena, arXiv:2011.04006), drawn here: are two marked
ends those of one dashed path?

    images, labels = pathfinder.draw(100, side=32, seed=0)

Two long paths and some short ones wind through an image. Both ends of one long path are marked
(label 1), or one end of each (label 0), so that nothing but following a path tells. Between two
paths there are always more empty pixels than between two dashes of one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from effattn.evaluate import retrieval

EMPTY, PATH, END = 0, 1, 2  # values of a pixel
DASH = 3  # pixels of a dash and the gap behind it, which is one of them
APART = 3  # pixels, in the larger of both directions, from another path at least
TURN = 0.35  # standard deviation of a step's change of direction, in radians
LEAST_SIDE = 12  # pixels
TRIES = 200  # beginnings of a path before the image is drawn anew
Pixel = tuple[int, int]


def draw(count: int, *, side: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, side, side) and labels (count,), int64: pixels `EMPTY`, `PATH` or `END`. Every
    second one, about, is a 1. ValueError for a side below 12."""
    retrieval.check_settings((0,), count=(count, 1), side=(side, LEAST_SIDE))
    chance = random.Random(seed)
    labels = [chance.randrange(2) for _ in range(count)]
    images = [_image(chance, side, label) for label in labels]
    return torch.stack(images), torch.tensor(labels)


def _image(chance: random.Random, side: int, label: int) -> Tensor:
    long, short = side, side // 4
    while True:
        taken: set[Pixel] = set()
        paths = [_path(chance, side, length, taken) for length in (long, long)]
        if None not in paths:
            break
    distractors = (_path(chance, side, short, taken) for _ in range(side // 8))
    image = torch.full((side, side), EMPTY)
    for path in [*paths, *distractors]:
        for pixel in path or ():
            image[pixel] = PATH
    first, second = (path for path in paths if path)
    ends = (first[0], first[-1]) if label else (first[0], second[-1])
    for pixel in ends:
        image[pixel] = END
    return image


def _path(chance: random.Random, side: int, length: int, taken: set[Pixel]) -> list[Pixel] | None:
    """The pixels of one that keeps away from what is `taken`, which then has it, too; None where no
    beginning led to one. Its first and its last pixel are drawn, whatever the dashes."""
    for _ in range(TRIES):
        steps = list(_walk(chance, side, length))
        if len(steps) == length and not any(pixel in taken for pixel in steps):
            near = range(1 - APART, APART)
            taken |= {(y + dy, x + dx) for y, x in steps for dy in near for dx in near}
            last = len(steps) - 1
            return [pixel for i, pixel in enumerate(steps) if (i + 1) % DASH or i in (0, last)]
    return None


def _walk(chance: random.Random, side: int, length: int) -> Iterator[Pixel]:
    """Steps of one pixel, until the path leaves the image or comes back to itself."""
    y, x = (chance.uniform(1, side - 2) for _ in range(2))
    heading, turn = chance.uniform(0, 2 * math.pi), 0.0
    passed: list[Pixel] = []
    while len(passed) < length:
        pixel = (round(y), round(x))
        far = passed[: -2 * APART]
        close = any(max(abs(pixel[0] - a), abs(pixel[1] - b)) < APART for a, b in far)
        if close or not all(0 <= place < side for place in pixel):
            return
        if not passed or pixel != passed[-1]:
            passed.append(pixel)
            yield pixel
        turn = 0.7 * turn + chance.gauss(0, TURN / 2)
        heading += turn
        y, x = y + math.sin(heading), x + math.cos(heading)
