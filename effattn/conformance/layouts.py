"""Properties of storage: where the numbers of q, k, v and of the output's gradient lie changes
nothing.

Each layout gives a view with the same numbers (`expanded` ones: some of them, many times). They are
compared with copies in the usual order, since what is repeated differs from what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .case import Case, Violation, inputs


def tokens_outside(x: Tensor) -> Tensor:
    """What transformers hands over: storage (B, T, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def transposed(x: Tensor) -> Tensor:
    """Storage (B, H, D, T): the last dimension is not dense."""
    return x.mT.contiguous().mT


def every_third(x: Tensor) -> Tensor:
    """The same numbers, every third of a row in memory."""
    wide = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), 100.0)
    wide[..., ::3] = x
    return wide[..., ::3]


def inside(x: Tensor) -> Tensor:
    """A part of a fused projection, not from its beginning on: storage (B, T, H, 3 D)."""
    batch, heads, tokens, dim = x.shape
    wide = x.new_full((batch, tokens + 2, heads, 3 * dim), 100.0).transpose(1, 2)
    wide[:, :, 1:-1, dim : 2 * dim] = x
    return wide[:, :, 1:-1, dim : 2 * dim]


def rows_expanded(x: Tensor) -> Tensor:
    """All rows are the first one, in the same memory."""
    return x[:1].expand_as(x)


def heads_expanded(x: Tensor) -> Tensor:
    """All heads are the first one, in the same memory."""
    return x[:, :1].expand_as(x)


def tokens_overlapping(x: Tensor) -> Tensor:
    """A token's first half is the second one of the token before, in the same memory."""
    tokens, dim = x.shape[2:]
    step = max(dim // 2, 1)
    held = x.flatten(2)[..., : (tokens - 1) * step + dim].contiguous()
    return held.as_strided(x.shape, (held.stride(0), held.stride(1), step, 1))


def numbers_expanded(x: Tensor) -> Tensor:
    """All numbers of a token are the first one, in the same memory."""
    return x[..., :1].expand_as(x)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    transposed,
    tokens_outside,
    every_third,
    rows_expanded,
    inside,
    numbers_expanded,
    heads_expanded,
    tokens_overlapping,
)


def layouts(case: Case) -> float:
    """Every layout of q, k, v, the output's gradient and the mask, also token by token: as if they
    were copied first. Nothing is written to what was given, and nothing that comes back lies in its
    memory."""
    tokens = case.lengths[-1]
    drawn = [
        *case.inputs(tokens),
        inputs(tokens, case.dtype, case.device, case.seed + 1, case.sizes)[0],
    ]
    mask = torch.stack([case.padded("left", tokens), case.padded("right", tokens)], dim=2)[..., 0]
    interpreted = case.backend.impl == "triton" and torch.device(case.device).type == "cpu"
    worst = 0.0
    # all would take the interpreter minutes
    for n in range(0, len(LAYOUTS), 4 if interpreted else 1):
        chosen = [LAYOUTS[(n + m) % len(LAYOUTS)] for m in range(4)]
        views = [change(x) for change, x in zip(chosen, drawn, strict=True)]
        copies, before = (
            [x.clone(memory_format=torch.contiguous_format) for x in views] for _ in range(2)
        )
        what = "q {}, k {}, v {}, gradient {}".format(*(change.__name__ for change in chosen))
        real = None if n % 2 else mask
        for name, got, expected in zip(
            ("output", "dq", "dk", "dv"),
            _both_ways(case, views, real),
            _both_ways(case, copies, real),
            strict=True,
        ):
            worst = max(worst, case.close(got, expected, f"{name} of {what}"))
        if case.causal:
            worst = max(
                worst,
                case.close(_in_steps(case, views), _in_steps(case, copies), f"decoding {what}"),
            )
        if not all(map(torch.equal, views, before)):
            raise Violation(f"{what}: something was written to the inputs")
    return worst


def _both_ways(case: Case, given: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    *leaves, grad = (x.detach() for x in given)
    leaves = [x.requires_grad_() for x in leaves]
    with torch.enable_grad():
        out = case.run(*leaves, mask)
    memory = {x.untyped_storage().data_ptr() for x in given}
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)]
    if any(x.untyped_storage().data_ptr() in memory for x in found):
        raise Violation("what comes back lies in the memory of what was given")
    return found


def _in_steps(case: Case, given: list[Tensor]) -> Tensor:
    """The output of a chunk and of single tokens, through a state."""
    tokens = given[0].shape[2]
    cuts = [0, *(n for n in (tokens - 4, tokens - 3, tokens - 2) if n > 0), tokens]
    state = case.backend.new_state()
    parts = [
        case.run(*(x[:, :, low:high] for x in given[:3]), state=state)
        for low, high in pairwise(cuts)
    ]
    return torch.cat(parts, dim=2)
