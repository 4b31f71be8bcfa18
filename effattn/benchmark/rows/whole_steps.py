"""Whole steps of decoding, as each layer of a model makes them: the new token's query and key are rotated, its key and
value go into the layer's cache, and the query attends over that. Packed caches and ReRoPE, against plain transformers:
RoPE, DynamicCache, which copies what it holds at each step, and SDPA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import effattn
from effattn.benchmark.attention import STEPS, Attention
from effattn.benchmark.case import Case, Contender, Ratio, Target
from effattn.benchmark.rows.packed_decode import COLD, FORMATS
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import Far
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.pack import pack, unpack
from effattn.quant.formats import Format
from effattn.quant.state import New, PackedState

PLAIN, FULL = "DynamicCache+SDPA dense", "effattn full"
BASE = 10000.0
WINDOW = 256
REROPE = f"rerope(window={WINDOW})"
CPU = (
    dict(heads=32, kv_heads=8, dim=128), dict(heads=8, kv_heads=8, dim=64), dict(heads=8, kv_heads=2, dim=64),
)  # fmt: skip
GPU = dict(heads=32, kv_heads=8, dim=128)


@dataclass(frozen=True)
class Step(Attention):
    """Inputs are q, k and v of the new token, raw, then the past's raw k and v."""

    def sets(self, device):
        size = 2 * self.batch * self.kv_heads * self.tokens * self.dim * self.itemsize
        return max(2, math.ceil(COLD[device.type] / size))  # a model's layers take turns

    def cost(self, contender):
        return None


def tables(first: int, tokens: int, dim: int, device: torch.device, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE at positions first, first + 1, ...: (tokens, D/2)."""
    angle = torch.arange(first, first + tokens, device=device, dtype=dtype)[:, None] * (
        BASE ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
    )
    return angle.cos(), angle.sin()


class Layers:
    """A call that goes on with the cache of the layer whose inputs it gets: `new(k, v)`, k rotated or raw, makes one
    that holds the past and is called with the new token's q, k and v."""

    def __init__(self, new: Callable, raw: bool):
        self.new, self.raw, self.layers, self.tables = new, raw, {}, None

    def __call__(self, q, k, v, past_k, past_v):
        key, past = past_k.data_ptr(), past_k.shape[2]
        if key not in self.layers:
            turned = past_k
            if not self.raw:
                cos, sin = tables(0, past, q.shape[3], q.device)
                turned = rotate(past_k, cos, sin)
                self.tables = self.tables or tables(past, STEPS, q.shape[3], q.device)  # a model makes them once a step
            self.layers[key] = [self.new(turned, past_v), 0]
        layer = self.layers[key]
        if not self.raw:
            cos, sin = (x[layer[1] : layer[1] + 1] for x in self.tables)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            layer[1] += 1
        return layer[0](q, k, v)


# Contenders ------------------------------------------------------------------------------------------------------


def _plain() -> Contender:
    def build(case, inputs):
        from transformers import DynamicCache

        def new(k, v):
            cache = DynamicCache()
            cache.update(k, v, 0)

            def step(q, k, v):
                k, v = cache.update(k, v, 0)
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.kv_heads)

            return step

        return Layers(new, raw=False)

    return Contender(PLAIN, build, partial(_truth, None, None), spec="dense")


def _held(name: str, spec: str | None) -> Contender:
    """Our own cache: packed in the format `spec`; None: in full precision."""

    def build(case, inputs):
        attn = effattn.backend("dense").to(inputs[0].device)

        def new(k, v):
            state = PackedState(_format(spec, case)) if spec else attn.new_state()
            if spec:
                state.absorb(New(k, v, 0))
            else:
                state.append(k, v)
            return partial(attn, state=state)

        return Layers(new, raw=False)

    return Contender(name, build, partial(_truth, spec, None), ours=True, spec="dense")


def _rerope() -> Contender:
    """Keys are held raw, and turned when they are read."""

    def build(case, inputs):
        attn = effattn.backend("dense").to(inputs[0].device)
        rule = effattn.positions.rule(REROPE, length=case.tokens, head_dim=case.dim, heads=case.heads, base=BASE)
        rule = rule.to(inputs[0].device)

        def new(k, v):
            state = attn.new_state()
            state.append(k, v)
            return partial(attn, state=state, rotary=rule)

        return Layers(new, raw=True)

    return Contender(f"effattn {REROPE}", build, partial(_truth, None, WINDOW), ours=True, spec="dense")


def _format(spec: str, case: Step) -> Format:
    return Format.parse(spec).fit(case.dim)[0]


def _truth(spec: str | None, window: int | None, case: Case, inputs: list[Tensor], call) -> dict[str, Tensor]:
    """The definition in fp64, over the numbers that the packed bytes mean."""
    q, k, v, past_k, past_v = (x.double() for x in inputs)
    past, device = past_k.shape[2], q.device
    before = tables(0, past, case.dim, device, torch.float64)
    now = tables(past, 1, case.dim, device, torch.float64)
    turned = rotate(past_k, *before)
    if spec is not None:
        format = _format(spec, case)
        held = format.held(past)[1]
        own = rotate(inputs[3], *tables(0, past, case.dim, device))  # in the numbers that were packed
        codes = pack(own[:, :, :held], format.k), pack(inputs[4][:, :, :held], format.v)
        turned, past_v = (
            torch.cat([unpack(x, torch.float64), full[:, :, held:].double()], dim=2)
            for x, full in zip(codes, (own, past_v), strict=True)
        )
    keys, values = torch.cat([turned, rotate(k, *now)], dim=2), torch.cat([past_v, v], dim=2)
    distance = past - torch.arange(past + 1, device=device)
    far = None
    if window is not None:
        edge = tables(window, 1, case.dim, device, torch.float64)
        far = Far(rotate(q, *edge), torch.cat([past_k, k], dim=2), window)
    seen = distance[None, None, None] >= 0
    out, _ = reference(
        rotate(q, *now), keys, values, seen, scale=case.dim**-0.5, far=far, distance=distance[None, None]
    )
    return {"output": out}


# Rows ------------------------------------------------------------------------------------------------------------


def _packed(dtype: str, tokens: int, **sizes) -> Step:
    raced = [_plain(), _held(FULL, None), *(_held(f"effattn {spec}", spec) for spec in FORMATS)]
    return Step("step", dtype, tokens, tuple(raced), title="packed", **sizes)


def _turned(dtype: str, tokens: int, **sizes) -> Step:
    return Step("step", dtype, tokens, (_plain(), _held(FULL, None), _rerope()), title="ReRoPE", **sizes)


def _cpu() -> list[Step]:
    packed = [_packed("float32", tokens, **sizes) for tokens in (4096, 16384) for sizes in CPU]
    return packed + [_turned("float32", 4096, batch=4, kv_heads=kv_heads) for kv_heads in (8, 2)]


def cases(device, quick):
    if quick:
        dtype = "bfloat16" if device == "cuda" else "float32"
        yield from (make(dtype, 1024, **CPU[-1]) for make in (_packed, _turned))
    elif device == "cpu":
        yield from _cpu()
    else:
        for batch, tokens in ((1, 32768), (8, 32768), (32, 4096)):
            yield _packed("bfloat16", tokens, batch=batch, **GPU)
        yield _turned("bfloat16", 4096, batch=16, **GPU)


def targets(device):
    if device == "cpu":
        for case in _cpu():
            spec, most = (REROPE, 1.2) if case.title == "ReRoPE" else ("int8", 1.3)
            ratio = Ratio((case.name, f"effattn {spec}"), (case.name, PLAIN))
            source = f"{'ReRoPE' if case.title == 'ReRoPE' else 'packed caches'}: whole steps on a CPU"
            yield Target(
                f"time of a whole step with {spec}, {case.shape}, over plain transformers'", ratio, source, most=most
            )
