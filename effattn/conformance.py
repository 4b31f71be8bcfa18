"""What every attention backend must keep to, as one call that you can run on your own.

    effattn.conformance.check("sliding(window=5, sinks=2)")
    report = effattn.conformance.check(MyBackend(window=5), dtype=torch.bfloat16, causal=False)
    print(report)                                     # each property, and the largest error found

A property that does not hold raises `Violation`, naming it. "Close" is measured, not guessed: at most twice the error
of plain torch in the same dtype, both against the backend's own fp64 reference, or 0.005 of its RMS (gradients).

Shapes: q (B, Hq, T, D), k and v (B, Hkv, T, D).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.interface import Backend, Shape
from effattn.kernels.flash.pattern import layout_of
from effattn.registry import backend as by_name

SIZES = (3, 4, 2, 16)  # batch, query heads, key/value heads, head size
RMS_RATIO = 0.005  # of gradients, and of outputs that no plain torch formula exists for
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one rounding, about


class Violation(AssertionError):
    """A property that the backend does not have."""


@dataclass
class Report:
    """What was checked: property -> the largest relative RMS error (0.0: bit for bit; None: holds, no number)."""

    backend: str
    setting: str
    properties: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.setting}"]
        for name, error in self.properties.items():
            lines.append(
                f"  {name:<20} {'holds' if error is None else 'bit for bit' if error == 0 else f'{error:.1e}'}"
            )
        return "\n".join(lines)


def check(
    backend: str | Backend,
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lengths: tuple[int, ...] = (1, 2, 4, 5, 6, 13, 37),
    sizes: tuple[int, int, int, int] = SIZES,
    properties: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Report:
    """Checks `backend` (a spec, or a `Backend`) with random inputs. Raises Violation at the first broken property.

    A backend is run as it is, its `impl` included, and held to a copy of itself whose `impl` is "reference".
    lengths: of the sequences; choose them around your windows. sizes: batch (2 or more), query heads, key/value heads,
    head size. properties: only these (`PROPERTIES` has all). ValueError for unknown ones, Unsupported for a direction
    that the backend's traits exclude (which is itself checked).
    """
    backend = (by_name(backend) if isinstance(backend, str) else copy.deepcopy(backend)).to(device).eval()
    for name in properties or ():
        check_choice("properties", name, PROPERTIES)
    setting = f"impl={backend.impl}, {str(dtype).removeprefix('torch.')}, {'causal' if causal else 'bidirectional'}"
    report = Report(str(backend), setting)
    if not getattr(backend.traits, "causal" if causal else "bidirectional"):
        q, k, v = inputs(4, dtype, device, seed, sizes)
        with contextlib.suppress(Unsupported):
            backend(q, k, v, causal=causal)
            raise Violation(f"{report.backend}: traits: causal={causal} is excluded, but it ran")
        raise Unsupported(f"{backend.name}: causal={causal} is excluded by its traits; it refuses, as it should")
    case = Case(backend, causal, dtype, device, tuple(lengths), seed, sizes)
    for name in properties or PROPERTIES:
        try:
            with torch.no_grad():
                report.properties[name] = PROPERTIES[name](case)
        except Violation as broken:
            raise Violation(f"{report.backend}, {setting}: {name}: {broken}") from None
    return report


def inputs(tokens: int, dtype=torch.float32, device="cpu", seed=0, sizes=SIZES) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, Hq, T, D), k and v (B, Hkv, T, D); sizes: B, Hq, Hkv, D."""
    draw = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, dim = sizes
    of = (torch.randn(batch, h, tokens, dim, generator=draw) for h in (heads, kv_heads, kv_heads))
    return tuple(x.to(device, dtype) for x in of)


@dataclass
class Case:
    """One backend in one setting, and how to run it."""

    backend: Backend
    causal: bool
    dtype: torch.dtype
    device: str | torch.device
    lengths: tuple[int, ...]
    seed: int
    sizes: tuple[int, int, int, int]

    def __post_init__(self):
        with torch.no_grad():  # parameters whose shape depends on the inputs exist from now on
            self.run(*self.inputs(self.long))
        self.truth = copy.deepcopy(self.backend).double()
        self.truth.impl = "reference"

    @property
    def long(self) -> int:
        return max(self.lengths)

    @property
    def rows(self) -> int:
        return self.sizes[0]

    def inputs(self, tokens: int):
        return inputs(tokens, self.dtype, self.device, self.seed + tokens, self.sizes)

    def run(self, q, k, v, mask=None, **options) -> Tensor:
        return self.backend(q, k, v, causal=self.causal, padding_mask=mask, **options)

    def reference(self, q, k, v, mask=None) -> Tensor:
        return self.truth(q.double(), k.double(), v.double(), causal=self.causal, padding_mask=mask)

    def plain(self, q, k, v, mask=None) -> Tensor | None:
        """The definition in plain torch operations and this dtype; None for backends that say no `counts`."""
        if not hasattr(self.backend, "counts"):
            return None
        from effattn.interface import Call

        groups = q.shape[1] // k.shape[1]
        counts = self.backend.counts(q, k, Call(self.causal, layout_of(mask), 1.0)).to(q.dtype)
        scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        weights = torch.softmax(scores + counts.log().clamp(min=torch.finfo(q.dtype).min), dim=-1)
        return (weights * (counts > 0).any(-1, keepdim=True)) @ v.repeat_interleave(groups, 1)

    def padded(self, side: str, tokens: int) -> Tensor:
        """(B, T) bool: row 0 has no padding, the others more and more of it, at least one real token each."""
        mask = torch.ones(self.rows, tokens, dtype=torch.bool, device=self.device)
        for row in range(1, self.rows):
            pads = min(row * max(1, tokens // self.rows), tokens - 1)
            if side == "left":
                mask[row, :pads] = False
            else:
                mask[row, tokens - pads :] = False
        return mask

    def close(self, got: Tensor, expected: Tensor, what: str, budget: float | None = None) -> float:
        """The relative RMS error; Violation above `budget` (default: a few roundings of this dtype)."""
        if not torch.isfinite(got).all():
            raise Violation(f"{what}: NaN or Inf")
        error = relative(got, expected)
        budget = 4 * SLACK[self.dtype] if budget is None else budget
        if not error <= budget:
            raise Violation(f"{what}: relative RMS error {error:.2e}, allowed are {budget:.2e}")
        return error


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative(got: Tensor, expected: Tensor) -> float:
    return rms(got.double() - expected.double()) / (rms(expected) or 1.0)


def accuracy(case: Case) -> float:
    """Against the fp64 reference: at most twice plain torch's error in this dtype, at every length."""
    worst = 0.0
    for tokens in case.lengths:
        for mask in (None, case.padded("left", tokens), case.padded("right", tokens)):
            q, k, v = case.inputs(tokens)
            truth, got, plain = case.reference(q, k, v, mask), case.run(q, k, v, mask), case.plain(q, k, v, mask)
            if got.dtype != case.dtype or got.shape != truth.shape:
                raise Violation(f"expected {tuple(truth.shape)} {case.dtype}, got {tuple(got.shape)} {got.dtype}")
            real = slice(None) if mask is None else mask
            got, truth = got.transpose(1, 2)[real], truth.transpose(1, 2)[real]
            budget = 4 * SLACK[case.dtype]
            if plain is not None:
                budget = 2 * relative(plain.transpose(1, 2)[real], truth) + SLACK[case.dtype]
            padded = "" if mask is None else ", padded"
            worst = max(worst, case.close(got, truth, f"{tokens} tokens{padded}", budget))
    return worst


def future(case: Case) -> float | None:
    """What comes later changes no earlier row by a single bit."""
    if not case.causal:
        return None
    q, k, v = case.inputs(case.long)
    before = case.run(q, k, v)
    for cut in {1, case.long // 2, case.long - 1}:
        later = [torch.cat([x[:, :, :cut], x[:, :, cut:] * -3 + 7], dim=2) for x in (q, k, v)]
        if not torch.equal(case.run(*later)[:, :, :cut], before[:, :, :cut]):
            raise Violation(f"changing tokens from {cut} on changed rows before")
    return 0.0


def padding(case: Case) -> float:
    """Padding on either side changes nothing, whatever it holds: a row alone and unpadded is the same."""
    worst = 0.0
    for side in ("left", "right"):
        q, k, v = case.inputs(case.long)
        mask = case.padded(side, case.long)
        out = case.run(q, k, v, mask)
        filled = [torch.where(mask[:, None, :, None], x, 100.0) for x in (q, k, v)]
        if not torch.equal(case.run(*filled, mask).transpose(1, 2)[mask], out.transpose(1, 2)[mask]):
            raise Violation(f"what {side} padding holds changes the result")
        for row in range(case.rows):
            real = mask[row]
            alone = case.run(*(x[row : row + 1, :, real] for x in (q, k, v)))
            worst = max(worst, case.close(out[row : row + 1, :, real], alone, f"{side}, row {row}"))
    return worst


def blind_rows(case: Case) -> float:
    """A query that sees no key gives 0, also when it is all padding."""
    q, k, v = case.inputs(case.long)
    mask = case.padded("left", case.long)
    mask[0] = False
    out = case.run(q, k, v, mask)
    if out[0].any() or not torch.isfinite(out).all():
        raise Violation("a row of padding only is not 0")
    if case.causal and out[-1][:, ~mask[-1]].any():
        raise Violation("padding on the left, which sees nothing, is not 0")
    return 0.0


def decode(case: Case) -> float | None:
    """One by one, in chunks, and all at once are the same, with and without padding."""
    if not case.causal:
        return None
    worst, tokens = 0.0, case.long
    q, k, v = case.inputs(tokens)
    for side in ("none", "left"):
        mask = None if side == "none" else case.padded(side, tokens)
        whole = case.run(q, k, v, mask)
        real = torch.ones(case.rows, tokens, dtype=torch.bool) if mask is None else mask
        for chunks in ([1] * tokens, [5, 1, 1, 3, tokens - 10] if tokens > 10 else [tokens], [tokens - 1, 1]):
            state, steps, at = case.backend.new_state(), [], 0
            for size in chunks:
                part = [x[:, :, at : at + size] for x in (q, k, v)]
                at += size
                steps.append(case.run(*part, None if mask is None else mask[:, :at], state=state) if size else part[0])
            if state.seq_len != tokens:
                raise Violation(f"the state says {state.seq_len} tokens after {tokens}")
            got = torch.cat(steps, dim=2).transpose(1, 2)[real]
            worst = max(worst, case.close(got, whole.transpose(1, 2)[real], f"chunks {chunks[:4]}, padding {side}"))
    return worst


def batch(case: Case) -> float:
    """A row is the same alone and in a batch."""
    q, k, v = case.inputs(case.long)
    together = case.run(q, k, v)
    rows = [case.run(*(x[row : row + 1] for x in (q, k, v))) for row in range(case.rows)]
    return case.close(torch.cat(rows), together, "rows alone")


def grouped_heads(case: Case) -> float:
    """GQA is the same as repeating each key/value head for its group."""
    q, k, v = case.inputs(case.long)
    groups = q.shape[1] // k.shape[1]
    wide = copy.deepcopy(case)
    for name in wide.backend.per_kv_head:  # what is learned for each K/V head is repeated with it
        tensor = getattr(wide.backend, name)
        tensor.data = tensor.data.repeat_interleave(groups, 0)
    repeated = wide.run(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    return case.close(case.run(q, k, v), repeated, "repeated heads")


def gradients(case: Case) -> float:
    """Of q, k, v and the backend's parameters: RMS error under 0.005 of the fp64 reference's (half precision: or twice
    plain torch's)."""
    worst = 0.0
    for tokens in dict.fromkeys((case.lengths[len(case.lengths) // 2], case.long)):
        for mask in (None, case.padded("left", tokens)):
            given = case.inputs(tokens)
            loss = inputs(tokens, torch.float64, case.device, case.seed + 1, case.sizes)[0]
            loss = loss if mask is None else loss * mask[:, None, :, None]
            found = {}
            for name, run in (("ours", case.run), ("truth", case.reference), ("plain", case.plain)):
                leaves = [x.detach().clone().requires_grad_() for x in given]
                own = list((case.truth if name == "truth" else case.backend).parameters()) if name != "plain" else []
                with torch.enable_grad():
                    out = run(*leaves, mask)
                    if out is None:
                        continue
                    loss_of = (out.double() * loss).sum()
                    found[name] = torch.autograd.grad(loss_of, leaves + own, materialize_grads=True)
            for place, (ours, truth) in enumerate(zip(found["ours"], found["truth"], strict=True)):
                budget = max(RMS_RATIO, 4 * SLACK[case.dtype] if case.dtype == torch.bfloat16 else 0.0)
                if place < 3 and "plain" in found:
                    budget = max(RMS_RATIO, 2 * relative(found["plain"][place], truth))
                which = "qkv"[place] if place < 3 else f"parameter {place - 3}"
                worst = max(worst, case.close(ours, truth, f"{tokens} tokens, d{which}", budget))
    return worst


def gradcheck(case: Case) -> None:
    """The reference's own gradients against finite differences, in fp64."""
    made_for_heads = any(x.ndim > 1 for x in case.truth.state_dict().values())  # of this size: they cannot be cut
    tokens, dims = (3, case.sizes[-1]) if made_for_heads else (5, 3)
    given = [x[:1, :, :, :dims].double().clone() for x in inputs(tokens, seed=case.seed, sizes=case.sizes)]
    q, k, v = (
        x.requires_grad_(name not in case.backend.straight_through)  # by definition not the slope
        for name, x in zip("qkv", given, strict=True)
    )
    truth = copy.deepcopy(case.truth).cpu()
    with torch.enable_grad():
        torch.autograd.gradcheck(lambda *x: truth(*x, causal=case.causal), (q, k, v))


def state_bytes(case: Case) -> float | None:
    """A state holds as many bytes as `cost` declares, at every length."""
    if not case.causal:
        return None
    for tokens in {*case.lengths, 3 * case.long}:
        q, k, v = case.inputs(tokens)
        state = case.backend.new_state()
        case.run(q, k, v, state=state)
        *heads, dim = case.sizes
        declared = case.backend.cost(Shape(*heads, tokens, tokens, dim, dim, q.element_size())).state_bytes
        if state.nbytes != declared:
            raise Violation(f"{tokens} tokens: the state holds {state.nbytes} bytes, cost declares {declared}")
    return 0.0


def state_moves(case: Case) -> float | None:
    """Beam search and rollback: reorder, select, repeat, crop and reset do to the state what they say."""
    if not case.causal:
        return None
    tokens = case.long
    q, k, v = case.inputs(tokens)
    worst, back = 0.0, min(4, tokens - 1)
    index = torch.tensor([case.rows - 1, 0, case.rows - 1][: case.rows], device=case.device)
    state = case.backend.new_state()
    part = lambda low, high, rows=slice(None): [x[rows, :, low:high] for x in (q, k, v)]  # noqa: E731
    case.run(*part(0, tokens - back), state=state)
    for at in range(tokens - back, tokens):  # what is taken back again came token by token
        case.run(*[x * -2 for x in part(at, at + 1)], state=state)
    state.crop(tokens - back)
    if state.seq_len != tokens - back:
        raise Violation(f"crop({tokens - back}): the state says {state.seq_len} tokens")
    state.reorder(index)
    got = case.run(*part(tokens - back, tokens, index), state=state)
    expected = case.run(*part(0, tokens, index))[:, :, tokens - back :]
    worst = max(worst, case.close(got, expected, "crop, then reorder"))
    state.crop(tokens - back)
    state.select(torch.tensor([1], device=case.device))
    state.repeat(2)
    got = case.run(*part(tokens - back, tokens, [0, 0]), state=state)
    worst = max(worst, case.close(got, expected[[1, 1]], "select, then repeat"))
    state.reset()
    if state.seq_len or state.nbytes:
        raise Violation("reset: tokens or bytes are left")
    whole = case.run(*part(0, tokens), state=state)
    return max(worst, case.close(whole, case.run(q, k, v), "after reset"))


def state_dict(case: Case) -> float:
    """A copy with other parameters that loads the state_dict computes the same, bit for bit."""
    q, k, v = case.inputs(case.long)
    expected, saved = case.run(q, k, v), {name: x.clone() for name, x in case.backend.state_dict().items()}
    other = copy.deepcopy(case.backend)
    for tensor in other.state_dict().values():
        tensor.fill_(0.5)
    other.load_state_dict(saved)
    if not torch.equal(other(q, k, v, causal=case.causal), expected):
        raise Violation("the copy computes something else")
    return 0.0


def poisoned_memory(case: Case) -> float:
    """Nothing that comes from uninitialised memory reaches the result or the gradients."""
    given = [x.requires_grad_() for x in case.inputs(case.long)]

    def both() -> list[Tensor]:
        with torch.enable_grad():
            out = case.run(*given)
            return [out.detach(), *torch.autograd.grad(out.double().sum(), given)]

    clean = both()
    with _nan_memory():
        poisoned = both()
    if not all(map(torch.equal, clean, poisoned)):
        raise Violation("uninitialised memory shows in the output or the gradients")
    return 0.0


@contextlib.contextmanager
def _nan_memory() -> Iterator[None]:
    """torch's ways to get uninitialised memory return NaN inside."""

    def poison(make: Callable) -> Callable:
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return filled

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


PROPERTIES: dict[str, Callable[[Case], float | None]] = {
    holds.__name__: holds
    for holds in (
        accuracy, future, padding, blind_rows, decode, batch, grouped_heads, gradients, gradcheck, state_bytes,
        state_moves, state_dict, poisoned_memory,
    )
}  # fmt: skip
