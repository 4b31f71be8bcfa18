"""Decoding over a packed cache: one query over K and V in each format's bytes, held to the definition over the numbers
that these bytes mean; against our own kernel and SDPA on K and V in full precision, and against unpacking everything first,
as transformers' QuantizedCache does at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effattn.benchmark.case import Absent, Case, Contender, Ratio, Target
from effattn.interface import Cost
from effattn.kernels import decode
from effattn.kernels.decode.packed import PackedCache, attention
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.pack import pack, unpack
from effattn.quant.formats import Format

FORMATS = ("int8", "int4", "int2", "fp8")
COLD = 2**30  # bytes of caches that take turns on a GPU
GPU = ((1, 32768), (1, 131072), (8, 32768), (32, 4096), (32, 16384))  # (batch, tokens)


@dataclass(frozen=True)
class PackedDecode(Case):
    """One query token; inputs are q, k, v, and each contender packs k and v as it wants before the clock starts."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.dim} T{self.tokens}"

    def inputs(self, tokens, device, seed=0):
        draw = torch.Generator(device).manual_seed(seed)
        shapes = [(self.heads, 1), *[(self.kv_heads, tokens)] * 2]
        return [
            torch.randn(self.batch, *shape, self.dim, generator=draw, device=device, dtype=getattr(torch, self.dtype))
            for shape in shapes
        ]

    def sets(self, device):
        itemsize = getattr(torch, self.dtype).itemsize
        size = 2 * self.batch * self.kv_heads * self.tokens * self.dim * itemsize // 4  # of the packed ones, about
        return max(2, math.ceil(COLD / size)) if device.type == "cuda" and size < COLD else 1

    def answers(self, call, inputs):
        return {"output": call(*inputs)}

    def cost(self, contender):
        rows = self.batch * self.kv_heads
        itemsize = getattr(torch, self.dtype).itemsize
        whole = 2 * rows * self.tokens * self.dim * itemsize
        if contender.spec:
            whole = _format(contender.spec, self.dim).nbytes(
                self.tokens, self.kv_heads, self.dim, itemsize=itemsize, batch=self.batch
            )
        ends = self.batch * self.heads * self.dim * itemsize
        flops = 4 * self.batch * self.heads * self.tokens * self.dim
        return Cost(flops=flops, read_bytes=whole + ends, write_bytes=ends, state_bytes=whole)


def _format(spec: str, dim: int) -> Format:
    return Format.parse(spec).fit(dim)[0]


def _cache(spec: str, k: torch.Tensor, v: torch.Tensor) -> PackedCache:
    format = _format(spec, k.shape[3])
    packed = format.held(k.shape[2])[1]
    return PackedCache(
        pack(k[:, :, :packed], format.k), pack(v[:, :, :packed], format.v),
        k[:, :, packed:].clone(), v[:, :, packed:].clone(), k.shape[2],
    )  # fmt: skip


class Caches:
    """A call that finds what it made of each set of inputs, by their memory."""

    def __init__(self, make, use):
        self.make, self.use, self.made = make, use, {}

    def __call__(self, q, k, v):
        key = k.data_ptr()
        if key not in self.made:
            self.made[key] = self.make(k, v)
        return self.use(q, self.made[key])
