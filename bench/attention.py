"""Cases of attention, and their contenders: `ours(spec)` and `peer(who, spec)`.

    both = [ours("sliding(window=512)"), peer("flex_attention", "sliding(window=512)")]
    race("forward", "float32", 4096, both)
    growth("sliding(window=512)", time=1, memory=1, lengths=(8192, 16384, 32768))

A contender's spec is also the truth that its answer is held to: SDPA runs "dense" beside the
others' windows, and has to get that right. Shapes: q (B, Hq, Tq, D), k, v (B, Hkv, T, D)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

import effattn
from bench.case import Call, Case, Contender, Defined
from bench.peers import PEERS, find
from effattn.interface import Backend, Cost, Shape
from effattn.kernels.flash.reference import attention as reference

SAMPLES = 32  # queries that are checked, spread over the sequence
CHECKED = 512  # tokens at which methods are checked whose truth is their own reference, all of it
STEPS = 64  # more than a case of steps makes: they stay within a block that ends at `tokens`
COLD = 2**30  # bytes of caches that take turns on a GPU
# Which share of the device's peak plans expect, by backend: exponentials, sorting and gathering are
# no operations.
EFFICIENCY = {"linear": 0.14, "performer": 0.3, "lsh": 0.1, "topk": 0.2, "linformer": 0.6}


@dataclass(frozen=True)
class Attention(Case):
    """`what`: "forward"; "forward+backward"; "decode", one query over a given cache; "step",
    decoding with a state that gets one more token at each call and holds `tokens` after the last
    (inputs: q, k, v of the new token, then the past's k, v). time_first: inputs are views of (B, T,
    H, D), as a model's projections leave them."""

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    causal: bool = True
    time_first: bool = False

    @property
    def shape(self) -> str:
        """The sizes, as names of cases have them: "B1 H8/2 D64 T4096"."""
        return f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.dim} T{self.tokens}"

    @property
    def group(self) -> str:
        """What cases of one table have in common: all but the length."""
        sizes = f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.dim}"
        return " ".join(filter(None, (self.what, self.title, self.dtype, sizes)))

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return getattr(torch, self.dtype).itemsize

    @property
    def training(self) -> bool:
        """Whether gradients are computed, too."""
        return self.what == "forward+backward"

    def inputs(self, tokens: int, device: torch.device, seed: int = 0) -> list[Tensor]:
        draw = torch.Generator(device).manual_seed(seed)
        few = 1 if self.what in ("decode", "step") else tokens
        new = 1 if self.what == "step" else tokens
        shapes = [(self.heads, few), (self.kv_heads, new), (self.kv_heads, new)]
        shapes += [(self.kv_heads, tokens - STEPS)] * 2 * (self.what == "step")
        made = [
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
        if self.time_first:
            made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
        return [x.requires_grad_(self.training) for x in made]

    def sets(self, device: torch.device) -> int:
        size = 2 * self.batch * self.kv_heads * self.tokens * self.dim * self.itemsize
        return (
            max(2, math.ceil(COLD / size)) if self.what == "decode" and device.type == "cuda" else 1
        )

    def once(self, call: Call, inputs: list[Tensor]) -> object:
        if not self.training:
            return super().once(call, inputs)
        out = call(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    def answers(self, call: Call, inputs: list[Tensor]) -> dict[str, Tensor]:
        rows = _samples(inputs[0].shape[2], inputs[0].device)
        if not self.training:
            with torch.no_grad():
                return {"output": call(*inputs)[:, :, rows]}
        return _with_gradients(call(*inputs), inputs, inputs, rows)

    def cost(self, contender: Contender) -> Cost | None:
        if not contender.spec:
            return None
        keys = self.length(contender) - (STEPS - 1 if self.what == "step" else 0)
        queries = 1 if self.what in ("decode", "step") else keys
        sizes = (self.batch, self.heads, self.kv_heads, queries, keys, self.dim)
        attn, shape = (
            effattn.backend(contender.spec),
            Shape(*sizes, itemsize=self.itemsize, causal=self.causal),
        )
        cost = attn.cost(shape)
        return (
            cost + replace(attn.cost(replace(shape, backward=True)), state_bytes=0)
            if self.training
            else cost
        )


# Rows
# -------------------------------------------------------------------------------------------------


def race(
    what: str, dtype: str, tokens: int, contenders: Iterable[Contender], **settings
) -> Attention:
    """One case; settings are fields of `Attention`."""
    return Attention(what, dtype, tokens, tuple(contenders), **settings)


def growth(
    spec: str | Callable[[int], str],
    time: float,
    memory: float,
    lengths: Sequence[int],
    what: str = "forward",
    dtype: str = "float32",
    title: str = "",
    **settings,
) -> Attention:
    """One backend against itself at `lengths`, with the exponents of time and memory that it
    declares. `spec` may depend on the length (a stride that is its square root)."""
    at = spec if callable(spec) else lambda tokens: spec
    # one of each spec, so that it is checked once
    built = {name: ours(name) for name in map(at, lengths)}
    raced = [
        replace(built[at(tokens)], name=length_name(tokens), tokens=tokens) for tokens in lengths
    ]
    title = f"growth {title or at(lengths[0])}"
    return race(what, dtype, max(lengths), raced, title=title, declared=(time, memory), **settings)


def length_name(tokens: int) -> str:
    """The name of the contender of that length, in a case of `growth`."""
    return f"T={tokens}"


def ours(spec: str, **settings) -> Contender:
    """The backend `spec` of this package; settings are fields of `Contender`."""
    efficiency = EFFICIENCY.get(effattn.backend(spec).name, 0.4)
    return _contender(
        "effattn", spec, _ours, **{"ours": True, "efficiency": efficiency, **settings}
    )


def peer(who: str, spec: str, **settings) -> Contender:
    """`who`, a name in `PEERS`, doing what `spec` says."""
    entry = PEERS[who]
    settings = {"setup": entry.setup, "efficiency": entry.efficiency, **settings}
    return _contender(who, spec, partial(_peer, who, spec), **settings)


def _contender(who: str, spec: str, build: Callable, **settings) -> Contender:
    exact = effattn.backend(spec).traits.exact
    settings = {"check_tokens": None if exact else CHECKED, **settings}
    build = partial(_ours, spec) if build is _ours else build
    return Contender(f"{who} {spec}", build, partial(truth, spec), spec=spec, **settings)


def _ours(spec: str, case: Attention, inputs: list[Tensor]) -> Call:
    attn = effattn.backend(spec).to(inputs[0].device)
    if case.what != "step":
        return lambda q, k, v: attn(q, k, v, causal=case.causal)
    state, past = attn.new_state(), inputs[3:]
    if attn.traits.exact:
        state.append(*past)
    else:  # what is remembered is made by attending
        with torch.no_grad():
            attn(past[0].repeat_interleave(case.heads // case.kv_heads, dim=1), *past, state=state)
    return lambda q, k, v, *past: attn(q, k, v, state=state)


def _peer(who: str, spec: str, case: Attention, inputs: list[Tensor]) -> Call:
    return find(who)(effattn.backend(spec).to(inputs[0].device), case, inputs)


# Truth
# -------------------------------------------------------------------------------------------------


def truth(spec: str, case: Attention, inputs: list[Tensor], call: Call) -> dict[str, Tensor]:
    """The answers of the definition of `spec`, in fp64: softmax over what it shows, for the sampled
    queries; for a method that is no such thing its own reference, and what a peer says of itself
    (`Defined`)."""
    q, k, v = (x.detach().double() for x in inputs[:3])
    if case.what == "step":
        k, v = (
            torch.cat([past.double(), new], dim=2)
            for past, new in zip(inputs[3:], (k, v), strict=True)
        )
    attn = effattn.backend(spec).to(q.device)
    rows = _samples(q.shape[2], q.device)
    if not attn.traits.exact or isinstance(call, Defined):
        leaves = [
            x.requires_grad_(case.training)
            for x in (pad(q, (0, 0, k.shape[2] - q.shape[2], 0)), k, v)
        ]
        if isinstance(call, Defined):
            out = call.definition(*leaves)
        else:
            out = (
                effattn.backend(spec, impl="reference")
                .to(q.device)
                .double()(*leaves, causal=case.causal)
            )
        return (
            _with_gradients(out, leaves, inputs, rows)
            if case.training
            else {"output": out[:, :, -q.shape[2] :][:, :, rows]}
        )
    seen = _seen(attn, case, rows, q.shape[2], k.shape[2])
    leaves = [x.requires_grad_(case.training) for x in (q[:, :, rows], k, v)]
    out, _ = reference(*leaves, seen, scale=case.dim**-0.5)
    if not case.training:
        return {"output": out}
    upstream = _upstream((*q.shape[:3], v.shape[3]), rows, inputs[0]).double()[:, :, rows]
    return dict(
        zip(
            ("output", "dq", "dk", "dv"),
            (out.detach(), *torch.autograd.grad(out, leaves, upstream)),
            strict=True,
        )
    )


def _seen(attn: Backend, case: Attention, rows: Tensor, queries: int, keys: int) -> Tensor:
    """(1, Hq, rows, keys): how often each sampled query sees each key."""
    heads = torch.arange(case.heads, device=rows.device)[:, None, None]
    at = torch.arange(keys, device=rows.device)
    i = (rows + keys - queries)[None, :, None]
    return attn.sees(i, at[None, None], heads, case.heads, case.causal).expand(case.heads, -1, -1)[
        None
    ]


def _with_gradients(
    out: Tensor, leaves: list[Tensor], inputs: list[Tensor], rows: Tensor
) -> dict[str, Tensor]:
    upstream = _upstream(out.shape, rows, inputs[0]).to(out.dtype)
    # some do not look at k
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream, materialize_grads=True)
    return {"output": out.detach()[:, :, rows], "dq": dq[:, :, rows], "dk": dk, "dv": dv}


def _samples(queries: int, device: torch.device) -> Tensor:
    """Numbers of the queries to check: the first, the last, and others anywhere."""
    draw = torch.randint(0, queries, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, queries - 1]), draw]).unique().to(device)


def _upstream(shape: Sequence[int], rows: Tensor, like: Tensor) -> Tensor:
    """A gradient for the output that is zero but for the sampled queries: then theirs are the only
    ones that count.
    """
    draw = torch.Generator(like.device).manual_seed(1)
    some = torch.randn(
        *shape[:2], len(rows), shape[3], generator=draw, device=like.device, dtype=like.dtype
    )
    return torch.zeros(tuple(shape), device=like.device, dtype=like.dtype).index_copy(2, rows, some)
