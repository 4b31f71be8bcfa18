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

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from effattn.states.base import State
from effattn.states.full import FullState

# (q, k, v, mask, state, extras) -> out; mask: None, or padding on the left alone
Run = Callable[..., Tensor]


class Mask:
    """A padding mask (B, T) bool, and what is asked of it. Everything is read at once, since each
    look makes a GPU wait; what has `grown` from a mask that is known is not read at all.

    real: a copy, which the caller cannot change. whole: no padding; left: on the left only, which a
    method's state needs; holes: between real tokens. ends: the number of tokens up to the last one
    that is padding in some row; late: by this number of tokens every row has a real one, once its
    padding has been moved to the left; begun: every row has one. moved: the mask once it has."""

    left = whole = holes = begun = False
    ends = late = 0

    def __init__(self, real: Tensor):
        """real: (B, T) bool, which stays as it is."""
        self.real = real
        self.earlier: Tensor | None = None  # the mask that it has grown from
        self._compared: tuple[Tensor | None, bool] | None = None
        self._moved: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        """Of a mask that is read: (B, T), bool or a number that is not 0 for a real token."""
        # `clone` where nothing is converted: the caller's own may be written to
        seen = cls(mask.clone() if mask.dtype == torch.bool else mask.bool())
        real, tokens = seen.real, mask.shape[1]
        if torch.compiler.is_compiling():  # nothing may be asked of it in a compiled graph
            return seen
        later, earlier = real[:, 1:], real[:, :-1]
        begins = (later & ~earlier).sum(dim=1) + real[:, 0]
        padding = torch.arange(1, tokens + 1, device=mask.device).masked_fill(real.all(dim=0), 0)
        found = (
            (later | ~earlier).all(),
            (begins > 1).any(),
            (begins > 0).all(),
            padding.amax(),
            torch.nn.functional.pad((~real).sum(dim=1), (0, 1)).amax(),  # of no rows: 0
        )
        left, holes, begun, seen.ends, seen.late = torch.stack(found).tolist()
        seen.left, seen.holes, seen.begun = bool(left), bool(holes), bool(begun)
        seen.whole = not seen.ends
        return seen

    def grown(self, mask: Tensor) -> Mask:
        """Of `mask`, which is this one and real tokens behind it. Every row has `begun`."""
        seen = Mask(mask.clone() if mask.dtype == torch.bool else mask.bool())
        seen.left, seen.whole, seen.begun = self.left, self.whole, True
        seen.ends, seen.late = self.ends, self.late
        seen.holes = not self.left  # what was on the right lies between real tokens now
        seen.earlier = self.real
        if self._moved is not None:
            more = mask.shape[1] - self.real.shape[1]
            seen._moved = torch.nn.functional.pad(self._moved, (0, more), value=True)
        return seen

    @property
    def moved(self) -> Tensor:
        """The mask once all padding is on the left."""
        if self._moved is None:
            self._moved = self.real.sort(dim=1).values  # False comes first
        return self._moved

    def agrees(self, real: Tensor | None, past: int) -> bool:
        """Whether its first `past` tokens are real where `real` (None: everywhere) says so."""
        if real is None:
            return self.whole or bool(self.real[:, :past].all())
        if real is self.earlier:
            return True
        if self._compared is None or self._compared[0] is not real:
            self._compared = real, self._compare(real, past)
        return self._compared[1]

    def _compare(self, real: Tensor, past: int) -> bool:
        own = self.real[:, :past]
        if self.earlier is None or own.device.type == "cpu":
            return torch.equal(own, real)
        # `generate` goes on with its own mask, and rows have changed places (beams). Beams of one
        # prompt have the same padding; if these have not, the device stops.
        torch._assert_async((own == real).all(), _OTHERWISE)
        return True


_OTHERWISE = "padding_mask: rows with other padding than before have changed places"

# What is known of masks, by themselves: all layers of a model ask about the same one. `version`:
# torch's count of writes to it, None where there is none (under inference_mode), and then only
# masks that nobody else can write to are known again.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def told(mask: Tensor, kept: bool = False) -> Mask | None:
    """What is known of a mask without looking at it; None: nothing. kept: nobody has written to it,
    as far as the caller knows."""
    version, own, seen = _known.get(mask, (None, False, None))
    if mask.is_inference():
        return seen if own or kept else None
    return seen if version == mask._version else None


def tell(mask: Tensor, seen: Mask, own: bool = False) -> None:
    """From now on `told(mask)` is `seen`. own: nobody else can write to this mask."""
    _known[mask] = (None if mask.is_inference() else mask._version, own, seen)


def known(mask: Tensor, tokens: int) -> Mask:
    """What is known of the mask's first `tokens` tokens, which are looked at if nothing is."""
    seen = told(mask)
    if seen is None or seen.real.shape[1] != tokens:
        seen = Mask.of(mask[:, :tokens])
        tell(mask, seen)
    return seen


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
    state.late = seen.late
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
    elif state.rows is None and seen.ends <= past:
        out = run(q, k, v, seen.moved, state, extras)
        state.moved = True
    # 4. new padding in some rows, and a state that can move its tokens up
    elif state.rows is None and state.in_order:
        out = _pushed(run, q, k, v, seen, state, extras)
    # 5. new padding, and a state that cannot: each row by itself, from now on
    else:
        out = _row_by_row(run, q, k, v, seen, state, extras)
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
    for name in ("global_mask", "prefix"):
        if (chosen := extras.get(name)) is not None:
            changed[name] = on_k(chosen[:, None, :, None])[:, 0, :, 0].bool()
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
    run: Run, q: Tensor, k: Tensor, v: Tensor, seen: Mask, state: State, extras: dict
) -> Tensor:
    """Each row without its new padding, with a state of its own."""
    past, real = int(state.seq_len), seen.real
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
        keys, queries = (
            torch.arange(x.shape[1], device=x.device)  # which is known, where `nonzero` waits
            if seen.ends <= past
            else x[index].nonzero()[:, 0]
            for x in (new, asked)
        )
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
            row.candidates, row.learning, row.late = last[index], state.learning, seen.late
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
        return _moved(run, q, k, v, Mask.of(mask), None, extras)
    if mask is None:
        return run(q, k, v, None, state, extras)
    # a static cache's mask is as long as its room; lengths are tensors, and nothing is cut
    there = torch.arange(mask.shape[1], device=mask.device) < state.seq_len + k.shape[2]
    total = there.sum()
    mask = mask & there
    first = total - mask.sum(dim=1, keepdim=True)
    at = torch.arange(mask.shape[1], device=mask.device)
    return run(q, k, v, (at >= first) & there, state, extras)
