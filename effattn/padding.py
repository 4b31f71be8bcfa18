"""Padding anywhere in a row, for methods that know it on the left only.

A row's positions count its real tokens: `padding_mask.cumsum(1) - 1`, which is also what
transformers' `generate` passes as position_ids. So a row gives what it would give without its
padding, wherever that lies: on the left, on the right, or in the middle, where a second turn was
batched. Here real tokens are moved to the end of their row, the method runs, and what it gives goes
back to where its queries were. Padding gives 0 then.

A state holds its rows in the same way. New tokens of which some are padding would have to push the
old ones of their row aside; states that cannot do that hold each row by itself from then on
(`State.rows`), which is as right and slower.

B: rows; H, Hq: heads; T: tokens, Tq: queries, the last of all tokens; D, Dv: of a key, of a
value."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from effattn.states.base import State
from effattn.states.full import FullState

# (q, k, v, mask, state, extras) -> out; mask: None, or padding on the left alone
Run = Callable[..., Tensor]


class Mask:
    """A padding mask (B, T) bool, and what is asked of it: `whole`: no padding; `left`: on the left
    only, which a method's state needs; `holes`: between real tokens. `real`: a copy, which the
    caller cannot change."""

    def __init__(self, mask: Tensor):
        self.real = mask.clone()
        self._compared: tuple[Tensor | None, bool] | None = None
        self._moved: Tensor | None = None
        if torch.compiler.is_compiling():  # nothing may be asked of it in a compiled graph
            return
        # three questions in one answer: each would make a GPU wait
        later, earlier = mask[:, 1:], mask[:, :-1]
        left = (later | ~earlier).all()
        begins = (later & ~earlier).sum(dim=1) + mask[:, 0]
        self.whole, self.left, self.holes = torch.stack(
            [mask.all(), left, (begins > 1).any()]
        ).tolist()

    @property
    def moved(self) -> Tensor:
        """The mask once all padding is on the left."""
        if self._moved is None:
            self._moved = self.real.sort(dim=1).values  # False comes first
        return self._moved

    def agrees(self, real: Tensor | None, past: int) -> bool:
        """Whether its first `past` tokens are real where `real` (None: everywhere) says so."""
        if self._compared is None or self._compared[0] is not real:
            own = self.real[:, :past]
            same = bool(own.all()) if real is None else torch.equal(own, real)
            self._compared = real, same
        return self._compared[1]


# All layers of a model ask about the same mask, and looking at it makes a GPU wait: the last answer
# is kept. The mask is known again by its identity and by torch's count of writes to it.
_last: tuple[weakref.ref, int, int, Mask] | None = None


def known(mask: Tensor, tokens: int) -> Mask:
    """What is known of the mask's first `tokens` tokens."""
    global _last
    if mask.is_inference():  # nothing tells whether it has been written to
        return Mask(mask[:, :tokens])
    if _last is None or _last[0]() is not mask or _last[1:3] != (mask._version, tokens):
        _last = weakref.ref(mask), mask._version, tokens, Mask(mask[:, :tokens])
    return _last[3]


def attend(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: State | None,
    extras: dict,
) -> Tensor:
    """`run` with the padding where it can have it. mask: (B, Tk) bool, the state's tokens included,
    or None; extras: arguments beside, some of which have tokens too (`of_tokens`). Raises
    ValueError for a mask that is not of the state."""
    if torch.compiler.is_compiling():
        return _compiled(run, q, k, v, mask, state, extras)
    if state is None:
        seen = known(mask, k.shape[2])
        return (
            _moved(run, q, k, v, seen, None, extras)
            if seen.holes
            else run(q, k, v, mask, None, extras)
        )
    # With a state, from the cheapest way to the dearest:
    past = int(state.seq_len)
    total = past + k.shape[2]
    seen = _checked(mask, state, past, total, q.device)
    # 1. all padding is on the left, as it came
    if state.rows is None and seen.left:
        out = run(q, k, v, None if mask is None else mask[:, :total], state, extras)
    elif q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q: got {q.shape[2]} tokens, with padding that is not on the left valid are at most "
            f"the {k.shape[2]} new"
        )
    # 2. nothing is held yet: what comes is moved
    elif state.rows is None and past == 0:
        out = _moved(run, q, k, v, seen, state, extras)
        state.moved = True
    # 3. what is held was moved, and no new token is padding: a decoding step after a padded prompt
    elif state.rows is None and seen.real[:, past:].all():
        out = run(q, k, v, seen.moved, state, extras)
        state.moved = True
    # 4. new padding in some rows, and a state that can move its tokens up
    elif state.rows is None and state.in_order:
        out = _pushed(run, q, k, v, seen, state, extras)
    # 5. new padding, and a state that cannot: each row by itself, from now on
    else:
        out = _row_by_row(run, q, k, v, seen.real, state, extras)
    state.real = seen.real
    return out


def _checked(mask: Tensor | None, state: State, past: int, total: int, device) -> Mask:
    """What is known of the mask, if it says of the state's tokens what was said before."""
    if mask is None:
        if not state.real.all():
            raise ValueError(
                f"padding_mask: got None, but some of the state's {past} tokens are padding; "
                f"valid is a mask of all {total} tokens"
            )
        mask = torch.ones(len(state.real), total, dtype=torch.bool, device=device)
    seen = known(mask, total)
    if past and not seen.agrees(state.real, past):
        raise ValueError(
            f"padding_mask: it says otherwise of the state's {past} tokens than the calls before "
            "did; valid is the same mask, and that of the new tokens behind it"
        )
    return seen


def order_of(mask: Tensor) -> Tensor:
    """(B, T) bool -> int64: padding first, then the real tokens, in order."""
    return mask.int().argsort(dim=1, stable=True)


def take(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) at `order` (B, N)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def of_tokens(
    extras: dict, on_q: Callable[[Tensor], Tensor], on_k: Callable[[Tensor], Tensor]
) -> dict:
    """The arguments beside q, k and v, with what they hold of tokens, (B, H, T, D), changed as
    those are: of queries by `on_q`, of keys by `on_k`."""
    changed = {}
    if (second := extras.get("global_qkv")) is not None:
        changed["global_qkv"] = (on_q(second[0]), *map(on_k, second[1:]))
    if (latent := extras.get("latent")) is not None:
        changed["latent"] = replace(latent, c=on_k(latent.c))
    return extras | changed


def _of_row(row: slice, at: Tensor, x: Tensor) -> Tensor:
    return x[row].index_select(2, at)


def _moved(
    run: Run, q: Tensor, k: Tensor, v: Tensor, seen: Mask, state: State | None, extras: dict
) -> Tensor:
    """All tokens moved; a state, if there is one, holds nothing yet."""
    asked = seen.real[:, seen.real.shape[1] - q.shape[2] :]
    order_k, order_q = order_of(seen.real), order_of(asked)
    extras = of_tokens(extras, lambda x: take(x, order_q), lambda x: take(x, order_k))
    out = run(take(q, order_q), take(k, order_k), take(v, order_k), seen.moved, state, extras)
    return torch.where(asked[:, None, :, None], take(out, order_q.argsort(dim=1)), 0.0)


def _pushed(
    run: Run, q: Tensor, k: Tensor, v: Tensor, seen: Mask, state: FullState, extras: dict
) -> Tensor:
    """A state that holds everything in order: old tokens and new ones are moved as one sequence."""
    # held tokens already lie with their padding on the left, whatever the mask says of them: hence
    # sorted, and the new ones as they come
    past, real = state.seq_len, seen.real
    before = state.k, state.v
    order = order_of(torch.cat([real[:, :past].sort(dim=1).values, real[:, past:]], dim=1))
    both = [
        take(torch.cat([old, new], dim=2), order) for old, new in zip(before, (k, v), strict=True)
    ]
    asked = real[:, real.shape[1] - q.shape[2] :]
    order_q = order_of(asked)
    state.rooms = None
    state.k, state.v = (x[:, :, :past] for x in both)
    try:
        new = (x[:, :, past:] for x in both)
        out = run(take(q, order_q), *new, seen.moved, state, extras)
    except BaseException:
        state.k, state.v = before
        raise
    state.moved = True
    return torch.where(asked[:, None, :, None], take(out, order_q.argsort(dim=1)), 0.0)


def _row_by_row(
    run: Run, q: Tensor, k: Tensor, v: Tensor, real: Tensor, state: State, extras: dict
) -> Tensor:
    """Each row without its new padding, with a state of its own."""
    past = int(state.seq_len)
    rows = state.rows or state.split()
    new, asked = real[:, past:], real[:, real.shape[1] - q.shape[2] :]
    # of the tokens that may be taken back, a row's share is those that are real in it
    last = (
        real[:, real.shape[1] - state.candidates :].sum(dim=1).tolist()
        if state.candidates
        else [0] * len(rows)
    )
    outs = []
    for index, row in enumerate(rows):
        out = q.new_zeros(1, *q.shape[1:3], v.shape[3])
        keys, queries = new[index].nonzero()[:, 0], asked[index].nonzero()[:, 0]
        if len(keys):
            # the row has to take its tokens in all the same
            some = queries if len(queries) else queries.new_zeros(1)
            one = slice(index, index + 1)
            on_q, on_k = (partial(_of_row, one, at) for at in (some, keys))
            own = [on_q(q), on_k(k), on_k(v)]
            more = of_tokens(extras, on_q, on_k)
            mask = None
            if row.real is not None:
                mask = torch.cat([row.real, row.real.new_ones(1, len(keys))], dim=1)
            row.candidates, row.learning = last[index], state.learning
            got = run(*own, mask, row, more)
            row.real = mask
            row.note(state.owner, *own[1:])
            if len(queries):
                out = out.index_copy(2, queries, got)
        outs.append(out)
    if state.rows is None:
        state._release()
        state.rows = rows
    state.candidates = 0
    return torch.cat(outs)


def _compiled(run: Run, q, k, v, mask: Tensor, state: State | None, extras: dict) -> Tensor:
    """No question may be asked of the mask in a compiled graph: without a state all tokens are
    moved, whatever it says; with one, new tokens must be real where the old ones were not on the
    left."""
    if state is None:
        return _moved(run, q, k, v, Mask(mask), None, extras)
    if mask is None:
        return run(q, k, v, None, state, extras)
    # a static cache's mask is as long as its room; lengths are tensors, and nothing is cut
    there = torch.arange(mask.shape[1], device=mask.device) < state.seq_len + k.shape[2]
    total = there.sum()
    mask = mask & there
    first = total - mask.sum(dim=1, keepdim=True)
    at = torch.arange(mask.shape[1], device=mask.device)
    return run(q, k, v, (at >= first) & there, state, extras)
