"""Documents in a row: a packed batch gives what its documents give one by one, both ways.

Shapes: q (B, Hq, T, D), k and v (B, Hkv, T, D), numbers (B, T)."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, Violation, inputs


def documents(case: Case) -> float:
    """Output and gradients of rows of documents, some of one token, with padding behind, between
    and in them, against each document by itself; nothing of another document, and nothing that
    padding holds, changes a bit."""
    given = [
        *case.inputs(case.long),
        inputs(case.long, case.dtype, case.device, case.seed + 1, case.sizes)[0],
    ]
    numbers = _numbers(case)
    worst = 0.0
    for mask in (None, case.padded("right", case.long)):
        packed = _both_ways(case, given, numbers, mask)
        alone = [torch.zeros_like(x) for x in packed]
        for row, at in _each(numbers, mask):
            one = [x[row : row + 1, :, at] for x in given]
            for whole, part in zip(alone, _both_ways(case, one), strict=True):
                whole[row, :, at] = part[0]
        for name, got, expected in zip(("output", "dq", "dk", "dv"), packed, alone, strict=True):
            worst = max(worst, case.close(got, expected, f"{name} of documents in rows"))
    middle = numbers[0, case.long // 2]
    kept = numbers[0] == middle
    other = (numbers != middle)[:, None, :, None]
    changed = [torch.where(other, x * -3 + 7, x) for x in given[:3]]
    before, after = (case.run(*x, documents=numbers)[0][:, kept] for x in (given[:3], changed))
    if not torch.equal(before, after):
        raise Violation("changing other documents changed a document")
    return worst


def _numbers(case: Case) -> Tensor:
    """(B, T) int64: documents of the lengths that the case tries, in another order in each row; the
    last tokens of the last row are padding."""
    found = []
    for row in range(case.rows):
        lengths = [*case.lengths[row:], *case.lengths[:row]]
        tokens = [n for n, length in enumerate(lengths * case.long) for _ in range(length)]
        found.append(tokens[: case.long])
    numbers = torch.tensor(found, device=case.device)
    numbers[-1, case.long - case.long // 5 :] = -1
    return numbers


def _each(numbers: Tensor, mask: Tensor | None):
    """(row, its tokens) of each document."""
    for row, own in enumerate(numbers):
        real = own >= 0 if mask is None else mask[row] & (own >= 0)
        for number in own[real].unique().tolist():
            yield row, (real & (own == number)).nonzero()[:, 0]


def _both_ways(
    case: Case, given: list[Tensor], numbers: Tensor | None = None, mask: Tensor | None = None
) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    *leaves, grad = given
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with torch.enable_grad():
        q, k, v = leaves
        out = case.run(q, k, v, mask, documents=numbers)
        found = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    return [out.detach(), *found]
