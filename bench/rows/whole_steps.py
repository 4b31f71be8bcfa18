"""Whole steps of decoding, as each layer of a model makes them: the new token's query and key are
rotated, its key and value go into the layer's cache, and the query attends over that. Packed caches
and ReRoPE, against plain transformers: RoPE, DynamicCache, which copies what it holds at each step,
and SDPA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import effattn
from bench.attention import STEPS, Attention
from bench.case import Case, Contender, Ratio, Target
from bench.peers import find
from bench.rows.packed_decode import COLD, CPU, FORMATS, format_of, meant, packed_cache
from bench.rows.rerope import GPU, inv_freq
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import Far
from effattn.kernels.flash.reference import attention as reference
from effattn.quant.packed.state import PackedState

WHO = "DynamicCache+SDPA"
PLAIN = f"{WHO} dense"
WINDOW = 256
REROPE = f"rerope(window={WINDOW})"


@dataclass(frozen=True)
class Step(Attention):
    """Inputs are q, k and v of the new token, raw, then the past's raw k and v."""

    def sets(self, device):
        size = 2 * self.batch * self.kv_heads * self.tokens * self.dim * self.itemsize
        return max(2, math.ceil(COLD[device.type] / size))  # a model's layers take turns

    def cost(self, contender):
        return None


def tables(
    first: int, tokens: int, dim: int, device: torch.device, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE at positions first, first + 1, ...: (tokens, D/2)."""
    angle = torch.arange(first, first + tokens, device=device, dtype=dtype)[:, None] * inv_freq(
        dim, device
    ).to(dtype)
    return angle.cos(), angle.sin()


class Layers:
    """A call that goes on with the cache of the layer whose inputs it gets: `new(k, v)`, k rotated
    or raw, makes one that holds the past and is called with the new token's q, k and v."""

    def __init__(self, new: Callable, raw: bool):
        self.new, self.raw, self.layers, self.tables = new, raw, {}, None

    def __call__(self, q, k, v, past_k, past_v):
        key, past = past_k.data_ptr(), past_k.shape[2]
        if key not in self.layers:
            turned = past_k
            if not self.raw:
                cos, sin = tables(0, past, q.shape[3], q.device)
                turned = rotate(past_k, cos, sin)
                # a model makes them once a step
                self.tables = self.tables or tables(past, STEPS, q.shape[3], q.device)
            self.layers[key] = [self.new(turned, past_v), 0]
        layer = self.layers[key]
        if not self.raw:
            cos, sin = (x[layer[1] : layer[1] + 1] for x in self.tables)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            layer[1] += 1
        return layer[0](q, k, v)


# Contenders
# -------------------------------------------------------------------------------------------------


def plain_step() -> Contender:
    """Plain transformers: RoPE, DynamicCache and SDPA."""

    def build(case, inputs):
        make = find(WHO)
        return Layers(
            lambda k, v: make(effattn.backend("dense"), case, [*inputs[:3], k, v]), raw=False
        )

    return Contender(PLAIN, build, partial(_truth, None, None), spec="dense")


def _ours(name: str, spec: str | None = None, window: int | None = None) -> Contender:
    """Our own cache, packed in the format `spec`. window: of ReRoPE, whose keys are held raw and
    turned when they are read."""

    def build(case, inputs):
        device = inputs[0].device
        attn, rule = effattn.backend("dense").to(device), None
        if window is not None:
            rule = effattn.positions.rule(
                f"rerope(window={window})", length=case.tokens, head_dim=case.dim
            ).to(device)

        def new(k, v):
            if spec is None:
                state = attn.new_state()
                state.append(k, v)
            else:
                state = PackedState(format_of(spec, case.dim))
                state.append(k, v)
            return partial(attn, state=state, rotary=rule)

        return Layers(new, raw=rule is not None)

    return Contender(
        f"effattn {name}", build, partial(_truth, spec, window), ours=True, spec="dense"
    )


def _truth(
    spec: str | None, window: int | None, case: Case, inputs: list[Tensor], call
) -> dict[str, Tensor]:
    """The definition in fp64, over the numbers that the packed bytes mean."""
    q, k, v, past_k, past_v = (x.double() for x in inputs)
    past, device = past_k.shape[2], q.device
    before = tables(0, past, case.dim, device, torch.float64)
    now = tables(past, 1, case.dim, device, torch.float64)
    turned = rotate(past_k, *before)
    if spec is not None:
        # in the numbers that were packed
        own = rotate(inputs[3], *tables(0, past, case.dim, device))
        turned, past_v = meant(packed_cache(spec, own, inputs[4]))
    keys, values = torch.cat([turned, rotate(k, *now)], dim=2), torch.cat([past_v, v], dim=2)
    distance = past - torch.arange(past + 1, device=device)
    far = None
    if window is not None:
        edge = tables(window, 1, case.dim, device, torch.float64)
        far = Far(rotate(q, *edge), torch.cat([past_k, k], dim=2), window)
    seen = distance[None, None, None] >= 0
    out, _ = reference(
        rotate(q, *now),
        keys,
        values,
        seen,
        scale=case.dim**-0.5,
        far=far,
        distance=distance[None, None],
    )
    return {"output": out}


# Rows
# -------------------------------------------------------------------------------------------------


def _packed(dtype: str, tokens: int, **sizes) -> Step:
    raced = [plain_step(), _ours("full"), *(_ours(spec, spec) for spec in FORMATS)]
    return Step("step", dtype, tokens, tuple(raced), title="packed", **sizes)


def _turned(dtype: str, tokens: int, **sizes) -> Step:
    return Step(
        "step",
        dtype,
        tokens,
        (plain_step(), _ours("full"), _ours(REROPE, window=WINDOW)),
        title="ReRoPE",
        **sizes,
    )


def _cpu() -> list[Step]:
    packed = [_packed("float32", tokens, **sizes) for tokens in (4096, 16384) for sizes in CPU]
    return packed + [_turned("float32", 4096, batch=4, kv_heads=kv_heads) for kv_heads in (8, 2)]


def cases(device, quick):
    """Decoding steps through all layers' states."""
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
    """On a CPU: how much longer than a step over a plain cache."""
    if device == "cpu":
        for case in _cpu():
            spec, most = (REROPE, 1.2) if case.title == "ReRoPE" else ("int8", 1.3)
            ratio = Ratio((case.name, f"effattn {spec}"), (case.name, PLAIN))
            source = (
                f"{'ReRoPE' if case.title == 'ReRoPE' else 'packed caches'}: whole steps on a CPU"
            )
            yield Target(
                f"time of a whole step with {spec}, {case.shape}, over plain transformers'",
                ratio,
                source,
                most=most,
            )
