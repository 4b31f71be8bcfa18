"""What `bench_attention` races: who, on what, and whether the answer is right.

A contender is a kind (who) and the pattern it is asked for, which is also what its answer is held to: SDPA runs dense
causal attention beside the others' windows, and has to get that right. Shapes: q (B, Hq, Tq, D), k, v (B, Hkv, T, D).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from effattn.kernels import decode, flash
from effattn.kernels.flash import Blocks, Pattern, Window
from effattn.kernels.flash.reference import attention as reference

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# RMS(error) / RMS(truth) that an answer may have; a gradient, which rounds more often, twice that.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.005, "float16": 0.005}
SAMPLES = 32  # queries that are checked, spread over the sequence


@dataclass(frozen=True)
class Contender:
    """`kind` is a key of `BUILDERS`; `tokens` overrides the case's."""

    kind: str
    pattern: Pattern
    tokens: int | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {_label(self.pattern)}" + (f" at {self.tokens}" if self.tokens else "")


@dataclass(frozen=True)
class Case:
    """One race. `what` is "forward", "forward+backward" or "decode" (one query, everything in the cache)."""

    what: str
    dtype: str
    tokens: int
    contenders: tuple[Contender, ...]
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    title: str = ""

    @property
    def name(self) -> str:
        shape = f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.dim} T{self.tokens}"
        return " ".join(filter(None, (self.what, self.title, self.dtype, shape)))

    def kv_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.tokens * self.dim * getattr(torch, self.dtype).itemsize

    def inputs(self, tokens: int, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Random q, k, v, which want gradients where the case is about them."""
        draw = torch.Generator(device).manual_seed(seed)
        shapes = (self.heads, 1 if self.what == "decode" else tokens), (self.kv_heads, tokens), (self.kv_heads, tokens)
        made = [
            torch.randn(self.batch, *shape, self.dim, generator=draw, device=device, dtype=getattr(torch, self.dtype))
            for shape in shapes
        ]
        return [x.requires_grad_(self.what == "forward+backward") for x in made]

    def described(self) -> dict:
        """Its shapes, JSON-able."""
        return {name: value for name, value in asdict(replace(self, contenders=())).items() if name != "contenders"}


class Absent(Exception):
    """This contender cannot run here; the text says why."""


def _label(pattern: Pattern) -> str:
    first = f" + {pattern.first} sinks" if pattern.first else ""
    if isinstance(pattern, Window):
        return f"window {pattern.back}{first}"
    if isinstance(pattern, Blocks):
        return f"block {pattern.size}" + (f", {pattern.look_back} back" if pattern.look_back else "") + first
    return "dense"


# Who -------------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend | None):
    def build(contender: Contender, case: Case, tokens: int, device: torch.device) -> Call:
        if type(contender.pattern) is not Pattern:
            raise Absent("it has dense attention only")
        options = {"is_causal": case.what != "decode", "enable_gqa": case.heads != case.kv_heads}

        def call(q, k, v):
            if backend is None:
                return scaled_dot_product_attention(q, k, v, **options)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, **options)

        return call

    return build


def _flex(contender: Contender, case: Case, tokens: int, device: torch.device) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern, queries = contender.pattern, 1 if case.what == "decode" else tokens

    def visible(b, h, i, j):
        i = i + (tokens - queries)
        near = pattern.near(i, j, h, case.heads)
        return j <= i if near is None else (j <= i) & near

    torch._dynamo.reset()  # it gives up after a few shapes otherwise
    mask = create_block_mask(visible, None, None, queries, tokens, device=device)
    run = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def _local_attention(contender: Contender, case: Case, tokens: int, device: torch.device) -> Call:
    try:
        from local_attention import LocalAttention
    except ImportError as error:
        raise Absent(f"not installed: {error}") from None
    if not isinstance(contender.pattern, Window) or contender.pattern.first or case.heads != case.kv_heads:
        raise Absent("it has plain windows of as many key as query heads only")
    # Its window counts the keys before the query's own; without `exact_windowsize` queries see one to two windows.
    run = LocalAttention(
        contender.pattern.back - 1, causal=True, look_backward=1, look_forward=0, autopad=True, exact_windowsize=True,
        use_rotary_pos_emb=False,
    )  # fmt: skip
    return lambda q, k, v: run(q, k, v)


def _ours(contender: Contender, case: Case, tokens: int, device: torch.device) -> Call:
    attention = decode.attention if case.what == "decode" else flash.attention
    impl = flash.choose("auto", device)
    return lambda q, k, v: attention(q, k, v, contender.pattern, impl=impl)


BUILDERS = {
    "sdpa": _sdpa(None),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
    "local-attention": _local_attention,
    "ours": _ours,
}


# Is it right -----------------------------------------------------------------------------------------------------


def prepare(contender: Contender, case: Case, inputs: list[Tensor]) -> tuple[Call, float]:
    """The contender's call, compiled and checked, and its largest relative error; Absent where it cannot run,
    ArithmeticError where its answer is wrong."""
    device, tokens = inputs[1].device, inputs[1].shape[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = BUILDERS[contender.kind](contender, case, tokens, device)
            got = _answers(call, inputs, case, _samples(inputs[0].shape[2], device))
    except Absent:
        raise
    except Exception as error:  # a peer that this version, device or shape does not suit: whatever it raises
        if contender.kind == "ours" and not isinstance(error, torch.OutOfMemoryError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Absent(f"{type(error).__name__}: {' '.join(lines[:2])[:200]}") from None
    truth = _truth(contender.pattern, inputs, case, _samples(inputs[0].shape[2], device))
    worst = 0.0
    for which, one, right in zip(("output", "dq", "dk", "dv"), got, truth, strict=False):
        error = float(_rms(one.double() - right) / _rms(right))
        limit = TOLERANCE[case.dtype] * (1 if which == "output" else 2)
        if not error <= limit:  # NaN too
            raise ArithmeticError(f"wrong {which}: relative error {error:.2e}, at most {limit:.0e} is right")
        worst = max(worst, error)
    return call, worst


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _samples(queries: int, device) -> Tensor:
    """Numbers of the queries to check: the first, the last, and others anywhere."""
    draw = torch.randint(0, queries, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, queries - 1]), draw]).unique().to(device)


def _upstream(shape, rows: Tensor, like: Tensor) -> Tensor:
    """A gradient for the output that is zero but for the sampled queries: then theirs are the only ones that count."""
    draw = torch.Generator(like.device).manual_seed(1)
    some = torch.randn(*shape[:2], len(rows), shape[3], generator=draw, device=like.device, dtype=like.dtype)
    return torch.zeros(shape, device=like.device, dtype=like.dtype).index_copy(2, rows, some)


def _answers(call: Call, inputs: list[Tensor], case: Case, rows: Tensor) -> list[Tensor]:
    out = call(*inputs)
    if case.what != "forward+backward":
        return [out[:, :, rows]]
    dq, dk, dv = torch.autograd.grad(out, inputs, _upstream(out.shape, rows, out))
    return [out.detach()[:, :, rows], dq[:, :, rows], dk, dv]


def _truth(pattern: Pattern, inputs: list[Tensor], case: Case, rows: Tensor) -> list[Tensor]:
    """The definition's answers for the sampled queries, in fp64."""
    q, k, v = (x.detach().double() for x in inputs)
    keys, queries = k.shape[2], q.shape[2]
    heads = torch.arange(case.heads, device=q.device)[:, None, None]
    at = torch.arange(keys, device=q.device)
    seen = pattern.sees((rows + keys - queries)[None, :, None], at[None, None], heads, case.heads, True)[None]
    leaves = [x.requires_grad_(case.what == "forward+backward") for x in (q[:, :, rows], k, v)]
    out, _ = reference(*leaves, seen, scale=case.dim**-0.5)
    if case.what != "forward+backward":
        return [out]
    upstream = _upstream((*q.shape[:3], v.shape[3]), rows, inputs[0]).double()[:, :, rows]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
