"""Properties of states: decoding, bytes, beams and rollback; and of saved parameters."""

from __future__ import annotations

import copy

import torch

from effattn.interface import Shape

from .case import Case, Violation


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
        for chunks in (
            [1] * tokens,
            [5, 1, 1, 3, tokens - 10] if tokens > 10 else [tokens],
            [tokens - 1, 1],
        ):
            state, steps, at = case.backend.new_state(), [], 0
            for size in chunks:
                part = [x[:, :, at : at + size] for x in (q, k, v)]
                at += size
                steps.append(
                    case.run(*part, None if mask is None else mask[:, :at], state=state)
                    if size
                    else part[0]
                )
            if state.seq_len != tokens:
                raise Violation(f"the state says {state.seq_len} tokens after {tokens}")
            got = torch.cat(steps, dim=2).transpose(1, 2)[real]
            worst = max(
                worst,
                case.close(
                    got, whole.transpose(1, 2)[real], f"chunks {chunks[:4]}, padding {side}"
                ),
            )
    return worst


def state_bytes(case: Case) -> float | None:
    """A state holds as many bytes as `cost` declares, at every length."""
    if not case.causal:
        return None
    for tokens in {*case.lengths, 3 * case.long}:
        q, k, v = case.inputs(tokens)
        state = case.backend.new_state()
        case.run(q, k, v, state=state)
        *heads, dim = case.sizes
        declared = case.backend.cost(
            Shape(*heads, tokens, tokens, dim, dim, q.element_size())
        ).state_bytes
        if state.nbytes != declared:
            raise Violation(
                f"{tokens} tokens: the state holds {state.nbytes} bytes, cost declares {declared}"
            )
    return 0.0


def state_moves(case: Case) -> float | None:
    """Beam search and rollback: reorder, select, repeat, crop and reset do to the state what they
    say.
    """
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
    expected, saved = (
        case.run(q, k, v),
        {name: x.clone() for name, x in case.backend.state_dict().items()},
    )
    other = copy.deepcopy(case.backend)
    for tensor in other.state_dict().values():
        tensor.fill_(0.5)
    other.load_state_dict(saved)
    if not torch.equal(other(q, k, v, causal=case.causal), expected):
        raise Violation("the copy computes something else")
    return 0.0
