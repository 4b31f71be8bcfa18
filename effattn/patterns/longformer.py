"""Longformer (arXiv:2004.05150): a sliding window, and global tokens that see all and are seen by
all.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries, the last of all tokens, and keys; D,
Dv: of a key, of a value; g: the most global tokens that a row can have. i, j: positions of queries
and keys.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.interface import Call, Traits
from effattn.kernels import decode, flash
from effattn.kernels.flash.pattern import Layout, Window, first_real, layout_of
from effattn.kernels.merge import merge
from effattn.patterns.exact import ExactBackend, check_size, keys_back
from effattn.positions.bound import Positions
from effattn.registry import register
from effattn.states.full import ROLLBACK, FullState, RingState, first_positions


@register("longformer")
class Longformer(ExactBackend):
    """Queries see a window of `window` keys (bidirectional: odd) and the global tokens; global
    tokens see everything.

    global_tokens: a number n (the first n tokens), a list of positions, or a bool mask (T,) over
    positions. Positions count from a row's first real token; none beyond a mask's end is global. A
    call's `global_mask` (B, T) says it for each row instead, by token, as transformers'
    global_attention_mask does. With `causal=True` nobody sees what is later. Global rows use
    `global_qkv` (projections of their own, from the hidden states) where it is given, for their
    queries and for all keys and values they see; local queries see global keys by the local
    projections, once.

    The state holds everything, unless the global tokens are the first n: then a ring and those.
    """

    traits = Traits(
        exact=True, causal=True, bidirectional=True, learned=True, state="ring, global tokens"
    )
    extras = ("softcap", "global_qkv", "global_mask", "dropout")
    where: Tensor | None  # a buffer

    def __init__(
        self, window: int, global_tokens: int | list[int] | Tensor = 1, impl: str = "auto"
    ):
        super().__init__(impl)
        self.window = check_size("longformer", "window", window)
        self.first, where = _read_global(global_tokens)
        # bool (T,) over positions; None: the first n
        self.register_buffer("where", where, persistent=False)
        self.most = self.first if where is None else int(where.sum())
        # no position from here on is global
        self.last = self.first if where is None else len(where)
        if where is not None:  # once, as each call signs its state: on a GPU it would wait there
            chosen = where.nonzero()[:, 0].tolist()
            self._signature = f"longformer(window={self.window}, global_tokens={chosen})"

    def extra_repr(self) -> str:
        which = f"first {self.first}" if self.where is None else f"{self.most} chosen"
        return f"window={self.window}, global_tokens={which}, {super().extra_repr()}"

    def is_global(self, position: Tensor) -> Tensor:
        """bool, for int64 positions of any shape."""
        if self.where is None:
            return (position >= 0) & (position < self.first)
        inside = (position >= 0) & (position < len(self.where))
        return inside & self.where[position.clamp(0, len(self.where) - 1)]

    def check_call(self, q, k, v, causal, extras):
        if not causal and self.window % 2 == 0:
            near = f"{self.window - 1} or {self.window + 1}"
            raise ValueError(
                f"longformer: window: got {self.window}, a bidirectional window is odd; valid is "
                f"{near}"
            )
        if extras.get("global_mask") is not None and q.shape[2] != k.shape[2]:
            raise Unsupported(
                f"global_mask: got {q.shape[2]} queries and {k.shape[2]} keys, valid are whole "
                "sequences"
            )
        for which, x, like in zip("qkv", extras.get("global_qkv") or (), (q, k, v), strict=False):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise ValueError(
                    f"global_qkv: expected {which} {tuple(like.shape)} {like.dtype}, got "
                    f"{tuple(x.shape)} {x.dtype}"
                )

    def extend(self, extras, state, padding_mask, rotary):
        """global_qkv of the new tokens -> (q, k, v, positions of k), rotated, with the past's keys
        and values; None once no global row can come any more."""
        if extras.get("global_mask") is not None and state is not None:
            raise Unsupported(
                "global_mask: got a state too, which remembers the pattern's own global tokens; "
                "valid is a call without"
            )
        if extras.get("global_qkv") is None:
            return extras
        if isinstance(rotary, Positions) and rotary.scores:
            raise Unsupported(
                f"global_qkv: got positions {rotary.spec!r} too, which decide scores pair by pair; "
                "valid are rules that turn q and k"
            )
        q, k, v = extras["global_qkv"]
        past = 0 if state is None else state.seq_len
        start = None if padding_mask is None else first_real(padding_mask)
        if rotary is not None:
            at = (
                Layout(tail=past, start=start)
                .query_positions(q.shape[2], q.shape[2], q.device)
                .clamp(min=0)
            )
            q, k = rotary(q, k, *[at[0] if start is None else at] * 2)
        if state is not None:
            k, v = state.append_global(k, v, start)
        if k is None:
            return {**extras, "global_qkv": None}
        return {
            **extras,
            "global_qkv": (q, k, v, layout_of(padding_mask).key_positions(k.shape[2], k.device)),
        }

    def sees(self, i, j, h, heads, causal):
        back = keys_back(self.window, causal)
        near = (i - j < back) & (j - i < back)
        visible = near | self.is_global(j) | self.is_global(i)
        return visible & (j <= i) if causal else visible

    def new_state(self):
        return GlobalRing(self.window, self.first) if self.where is None else GlobalFull()

    def counts(self, q, k, call):
        """As `sees` has it, or for the global tokens of this call."""
        if call.global_mask is None:
            return super().counts(q, k, call)
        i = call.layout.query_positions(q.shape[2], k.shape[2], q.device)[:, None, :, None]
        j = call.layout.key_positions(k.shape[2], k.device)[:, None, None, :]
        back, chosen = keys_back(self.window, call.causal), call.global_mask[:, None]
        near = (i - j < back) & (j - i < back)
        visible = (near | chosen[:, :, None] | chosen[..., None]) & (i >= 0) & (j >= 0)
        return visible & (j <= i) if call.causal else visible

    def _by_definition(self, q, k, v, call: Call, lse: bool):
        out = super()._by_definition(q, k, v, call, lse)
        return out if call.global_qkv is None else self._global_rows(q, k, v, call, out)

    def attend_few(self, q, k, v, call: Call, impl: str, lse: bool):
        out = super().attend_few(q, k, v, call, impl, lse)  # by `sees`, global rows as well
        return out if call.global_qkv is None else self._global_rows(q, k, v, call, out)

    def attend_many(self, q, k, v, call: Call, impl: str, lse: bool):
        back = keys_back(self.window, call.causal)
        options = dict(causal=call.causal, scale=call.scale, softcap=call.softcap, impl=impl)
        first = self.first if call.global_mask is None else 0
        window = Window(first=first, back=back, ahead=1 if call.causal else back)
        if self.where is None and call.global_mask is None:
            out = flash.attention(q, k, v, window, call.layout, **options)
        else:
            out = self._window_and_columns(q, k, v, window, call, options)
        return self._global_rows(q, k, v, call, out)

    def _window_and_columns(self, q, k, v, window: Window, call: Call, options: dict) -> Tensor:
        """The window over the other keys, and the few global keys for everyone: two disjoint
        sets.
        """
        layout = call.layout
        # chosen positions are anywhere, so rows with padding have them at different keys
        at = layout.key_positions(k.shape[2], k.device).expand(q.shape[0], -1)
        columns = self.is_global(at) if call.global_mask is None else call.global_mask & (at >= 0)
        others = ~columns if layout.mask is None else layout.mask & ~columns
        near = flash.attention(
            q, k, v, window, Layout(0, layout.tail, layout.start, others), **options, lse=True
        )
        index, real = self._places(columns, call)
        i = layout.query_positions(q.shape[2], k.shape[2], q.device)
        counts = _visible(i, torch.where(real, at.gather(1, index), -1), call.causal)
        return merge([near, _few(q, _take(k, index), _take(v, index), counts, call)])[0]

    def _global_rows(self, q, k, v, call: Call, out: Tensor) -> Tensor:
        """`out` with the rows of global tokens overwritten: they see every key (that is not later,
        if causal).
        """
        at_q = call.layout.query_positions(q.shape[2], k.shape[2], q.device)
        if call.global_qkv is not None:
            q, k, v, at_k = call.global_qkv
        # no query is at a global position: known without looking only where rows are not padded
        elif (
            call.global_mask is None
            and call.layout.start is None
            and call.layout.tokens(k.shape[2]) - q.shape[2] >= self.last
        ):
            return out
        else:
            at_k = call.layout.key_positions(k.shape[2], k.device)
        at_q = at_q.expand(q.shape[0], -1)
        chosen = (
            self.is_global(at_q) if call.global_mask is None else call.global_mask & (at_q >= 0)
        )
        index, real = self._places(chosen, call)
        counts = _visible(torch.where(real, at_q.gather(1, index), -1), at_k, call.causal)
        if call.drop is not None:
            numbers = _take(call.drop.q[..., None], index)[..., 0]
            call = replace(call, drop=replace(call.drop, q=numbers))
        rows, _ = _few(_take(q, index), k, v, counts, call)
        at = torch.where(real, index, out.shape[2])[:, None, :, None].expand(
            -1, out.shape[1], -1, out.shape[3]
        )
        # rows with fewer global tokens write the rest to one more place, which is cut off
        room = torch.cat([out, out[:, :, :1]], dim=2)
        return room.scatter(2, at, rows)[:, :, :-1]

    def _places(self, chosen: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Where (B, T) bool is true: index (B, g), and which of the entries are meant, g as large
        as it can be.
        """
        # False sorts first; the number of columns is known from `most`, without asking the device,
        # but where a call brings its own
        most = self.most if call.global_mask is None else max(1, int(chosen.sum(dim=1).amax()))
        index = (~chosen).int().argsort(dim=1, stable=True)[:, : min(most, chosen.shape[1])]
        return index, chosen.gather(1, index)

    def pairs(self, i, shape):
        chosen = self.is_global(torch.arange(shape.keys))
        # global tokens below each position
        before = torch.cat([torch.zeros(1, dtype=torch.long), chosen.cumsum(0)])
        back = keys_back(self.window, shape.causal)
        low, high = (
            (i - back + 1).clamp(min=0),
            (i + (1 if shape.causal else back)).clamp(max=shape.keys),
        )
        end = i + 1 if shape.causal else torch.full_like(i, shape.keys)
        near = high - low + before[low] + before[end] - before[high]
        return shape.heads * torch.where(chosen[i], end, near)

    def still_seen(self, j, shape):
        first = shape.keys - shape.queries
        if self.is_global(torch.arange(first, shape.keys)).any():
            return torch.ones_like(j, dtype=torch.bool)
        return (first - j < self.window) | self.is_global(j)


class GlobalFull(FullState):
    """Everything, and the same of the global projections where they are given."""

    def __init__(self):
        super().__init__()
        self.twin = FullState()

    def _bytes(self) -> int:
        return super()._bytes() + self.twin.nbytes

    def append_global(self, k: Tensor, v: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Global keys and values of the new tokens -> of all tokens."""
        return self.twin.append(k, v)[:2]

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        self.twin.select(index)

    def _repeat(self, n: int) -> None:
        super()._repeat(n)
        self.twin.repeat(n)

    def _crop(self, n: int) -> None:
        super()._crop(n)
        if self.twin.seq_len:
            self.twin.crop(n)

    def _reset(self) -> None:
        super()._reset()
        self.twin = FullState()


class GlobalRing(RingState):
    """A ring and the first tokens; global projections only as long as a first token can still come,
    or come back.
    """

    def __init__(self, window: int, first: int):
        self.first = first
        super().__init__(window, partial(first_positions, first))

    def _reset(self) -> None:
        super()._reset()
        self.twin: FullState | None = FullState()
        self.least = 0  # once the twin is dropped, the state cannot go back before this token

    def _bytes(self) -> int:
        return super()._bytes() + (self.twin.nbytes if self.twin else 0)

    def append_global(
        self, k: Tensor, v: Tensor, start: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Global keys and values of the new tokens -> of all tokens; None when there are no more
        global rows.
        """
        if self.twin is None:
            return None, None
        k, v, _ = self.twin.append(k, v)
        late = 0
        if start is not None:
            late = int(start.max()) if self.late is None else self.late
        least = self.first + late
        # every row's first tokens have come, and a rollback cannot take them back
        if k.shape[2] >= least + ROLLBACK:
            self.twin, self.least = None, least
        return k, v

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        if self.twin:
            self.twin.select(index)

    def _repeat(self, n: int) -> None:
        super()._repeat(n)
        if self.twin:
            self.twin.repeat(n)

    def _check_crop(self, n: int) -> None:
        if n < self.least:
            raise ValueError(
                f"crop: got {n}, global projections were dropped; valid are 0 and {self.least} or "
                "more"
            )
        super()._check_crop(n)

    def _crop(self, n: int) -> None:
        super()._crop(n)
        if self.twin and self.twin.seq_len:
            self.twin.crop(n)


def _visible(i: Tensor, j: Tensor, causal: bool) -> Tensor:
    """(B, 1, Tq, Tk) bool from positions (B, Tq) and (B, Tk): real, and not later if causal."""
    i, j = i[:, None, :, None], j[:, None, None, :]
    seen = (i >= 0) & (j >= 0)
    return seen & (j <= i) if causal else seen


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, T, D) at index (B, g) -> (B, H, g, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _few(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Few queries or few keys: plain torch, with gradients; its scores are linear in the sequence's
    length.
    """
    options = dict(scale=call.scale, softcap=call.softcap, counts=counts, impl="torch", lse=True)
    return decode.attention(q, k, v, None, Layout(), **options, drop=call.drop)


def _read_global(tokens: int | list[int] | Tensor) -> tuple[int, Tensor | None]:
    """(n, None) for the first n, (0, bool mask over positions) for a list or a mask. ValueError for
    anything else.
    """
    if type(tokens) is int:
        return check_size("longformer", "global_tokens", tokens), None
    if (
        isinstance(tokens, Tensor)
        and tokens.dtype == torch.bool
        and tokens.ndim == 1
        and tokens.any()
    ):
        return 0, tokens.clone()
    if (
        isinstance(tokens, Tensor)
        and tokens.ndim == 1
        and not tokens.is_floating_point()
        and tokens.dtype != torch.bool
    ):
        tokens = tokens.tolist()
    if (
        isinstance(tokens, (list, tuple))
        and tokens
        and all(type(t) is int and t >= 0 for t in tokens)
    ):
        where = torch.zeros(max(tokens) + 1, dtype=torch.bool)
        where[list(tokens)] = True
        return 0, where
    got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
    raise ValueError(
        f"longformer: global_tokens: got {got}, valid is a number of first tokens, a list of "
        "positions, or a bool mask (T,) with a True"
    )
