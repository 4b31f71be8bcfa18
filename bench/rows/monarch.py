"""Monarch products in the place of a linear layer: time, and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench.case import Case, Contender, Defined, Ratio, Target, entry_of
from bench.peers import find
from effattn.interface import Cost
from effattn.projections import MonarchLinear

WIDTH = 4096
FORWARD, TRAINING = "product", "product+backward"
DENSE = f"nn.Linear {WIDTH}x{WIDTH}"
SOURCE = f"Monarch on a GPU, {WIDTH}x{WIDTH}, bf16"
REPORTED = 16  # rows up to which there is no target


@dataclass(frozen=True)
class Product(Case):
    """y = W x for `tokens` rows of x; with backward, the gradients of x and of the layer's
    parameters.
    """

    @property
    def shape(self) -> str:
        """The matrix and the rows of x."""
        return f"{WIDTH}x{WIDTH} rows{self.tokens}"

    def inputs(self, tokens, device, seed=0):
        draw = torch.Generator(device).manual_seed(seed)
        x = torch.randn(
            tokens, WIDTH, generator=draw, device=device, dtype=getattr(torch, self.dtype)
        )
        return [x.requires_grad_(self.what == TRAINING)]

    def once(self, call, inputs):
        if self.what == FORWARD:
            return super().once(call, inputs)
        out = call(*inputs)
        return torch.autograd.grad(out, [*inputs, *call.run.parameters()], torch.ones_like(out))

    def answers(self, call, inputs):
        out = call(*inputs)
        if self.what == FORWARD:
            return {"output": out}
        return {"output": out, "dx": torch.autograd.grad(out, inputs, torch.ones_like(out))[0]}

    def cost(self, contender):
        layer, rows = _layer(contender.spec, "meta", self.dtype), self.tokens
        if isinstance(layer, MonarchLinear):
            cost = layer.cost(rows)
            return cost + layer.cost(rows, backward=True) if self.what == TRAINING else cost
        size = layer.weight.element_size()
        weight, x, flops = WIDTH * WIDTH * size, rows * WIDTH * size, 2 * rows * WIDTH * WIDTH
        cost = Cost(flops, weight + x, x)
        return cost + Cost(2 * flops, weight + 2 * x, weight + x) if self.what == TRAINING else cost


def _layer(spec, device, dtype):
    like = {"device": device, "dtype": getattr(torch, dtype)}
    blocks = spec.removeprefix("monarch(blocks=").removesuffix(")")
    if spec == "dense":
        return nn.Linear(WIDTH, WIDTH, bias=False, **like)
    return MonarchLinear(WIDTH, WIDTH, int(blocks), bias=False, **like)


def _monarch(spec, case, inputs):
    layer = _layer(spec, inputs[0].device, case.dtype)
    return Defined(layer, lambda x: x @ layer.dense().detach().to(x).mT)


def _dense(case, inputs):
    return find("nn.Linear")(_layer("dense", inputs[0].device, case.dtype), case, inputs)


def _truth(case, inputs, call):
    return case.answers(
        call.definition, [inputs[0].detach().double().requires_grad_(case.what == TRAINING)]
    )


def _name(blocks):
    return f"effattn monarch(blocks={blocks})"


def _race(what, rows, device):
    raced = [Contender(DENSE, _dense, _truth, spec="dense", efficiency=0.7)]
    for blocks in _blocks(device):
        spec = f"monarch(blocks={blocks})"
        raced.append(
            Contender(_name(blocks), partial(_monarch, spec), _truth, ours=True, spec=spec)
        )
    return Product(what, "bfloat16" if device == "cuda" else "float32", rows, tuple(raced))


def _blocks(device):
    return (32, 64) if device == "cuda" else (32,)


def _rows(device):
    return (1, 16, 64, 512, 8192) if device == "cuda" else (1, 64, 1024)


def cases(device, quick):
    """Monarch products against dense ones, by rows of x."""
    for what in (FORWARD, TRAINING) if device == "cuda" else (FORWARD,):
        yield from (
            _race(what, rows, device) for rows in (_rows(device)[:1] if quick else _rows(device))
        )


@dataclass(frozen=True)
class Moved:
    """Bytes that a product moves over the least: what it allocates beyond its output is written and
    read back. What is read more than once, past the caches, is not seen."""

    case: str
    contender: str

    def __call__(self, results: Mapping) -> float | None:
        names = ("read_bytes", "write_bytes", "peak_bytes")
        read, written, allocated = (
            entry_of(results, self.case, self.contender, name) for name in names
        )
        if None in (read, written, allocated):
            return None
        return 1 + 2 * max(0, allocated - written) / (read + written)


def targets(device):
    """On a GPU: faster than the dense product by so much."""
    if device == "cpu":  # reported only
        return
    for rows in _rows(device):
        for blocks in _blocks(device) if rows > REPORTED else ():
            name, who = _race(FORWARD, rows, device).name, _name(blocks)
            said = f"Monarch of {blocks} blocks, {rows} rows"
            yield Target(
                f"{said}, against nn.Linear", Ratio((name, DENSE), (name, who)), SOURCE, least=1
            )
            yield Target(f"{said}, bytes moved over the least", Moved(name, who), SOURCE, most=1.2)
