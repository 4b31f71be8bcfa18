"""Whole steps of decoding over latent keys and values, against plain transformers' over twice the
bytes: keys that turn are made of latents at every step, and where nothing turns latents alone are
read. Projections are left out: a latent's are no larger than those of keys and values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import effattn
from bench.attention import Attention
from bench.case import Contender, Ratio, Target
from bench.rows.rerope import GPU, inv_freq
from bench.rows.whole_steps import PLAIN, WINDOW, Layers, Step, plain_step, tables
from effattn.kernels.decode.turn import rotate
from effattn.kernels.flash import Far
from effattn.kernels.flash.reference import attention as reference
from effattn.kernels.latent import Latent, Maps
from effattn.positions.rope import Rope
from effattn.states.latent import LatentState

TITLE = "latent"
# name -> the rule by which keys turn
RULES = {
    "latent": "rope",
    "latent, ReRoPE": f"rerope(window={WINDOW})",
    "latent, nothing turns": None,
}
# a model of grouped heads (SmolLM2-135M's sizes), and one whose keys and values are the hidden size
CPU = (dict(heads=9, kv_heads=3, dim=64), dict(heads=8, kv_heads=8, dim=32))


def rank_of(case: Attention) -> int:
    """Half of the numbers of a token's keys and values."""
    return case.kv_heads * case.dim


def latents_of(k: Tensor) -> Tensor:
    """What stands for W_D x: keys (B, Hkv, T, D) as latents (B, 1, T, Hkv D)."""
    return k.transpose(1, 2).flatten(2)[:, None].contiguous()


def maps_of(case: Attention, like: Tensor) -> Maps:
    """Drawn matrices, the same at every call."""
    draw = torch.Generator(like.device).manual_seed(7)
    shape = (2, case.kv_heads, case.dim, rank_of(case))
    both = torch.randn(shape, generator=draw, device=like.device) / rank_of(case) ** 0.5
    return Maps(*both.to(like.dtype))


def ours(name: str) -> Contender:
    """Our state of latents, whose keys turn by the rule of this name."""

    def build(case, inputs):
        device, maps = inputs[0].device, maps_of(case, inputs[0])
        attn, rule = effattn.backend("dense").to(device), RULES[name]
        if rule == "rope":
            rotary = Rope(inv_freq(case.dim, device))
        elif rule is not None:
            made = effattn.positions.rule(rule, length=case.tokens, head_dim=case.dim)
            rotary = made.to(device)
        else:
            rotary = None

        def new(k, v):
            state = LatentState(attn.new_state())
            c = latents_of(k)
            state.own.append(c, c[..., :0])

            def step(q, k, v):
                latent = Latent(latents_of(k), maps)
                return attn(q, k, v, state=state, rotary=rotary, latent=latent)

            return step

        return Layers(new, raw=True)

    return Contender(f"effattn {name}", build, partial(truth, name), ours=True, spec="dense")


def truth(name: str, case: Attention, inputs: list[Tensor], call) -> dict[str, Tensor]:
    """The definition in fp64: every key and value is made."""
    q, k, _, past_k, _ = (x.double() for x in inputs)
    past, device = past_k.shape[2], q.device
    maps = maps_of(case, inputs[0])
    maps = Maps(maps.key.double(), maps.value.double())
    c = torch.cat([latents_of(past_k), latents_of(k)], dim=2)[:, 0]
    keys, values, far = maps.keys(c), maps.values(c), None
    distance = past - torch.arange(past + 1, device=device)
    if RULES[name] is not None:
        at = partial(tables, dim=case.dim, device=device, dtype=torch.float64)
        if name != "latent":
            far = Far(rotate(q, *at(WINDOW, 1)), keys, WINDOW)
        q, keys = rotate(q, *at(past, 1)), rotate(keys, *at(0, past + 1))
    out, _ = reference(
        q,
        keys,
        values,
        distance[None, None, None] >= 0,
        scale=case.dim**-0.5,
        far=far,
        distance=distance[None, None],
    )
    return {"output": out}


# Rows
# -------------------------------------------------------------------------------------------------


def _case(dtype: str, tokens: int, **sizes) -> Step:
    raced = (plain_step(), *map(ours, RULES))
    return Step("step", dtype, tokens, raced, title=TITLE, **sizes)


def _cpu() -> list[Step]:
    return [
        _case(dtype, tokens, **sizes)
        for dtype in ("float32", "bfloat16")
        for tokens in (1024, 16384)
        for sizes in CPU
    ]


def cases(device, quick):
    """Decoding steps over latents of half the bytes."""
    if quick:
        yield _case("bfloat16" if device == "cuda" else "float32", 1024, **CPU[0])
    elif device == "cpu":
        yield from _cpu()
    else:
        for batch, tokens in ((1, 32768), (8, 32768)):
            yield _case("bfloat16", tokens, batch=batch, **GPU)


def targets(device):
    """On a CPU at 16k tokens: how much longer than a step over plain keys and values."""
    if device != "cpu":
        return
    for case in _cpu():
        if case.tokens < 16384:
            continue
        for name in RULES:
            yield Target(
                f"time of a step's attention, {name} of half the bytes, {case.dtype}, "
                f"{case.shape}, over plain transformers'",
                Ratio((case.name, f"effattn {name}"), (case.name, PLAIN)),
                "latent keys and values: whole steps on a CPU",
                most=1.0 if RULES[name] == "rope" else 0.6,
            )
