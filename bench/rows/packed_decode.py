"""Decoding over a packed cache: one query over K and V in each format's bytes, held to the
definition over the numbers that these bytes mean; against our own kernel and SDPA on K and V in
full precision, and against unpacking everything first: our bytes (KIVI's format) by our kernel, and
transformers' QuantizedCache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from bench.case import Case, Contender, Ratio, Target
from bench.peers import find
from effattn.interface import Cost
from effattn.kernels import decode
from effattn.kernels.decode.packed import PackedCache, attention
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.pack import pack, unpack
from effattn.quant.formats import Format

PLAIN, QUANTIZED = "effattn full", "transformers-QuantizedCache"
SOURCE = "packed caches: the bytes they save"
FORMATS = ("int8", "int4", "int2", "fp8")
COLD = {"cuda": 2**30, "cpu": 2**28}  # bytes of caches that take turns, as a model's layers do
CPU = (
    dict(heads=32, kv_heads=8, dim=128),
    dict(heads=8, kv_heads=8, dim=64),
    dict(heads=8, kv_heads=2, dim=64),
)
GPU = ((1, 32768), (1, 131072), (8, 32768), (32, 4096), (32, 16384))  # (batch, tokens)


@dataclass(frozen=True)
class PackedDecode(Case):
    """One query token; inputs are q, k, v, and each contender packs k and v as it wants before the
    clock starts.
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def shape(self) -> str:
        """The sizes, as names of cases have them."""
        return f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.dim} T{self.tokens}"

    def inputs(self, tokens, device, seed=0):
        draw = torch.Generator(device).manual_seed(seed)
        shapes = [(self.heads, 1), *[(self.kv_heads, tokens)] * 2]
        return [
            torch.randn(
                self.batch,
                *shape,
                self.dim,
                generator=draw,
                device=device,
                dtype=getattr(torch, self.dtype),
            )
            for shape in shapes
        ]

    def sets(self, device):
        itemsize = getattr(torch, self.dtype).itemsize
        # of the packed ones, about
        size = 2 * self.batch * self.kv_heads * self.tokens * self.dim * itemsize // 4
        return max(2, math.ceil(COLD[device.type] / size)) if size < COLD[device.type] else 1

    def answers(self, call, inputs):
        return {"output": call(*inputs)}

    def cost(self, contender):
        rows = self.batch * self.kv_heads
        itemsize = getattr(torch, self.dtype).itemsize
        whole = 2 * rows * self.tokens * self.dim * itemsize
        if contender.spec:
            whole = format_of(contender.spec, self.dim).nbytes(
                self.tokens, self.kv_heads, self.dim, itemsize=itemsize, batch=self.batch
            )
        ends = self.batch * self.heads * self.dim * itemsize
        flops = 4 * self.batch * self.heads * self.tokens * self.dim
        return Cost(flops=flops, read_bytes=whole + ends, write_bytes=ends, state_bytes=whole)


def format_of(spec: str, dim: int) -> Format:
    """The cache format of a spec, for heads `dim` wide."""
    return Format.parse(spec).fit(dim)[0]


def packed_cache(spec: str, k: torch.Tensor, v: torch.Tensor) -> PackedCache:
    """k, v (B, Hkv, T, D) as a cache of that format holds them."""
    format = format_of(spec, k.shape[3])
    first, packed, rest = format.held(k.shape[2])
    k, v = (x.split([first, packed, rest], dim=2) for x in (k, v))
    return PackedCache(
        pack(k[1], format.k),
        pack(v[1], format.v),
        k[2].clone(),
        v[2].clone(),
        total=first + packed + rest,
        k_first=k[0].clone() if first else None,
        v_first=v[0].clone() if first else None,
        packed_from=first,
    )


def meant(cache: PackedCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in fp64, as the bytes mean them."""
    parts = (cache.k_first, cache.k, cache.k_rest), (cache.v_first, cache.v, cache.v_rest)
    return tuple(
        torch.cat(
            [
                *([] if first is None else [first.double()]),
                unpack(codes, torch.float64),
                rest.double(),
            ],
            dim=2,
        )
        for first, codes, rest in parts
    )


class Caches:
    """A call that finds what it made of each set of inputs, by their memory."""

    def __init__(self, make, use):
        self.make, self.use, self.made = make, use, {}

    def __call__(self, q, k, v):
        key = k.data_ptr()
        if key not in self.made:
            self.made[key] = self.make(k, v)
        return self.use(q, self.made[key])


# Contenders
# -------------------------------------------------------------------------------------------------


def _packed(spec, case, inputs):
    return Caches(lambda k, v: packed_cache(spec, k, v), attention)


def _unpacked(spec, case, inputs):
    """Unpacks all of the cache, then attends: two more passes over K and V in full precision."""

    def use(q, cache):
        parts = (cache.k_first, cache.k, cache.k_rest), (cache.v_first, cache.v, cache.v_rest)
        k, v = (
            torch.cat([*([] if first is None else [first]), unpack(codes, q.dtype), rest], dim=2)
            for first, codes, rest in parts
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return Caches(lambda k, v: packed_cache(spec, k, v), use)


def _quantized_cache(case, inputs):
    def use(q, unpacked):
        return torch.nn.functional.scaled_dot_product_attention(q, *unpacked(), enable_gqa=True)

    return Caches(find(QUANTIZED), use)


def _of_quantized_cache(case, inputs, call):
    """The definition in fp64, over the numbers that its bytes mean."""
    return _definition(case, inputs[0], *(x.double() for x in call.make(*inputs[1:])()))


def _plain(case, inputs):
    return decode.attention


def _sdpa(case, inputs):
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
    )


def _truth(spec, case, inputs, call):
    """The definition in fp64, over the numbers that the packed bytes mean; spec "": over K and V as
    they are.
    """
    q, k, v = inputs
    if spec:
        k, v = meant(packed_cache(spec, k, v))
    return _definition(case, q, k, v)


def _definition(case, q, k, v):
    seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    return {"output": reference(q.double(), k, v, seen, scale=case.dim**-0.5)[0]}


def _race(dtype, tokens, **sizes):
    raced = [
        Contender("SDPA", _sdpa, partial(_truth, "")),
        Contender(PLAIN, _plain, partial(_truth, ""), ours=True),
        Contender(
            "unpack int4, then SDPA",
            partial(_unpacked, "int4"),
            partial(_truth, "int4"),
            spec="int4",
        ),
        Contender(f"{QUANTIZED} int4", _quantized_cache, _of_quantized_cache, spec="int4"),
    ]
    raced += [
        Contender(
            f"effattn {spec}", partial(_packed, spec), partial(_truth, spec), ours=True, spec=spec
        )
        for spec in FORMATS
    ]
    return PackedDecode("decode", dtype, tokens, tuple(raced), title="packed", **sizes)


def cases(device, quick):
    """One new token over packed caches, beside one in full precision."""
    if device == "cuda":
        for batch, tokens in GPU[:1] if quick else GPU:
            yield _race("bfloat16", tokens, batch=batch)
    else:
        for tokens in (1024,) if quick else (4096, 16384):
            for sizes in CPU:
                yield _race("float32", tokens, **sizes)


def targets(device):
    """How much faster than full precision, in line with the bytes."""
    if device == "cuda":
        for batch, tokens in GPU:
            name = _race("bfloat16", tokens, batch=batch).name
            if tokens >= 32768:
                for spec, least in (("int8", 1.7), ("int4", 2.6)):
                    yield Target(
                        f"decode {spec}, B{batch} T={tokens}, against our own bf16 kernel",
                        Ratio((name, PLAIN), (name, f"effattn {spec}")),
                        SOURCE,
                        least=least,
                    )
                yield Target(
                    f"decode int4, B{batch} T={tokens}, against SDPA in bf16",
                    Ratio((name, "SDPA"), (name, "effattn int4")),
                    SOURCE,
                    least=2.3,
                )
        return
    for tokens in (4096, 16384):
        for sizes in CPU:
            name = _race("float32", tokens, **sizes).name
            heads = "{heads} query and {kv_heads} K/V heads of {dim}".format(**sizes)
            yield Target(
                f"decode int8 over {tokens} tokens, {heads}, against the fp32 cache",
                Ratio((name, PLAIN), (name, "effattn int8")),
                SOURCE,
                least=1 / 1.3,
            )
