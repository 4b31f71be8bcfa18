"""Weights packed as 2:4 and with a bitmask at few rows, where a linear layer is as fast as its
weight can be read: time, and bytes.

The processor's caches are emptied before every timed call (`effattn.profiling.timing`): weights
come from memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import Absent, Case, Contender, Ratio, Target
from effattn.interface import Cost
from effattn.kernels import bitmask, sparse24

DENSE, SEMI, OURS = "torch dense", "torch semi-structured", "effattn packed 2:4"
BITMASK = "effattn bitmask"
SIZES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # outputs, inputs
ROWS = (1, 4, 16)
LEAST = 1.4  # times the dense product; the limit is 16/9


@dataclass(frozen=True)
class Product(Case):
    """y = x W' for `tokens` rows of x."""

    outputs: int = 4096
    inner: int = 4096

    @property
    def shape(self) -> str:
        """The matrix and the rows of x."""
        return f"{self.outputs}x{self.inner} rows{self.tokens}"

    def inputs(self, tokens, device, seed=0):
        draw = torch.Generator(device).manual_seed(seed)
        like = dict(generator=draw, device=device, dtype=getattr(torch, self.dtype))
        return [
            torch.randn(tokens, self.inner, **like),
            _sparse(torch.randn(self.outputs, self.inner, **like)),
        ]

    def cost(self, contender):
        size, numbers = getattr(torch, self.dtype).itemsize, self.outputs * self.inner
        moved = self.tokens * (self.inner + self.outputs) * size
        if contender.name == DENSE:
            return Cost(
                2 * self.tokens * numbers, numbers * size + self.tokens * self.inner * size, 0
            )
        starts = 4 * self.outputs * bitmask.segments(self.inner) if contender.name == BITMASK else 0
        return Cost(self.tokens * numbers, numbers * size // 2 + numbers // 8 + starts + moved, 0)


def _sparse(weight: Tensor) -> Tensor:
    """With the two smallest of every four set to zero."""
    groups = weight.unflatten(1, (-1, 4))
    lowest = groups.abs().argsort(dim=2)[..., :2]
    return groups.scatter(2, lowest, 0.0).flatten(1)


def _dense(case, inputs):
    return lambda x, weight: x @ weight.mT


def _packed(case, inputs):
    packed = sparse24.pack(inputs[1])
    return lambda x, _: sparse24.linear(x, packed)


def _bitmask(case, inputs):
    packed = bitmask.pack(inputs[1])
    return lambda x, _: bitmask.linear(x, packed)


def _semi_structured(case, inputs):
    if inputs[1].device.type != "cuda":
        raise Absent("it needs a GPU")
    form = torch.sparse.to_sparse_semi_structured(inputs[1])
    return lambda x, _: torch.nn.functional.linear(x, form)


def _truth(case, inputs, call):
    return {"output": inputs[0].double() @ inputs[1].double().mT}


def _race(outputs, inner, rows, device):
    raced = (
        Contender(DENSE, _dense, _truth),
        Contender(SEMI, _semi_structured, _truth),
        Contender(OURS, _packed, _truth, ours=True, spec="2:4"),
        Contender(BITMASK, _bitmask, _truth, ours=True, spec="bitmask"),
    )
    return Product(
        "2:4 product",
        "bfloat16" if device == "cuda" else "float32",
        rows,
        raced,
        outputs=outputs,
        inner=inner,
    )


def _shapes(device, quick):
    sizes, rows = (SIZES, ROWS) if device == "cuda" else (SIZES[:1], ROWS[:1])
    return [
        (*size, n)
        for size in (sizes[:1] if quick else sizes)
        for n in (rows[:1] if quick else rows)
    ]


def cases(device, quick):
    """Packed products against dense ones."""
    for shape in _shapes(device, quick):
        yield _race(*shape, device)


def targets(device):
    """On a GPU; on a CPU packing saves memory, not time."""
    if device == "cpu":  # there it saves memory, not time: reported only
        return
    for shape in _shapes(device, False):
        name = _race(*shape, device).name
        said = "packed 2:4 against torch's dense product, {}x{}, {} rows".format(*shape)
        yield Target(
            said, Ratio((name, DENSE), (name, OURS)), "2:4 at decode on a GPU, bf16", least=LEAST
        )
