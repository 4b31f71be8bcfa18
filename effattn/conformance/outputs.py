"""Properties of one call: what it gives, and its gradients. Each gives the largest error, or None
(no number).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from .case import RMS_RATIO, SLACK, Case, Violation, inputs, relative


def accuracy(case: Case) -> float:
    """Against the fp64 reference: at most twice plain torch's error in this dtype, at every
    length.
    """
    worst = 0.0
    for tokens in case.lengths:
        for mask in (None, case.padded("left", tokens), case.padded("right", tokens)):
            q, k, v = case.inputs(tokens)
            truth, got, plain = (
                case.reference(q, k, v, mask),
                case.run(q, k, v, mask),
                case.plain(q, k, v, mask),
            )
            if got.dtype != case.dtype or got.shape != truth.shape:
                raise Violation(
                    f"expected {tuple(truth.shape)} {case.dtype}, got {tuple(got.shape)} "
                    f"{got.dtype}"
                )
            real = slice(None) if mask is None else mask
            got, truth = got.transpose(1, 2)[real], truth.transpose(1, 2)[real]
            budget = 4 * SLACK[case.dtype]
            if plain is not None:
                budget = 2 * relative(plain.transpose(1, 2)[real], truth) + SLACK[case.dtype]
            padded = "" if mask is None else ", padded"
            worst = max(worst, case.close(got, truth, f"{tokens} tokens{padded}", budget))
    return worst


def last_queries(case: Case) -> float | None:
    """Queries that are the last of the keys get what they get among all of them, whether there are
    few or many. None for methods that see everything at once."""
    if not case.causal:
        return None
    q, k, v = case.inputs(case.long)
    whole = case.run(q, k, v)
    few, many = 3, case.long - 2
    return max(
        case.close(case.run(q[:, :, -n:], k, v), whole[:, :, -n:], f"the last {n} queries")
        for n in (few, many)
    )


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
    """Padding on either side changes nothing, whatever it holds: a row alone and unpadded is the
    same.
    """
    worst = 0.0
    for side in ("left", "right"):
        q, k, v = case.inputs(case.long)
        mask = case.padded(side, case.long)
        out = case.run(q, k, v, mask)
        filled = [torch.where(mask[:, None, :, None], x, 100.0) for x in (q, k, v)]
        if not torch.equal(
            case.run(*filled, mask).transpose(1, 2)[mask], out.transpose(1, 2)[mask]
        ):
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


def batch(case: Case) -> float:
    """A row is the same alone and in a batch, and no rows give none."""
    q, k, v = case.inputs(case.long)
    if case.run(*(x[:0] for x in (q, k, v))).shape[:3] != (0, *q.shape[1:3]):
        raise Violation("a batch of no rows gives something else")
    together = case.run(q, k, v)
    rows = [case.run(*(x[row : row + 1] for x in (q, k, v))) for row in range(case.rows)]
    return case.close(torch.cat(rows), together, "rows alone")


def grouped_heads(case: Case) -> float:
    """GQA is the same as repeating each key/value head for its group; where a group decides
    together, if all its query heads are the same one."""
    q, k, v = case.inputs(case.long)
    groups = q.shape[1] // k.shape[1]
    if case.backend.group_decides:
        q = q[:, ::groups].repeat_interleave(groups, 1)
    wide = copy.copy(case)
    wide.backend = case.backend.repeated(groups)
    repeated = wide.run(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    return case.close(case.run(q, k, v), repeated, "repeated heads")


def gradients(case: Case) -> float:
    """Of q, k, v and the backend's parameters: RMS error under 0.005 of the fp64 reference's (half
    precision: or twice plain torch's)."""
    worst = 0.0
    for tokens in dict.fromkeys((case.lengths[len(case.lengths) // 2], case.long)):
        for mask in (None, case.padded("left", tokens)):
            given = case.inputs(tokens)
            loss = inputs(tokens, torch.float64, case.device, case.seed + 1, case.sizes)[0]
            loss = loss if mask is None else loss * mask[:, None, :, None]
            found = {}
            for name, run in (("ours", case.run), ("truth", case.reference), ("plain", case.plain)):
                leaves = [x.detach().clone().requires_grad_() for x in given]
                own = (
                    list((case.truth if name == "truth" else case.backend).parameters())
                    if name != "plain"
                    else []
                )
                with torch.enable_grad():
                    out = run(*leaves, mask)
                    if out is None:
                        continue
                    loss_of = (out.double() * loss).sum()
                    found[name] = torch.autograd.grad(loss_of, leaves + own, materialize_grads=True)
            for place, (ours, truth) in enumerate(zip(found["ours"], found["truth"], strict=True)):
                budget = max(
                    RMS_RATIO, 4 * SLACK[case.dtype] if case.dtype == torch.bfloat16 else 0.0
                )
                if place < 3 and "plain" in found:
                    budget = max(RMS_RATIO, 2 * relative(found["plain"][place], truth))
                which = "qkv"[place] if place < 3 else f"parameter {place - 3}"
                worst = max(worst, case.close(ours, truth, f"{tokens} tokens, d{which}", budget))
    return worst


def gradcheck(case: Case) -> None:
    """The reference's own gradients against finite differences, in fp64."""
    # of this size: they cannot be cut
    made_for_heads = any(x.ndim > 1 for x in case.truth.state_dict().values())
    tokens, dims = (3, case.sizes[-1]) if made_for_heads else (5, 3)
    given = [
        x[:1, :, :, :dims].double().clone()
        for x in inputs(tokens, seed=case.seed, sizes=case.sizes)
    ]
    q, k, v = (
        x.requires_grad_(name not in case.backend.straight_through)  # by definition not the slope
        for name, x in zip("qkv", given, strict=True)
    )
    truth = copy.deepcopy(case.truth).cpu()
    with torch.enable_grad():
        torch.autograd.gradcheck(lambda *x: truth(*x, causal=case.causal), (q, k, v))


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
