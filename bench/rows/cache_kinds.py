"""Steps of decoding over caches of other kinds: heads that keep half of the tokens, and pages,
against the full cache. Held to the definition over the tokens that are there."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import effattn
from bench.attention import STEPS, Attention, peer
from bench.case import Contender, Ratio, Target
from effattn.interface import Backend, Shape
from effattn.kernels.flash.reference import attention as reference
from effattn.states.caches import parse
from effattn.states.evicting import EvictingState

FULL, HALF = "full", "evict(policy='norm', keep=0.5, every=None)"
KINDS = (
    FULL,
    HALF,
    "evict(policy='norm', keep=0.5, every=None, format='int8')",
    "paged(page=16)",
)
SOURCE = "what a step reads is what is held"


class Step:
    """A call that decodes one token over a state; `held`: keys (B, H, n, D), values and which of
    them are there (B, H, n), as they were before the first."""

    def __init__(self, attn: Backend, state, past: list[Tensor], group: int):
        with torch.no_grad():
            # tokens go after a prompt, which is attended to
            attn(past[0].repeat_interleave(group, dim=1), *past, state=state)
        self.attn, self.state, self.held = attn, state, (*past, None)
        if isinstance(state, EvictingState):
            k, v, there = state.kept.unpacked().padded()
            newest = [x.clone() for x in (state.newest.k, state.newest.v)]
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), newest, strict=True))
            fresh = there.new_ones(*there.shape[:2], newest[0].shape[2])
            self.held = k, v, torch.cat([there, fresh], dim=2)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> Tensor:
        return self.attn(q, k, v, state=self.state)


class Steps(Attention):
    """One token at a time; a contender's spec is that of its cache."""

    def cost(self, contender: Contender):
        sizes = (self.batch, self.heads, self.kv_heads, 1, self.tokens - STEPS + 1, self.dim)
        return effattn.backend("dense").cost(Shape(*sizes, itemsize=self.itemsize))


def _build(spec: str, case: Steps, inputs: list[Tensor]) -> Step:
    attn, kind = effattn.backend("dense").to(inputs[0].device), parse(spec)
    state = attn.new_state()
    if kind is not None:
        state = kind.fit(_Sizes(case)).new_state(attn)
    return Step(attn, state, inputs[3:], case.heads // case.kv_heads)


class _Sizes:
    """Of a layer's keys and values."""

    def __init__(self, case: Steps):
        self.kv_heads, self.head_dim, self.value_dim = case.kv_heads, case.dim, case.dim


def _truth(case: Steps, inputs: list[Tensor], call: Step) -> dict[str, Tensor]:
    """Softmax over what was held and the new token, in fp64."""
    q, new, group = inputs[0].double(), inputs[1:3], case.heads // case.kv_heads
    k, v = (
        torch.cat([held.double(), x.double()], dim=2)
        for held, x in zip(call.held[:2], new, strict=True)
    )
    there = call.held[2]
    if there is None:
        there = torch.ones(*k.shape[:2], k.shape[2] - 1, dtype=torch.bool, device=k.device)
    seen = torch.nn.functional.pad(there, (0, 1), value=True)
    seen = seen.repeat_interleave(group, dim=1)[:, :, None]
    return {"output": reference(q, k, v, seen, scale=case.dim**-0.5)[0]}


def _race(device: str, tokens: int) -> Steps:
    sizes = {"heads": 32, "kv_heads": 8, "dim": 128} if device == "cuda" else {"kv_heads": 2}
    raced = [peer("DynamicCache+SDPA", "dense")]
    raced += [
        Contender(f"effattn {kind}", partial(_build, kind), _truth, ours=True, spec=kind)
        for kind in KINDS
    ]
    dtype = "bfloat16" if device == "cuda" else "float32"
    return Steps("step", dtype, tokens, tuple(raced), title="kinds of cache", batch=4, **sizes)


def cases(device, quick):
    """After few and after many tokens."""
    for tokens in (1024,) if quick else (4096, 16384):
        yield _race(device, tokens)


def targets(device):
    """Half of the tokens are read in less time than all of them."""
    name = _race(device, 16384).name
    yield Target(
        "a step over half of 16384 tokens, each head its own, against all of them",
        Ratio((name, f"effattn {FULL}"), (name, f"effattn {HALF}")),
        SOURCE,
        least=1.5,
    )
