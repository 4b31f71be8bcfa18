"""What every attention backend is: one call, checked in one place.

    attn = effattn.backend("dense")
    y = attn(q, k, v, causal=True)                   # whole sequences
    state = attn.new_state()
    y = attn(q, k, v, state=state)                   # the same call prefills, continues and decodes

A backend subclasses `Backend`, sets `traits` and `implementations`, and writes `attend` and `cost`.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv). Queries are the LAST Tq of the Tk
positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effattn import documents as packing
from effattn import padding, sinks
from effattn.calls import Call
from effattn.checks import (
    check_dropout,
    check_extras,
    check_positions,
    check_rules,
    check_state,
    check_tensors_once,
    check_tokens,
    look_of,
)
from effattn.errors import Unsupported, check_choice
from effattn.kernels.flash.pattern import Layout, layout_of
from effattn.positions.bound import Placed, Positions, turn_of
from effattn.positions.rope import Rope
from effattn.states.base import State
from effattn.states.full import FullState
from effattn.states.signing import signed
from effattn.states.static import Static
from effattn.states.static_sums import static_form
from effattn.traits import Cost, Shape, Traits

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Backend(nn.Module):
    """Base class: checks the arguments, keeps the state, rotates, then calls the subclass's
    `attend`.

    impl: "auto" chooses by device, and `chosen_impl` says what; "torch", "triton" and "reference"
    run or raise Unsupported. ValueError for any other."""

    name: ClassVar[str]  # set by `registry.register`
    traits: Traits  # of the class; of one backend where an option decides what it learns
    implementations: ClassVar[tuple[str, ...]] = ("auto", "torch", "reference")
    plain: ClassVar[bool] = False  # the same function as the attention that plain transformers runs
    # which of softcap, sink_logits, global_qkv, global_mask and latent the method can honour
    extras: tuple[str, ...] = ()
    # names of parameters and buffers whose first size is the number of K/V heads
    per_kv_head: tuple[str, ...] = ()
    # whether the query heads of a group decide together what they see, so that each of them gets
    # something else than it would alone
    group_decides: ClassVar[bool] = False
    # names of parameters that `effattn.swap` makes one for all layers of the same pattern
    tied: tuple[str, ...] = ()
    # which of q, k and v have gradients that are not the function's slopes
    straight_through: tuple[str, ...] = ()
    # first keys see a query at this position at most (sinks); None: where it is
    farthest: int | None = None
    first_keys: int = 0  # how many those are
    _signature: str | None = None
    # sizes, dtypes and devices of the last call that was checked
    _fits: tuple = ()
    # what transformers reads of a module when it saves: of tied parameters, name -> name
    _tied_weights_keys: dict[str, str]

    def __init__(self, impl: str = "auto"):
        """`impl`: "auto" chooses, and `chosen_impl` says what; any other one runs or raises."""
        super().__init__()
        check_choice("impl", impl, IMPLEMENTATIONS)
        if impl not in self.implementations:
            raise Unsupported(
                f"impl: got {impl!r}, valid for {self.name} are {', '.join(self.implementations)}"
            )
        self.impl = impl
        self.chosen_impl: str | None = None if impl == "auto" else impl

    def runs(self, impl: str) -> str:
        """Notes what `chosen_impl` says: `impl`, which is returned."""
        # A module's attributes are dear to set: 3 µs, which every step would pay. A compiled graph
        # would be guarded by what is read here.
        if torch.compiler.is_compiling() or impl != self.chosen_impl:
            self.chosen_impl = impl
        return impl

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The method itself, on checked arguments: all keys and values, rotated. Returns (B, Hq,
        Tq, Dv).
        """
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        """The fewest operations and bytes that a call of this shape needs (`Cost`, whose units are
        operations and bytes, of all rows and heads); of its backward pass alone if
        `shape.backward`, which has no state."""
        raise NotImplementedError

    @signed
    def new_state(self) -> State:
        """An empty state, for one batch of sequences. It belongs to this backend's class and
        options (`signature`). Unsupported where the method cannot decode.
        """
        return FullState()

    def static_state(self, length: int) -> Static:
        """An empty state with room for `length` tokens, whose tensors keep their shapes and places,
        so that a decoding step is one graph. ValueError for another length than a whole number of
        at least 1, Unsupported where what the method remembers has no such form."""
        if type(length) is not int or length < 1:
            raise ValueError(f"max_length: got {length!r}, valid is a whole number of at least 1")
        state = static_form(self.new_state(), length)
        if state is None or (not self.traits.exact and not state.read_by_method):
            raise Unsupported(
                f"max_length: {self.name} remembers {self.traits.state}, which has no static form; "
                "valid is its own growing state"
            )
        state.owner = self.signature
        return state

    def repeated(self, times: int) -> Backend:
        """A copy for K/V heads of which each is there `times` times, side by side: what it has for
        each of them is repeated with it."""
        wide = copy.deepcopy(self)
        for name in wide.per_kv_head:
            tensor = getattr(wide, name)
            tensor.data = tensor.data.repeat_interleave(times, 0)
        return wide

    def __init_subclass__(cls, **options) -> None:
        # a subclass' `new_state` signs too, without having to know of it
        super().__init_subclass__(**options)
        if "new_state" in vars(cls):
            cls.new_state = signed(cls.new_state)  # type: ignore[method-assign]

    @property
    def score_rules(self) -> bool:
        """Whether `attend` honours a position rule that decides scores pair by pair."""
        return False

    @property
    def packable(self) -> bool:
        """Whether `attend` lets a state of packed keys attend by itself."""
        return False

    def reads(self, state: State) -> bool:
        """Whether `attend` lets this state of packed keys attend by itself."""
        return self.packable

    def growth(self, shape: Shape) -> float:
        """Bytes that the state of such a call grows by with each further token, where it grows at
        all."""
        return shape.kv_bytes / shape.keys

    @property
    def signature(self) -> str:
        """Name and options that what a state holds depends on: `extra_repr` without the
        implementation.
        """
        if self._signature is None:
            own = self.extra_repr().removesuffix(Backend.extra_repr(self)).removesuffix(", ")
            name = getattr(self, "name", type(self).__name__)
            self._signature = f"{name}({own})" if own else name
        return self._signature

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        padding_mask: Tensor | None = None,
        state: State | None = None,
        scale: float | None = None,
        rotary: Rotary | None = None,
        documents: Tensor | None = None,
        **extras,
    ) -> Tensor:
        """Attention of q over k and v, (B, Hq, Tq, Dv) in q's dtype. A query that may see no key
        gives 0.

        padding_mask: (B, Tk) bool, True = a real token; padding may be anywhere. A row's positions
        count its real tokens, padding_mask.cumsum(1) - 1, so that it gives what it would give
        without its padding (`effattn.padding`). With a `state`, k and v are the NEW tokens, Tk
        counts the past too, of which the mask has to say the same in every call, and the state then
        holds both. scale: default D^-0.5.

        rotary: q and k are raw, and `rotary(q, k, q_positions, k_positions)` returns them rotated,
        in the same shapes. Positions are int64, (Tq,) and (Tk,), or (B, Tq) and (B, Tk) with a
        padding mask: they count the row's real tokens. The state then holds raw keys, which are
        rotated when they are read. Or a rule from `effattn.positions.rule`, which may decide scores
        pair by pair as well (ReRoPE, ALiBi).

        documents: (B, T) int, of whole sequences: tokens see their own document only, as if it were
        a row of its own (`effattn.documents`); negative for padding.

        extras: what some models add, where the backend's `extras` name it: `softcap` (a score s
        becomes softcap tanh(s / softcap), Gemma 2), `sink_logits` (Hq,) (a learned logit per head
        in the denominator, gpt-oss), `global_qkv` (Longformer's second projections, q, k and v of
        the new tokens), `global_mask` (B, T) bool (the tokens that are global in each row, instead
        of Longformer's own; whole sequences without a state), `latent` (what a `LatentState`
        remembers of the new tokens instead of k and v), `dropout` (a rate: weights that are 0 while
        training, those that are left divided by 1 - rate; `torch.manual_seed` decides which),
        `prefix` (dense: each row's first tokens that see each other in both directions).

        Raises ValueError for shapes, dtypes or devices that do not fit together, Unsupported for
        what the backend's traits exclude; nothing is appended to the state then."""
        step: tuple = ()
        if padding_mask is None and documents is None and not extras:
            step = look_of(self, q, k, v, causal, state, scale)
            if step and state is not None and state.is_like_last(step, rotary):
                return self._again(q, k, v, causal, state, scale, rotary)
        check_dropout(self, extras, state)
        for extra in extras:
            check_choice(f"{self.name}: argument", extra, self.extras)
        if isinstance(state, State) and state.packed and not self.reads(state):
            raise Unsupported(
                f"state: {self.name} cannot read packed keys; valid are dense, block and sliding"
            )
        self._check(q, k, v, causal, padding_mask, state, scale, rotary)
        packing.check(documents, q, k, state)
        check_extras(q, **extras)
        self.check_call(q, k, v, causal, extras)
        if isinstance(rotary, Positions):
            check_positions(self, rotary, causal, state, padding_mask)

        def run(q, k, v, mask, state, extras) -> Tensor:
            return self.run(q, k, v, causal, mask, state, scale, rotary, extras)

        def run_rows(q, k, v, mask, extras) -> Tensor:
            unpadded = mask is None and (state is None or state.real is None)
            # Padding is moved to where the method can have it, or not at all: plain attention has
            # no positions, so that a mask alone is right wherever the padding lies.
            if unpadded or (state is None and self.plain and rotary is None):
                return run(q, k, v, mask, state, extras)
            return padding.attend(run, q, k, v, mask, state, extras)

        if not len(q) and state is None:
            return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
        if state is not None:
            state.ready(learning=self._learning(q, k, v))
        out = packing.attend(run_rows, q, k, v, documents, padding_mask, extras)
        if state is not None:
            state.note(self.signature, k, v)
            state.checked = step, state.sizes, rotary
        return out

    def _again(self, q, k, v, causal, state: State, scale, rotary) -> Tensor:
        """`forward` of a step whose like has been checked."""
        extras: dict = {}
        self.check_call(q, k, v, causal, extras)
        state.ready(learning=self._learning(q, k, v))
        out = self.run(q, k, v, causal, None, state, scale, rotary, extras)
        state.note(self.signature, k, v)
        return out

    def run(
        self,
        q,
        k,
        v,
        causal: bool,
        padding_mask: Tensor | None,
        state: State | None,
        scale,
        rotary,
        extras,
    ):
        """`forward` on checked arguments; what is padded is padded on the left (or, without a
        state, on the right).
        """
        extras = self.extend(extras, state, padding_mask, rotary)
        packed = state is not None and state.packed
        if state is None:
            layout = layout_of(padding_mask)
        elif packed:  # it takes the new tokens in when it attends, raw if they are to be turned
            layout = state.layout(padding_mask)
        else:
            k, v, layout = state.append(k, v, padding_mask)
        # A rule of ours may do more than turn q and k; where sinks are at their place in the cache,
        # or the caller brings a function of its own, q and k are turned and that is all.
        q_first, given = None, k
        rules: dict[str, Any] = {}
        apart = rotary is not None and sinks.needs(rotary, self.farthest)
        if isinstance(rotary, Positions) and (self.farthest is None or apart):
            placed = self._place(rotary, q, k, v, layout, packed)
            if apart and self.farthest is not None:
                first = sinks.Sinks.of(rotary, q, k, v, layout, self.first_keys, self.farthest)
                rules = {"sinks": first}
            q, k = placed.q, placed.k
            rules |= {"far": placed.far, "turn": placed.turn, "bias": placed.bias}
        elif rotary is not None:
            q, k, q_first = self._rotate(rotary, q, k, layout, packed)
            rules = {"turn": turn_of(rotary, q.device)} if packed else {}
        k = given if packed else k  # a packed state turns them itself, with `Call.turn`
        if state is not None and state.read_by_method:
            rules |= {"state": state, "padding_mask": padding_mask}
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        call = Call(causal, layout, scale, q_first=q_first, **rules, **extras)
        if not torch.is_autocast_enabled(q.device.type):
            return self.attend(q, k, v, call)
        # autocast would compute scores in half precision, and the inputs' dtype is what was asked
        # for
        with torch.autocast(q.device.type, enabled=False):
            return self.attend(q, k, v, call)

    def check_call(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, extras: dict) -> None:
        """A subclass's own checks of a call, before anything is appended to a state."""

    def extend(
        self, extras: dict, state: State | None, padding_mask: Tensor | None, rotary: Rotary | None
    ) -> dict:
        """A subclass's own handling of `extras`, before k and v are appended to the state."""
        return extras

    def _learning(self, *inputs: Tensor) -> bool:
        """Whether gradients may flow through a call."""
        return torch.is_grad_enabled() and any(
            x.requires_grad for x in (*inputs, *self.parameters())
        )

    def turns_keys(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Positions) -> bool:
        """Whether `attend` would turn raw keys by itself in this call (`Call.turn`)."""
        return False

    def places(self, rule: Positions) -> bool:
        """Whether a method that is not exact honours this rule, beyond turning q and k."""
        return False

    def _check(self, q, k, v, causal, padding_mask, state, scale, rotary) -> None:
        """Raises for what does not fit together (`effattn.checks`)."""
        fits = check_tensors_once(self, q, k, v, causal, self._fits)
        if fits is not self._fits:  # a module's attributes are dear to set
            self._fits = fits
        check_state(self, state, k, v)
        check_tokens(q, k, padding_mask, state)
        check_rules(scale, rotary)

    def _place(
        self, rule: Positions, q: Tensor, k: Tensor, v: Tensor, layout: Layout, packed: bool
    ) -> Placed:
        """q and k where a position rule puts them; packed: k only when it is read."""
        # Where k is turned as it is read, its positions need not be made. Without padding all rows
        # have the same ones, and how many tokens there are is known without asking the device.
        few, tokens = packed or self.turns_keys(q, k, v, layout, rule), layout.tokens(k.shape[2])
        at_q = layout.query_positions(q.shape[2], k.shape[2], q.device)
        if layout.start is None:
            at_q, at_k, length = at_q[0], None, tokens
            if not (few and rule.turnable(one_length=True)):
                at_k = layout.key_positions(k.shape[2], k.device)[0].clamp(min=0)
        else:
            at_q, at_k = at_q.clamp(min=0), layout.key_positions(k.shape[2], k.device).clamp(min=0)
            length = at_k.amax(dim=-1) + 1
        if self.farthest is not None:
            length = sinks.cached_length(length, self.farthest)
        return rule.place(q, k, at_q, at_k, length, tokens, few=few)

    def _rotate(
        self, rotary: Rotary, q: Tensor, k: Tensor, layout: Layout, packed: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q and k rotated, and q as the first keys see it: from `farthest` at most, their place in
        the cache. packed: k need not be.
        """
        at_q = layout.query_positions(q.shape[2], k.shape[2], q.device).clamp(min=0)
        if packed and isinstance(rotary, Rope) and self.farthest is None:
            return rotary.turn(q, at_q if layout.start is not None else at_q[0]), k, None
        at_k = layout.key_positions(k.shape[2], k.device).clamp(min=0)
        if layout.start is None:
            at_q, at_k = at_q[0], at_k[0]
        rotated = rotary(q, k, at_q, at_k)
        for before, after, which in zip((q, k), rotated, "qk", strict=True):
            if after.shape != before.shape:
                raise ValueError(
                    f"rotary: returned {which} {tuple(after.shape)}, expected {tuple(before.shape)}"
                )
        tokens = layout.tokens(k.shape[2])
        # a number on the device is not asked for: the clamp changes nothing while there are few
        if self.farthest is None or (type(tokens) is int and tokens <= self.farthest + 1):
            return *rotated, None
        # one key, since a rotary rule takes both; what it gives for it is not used
        q_first, _ = rotary(q, k[:, :, :1], at_q.clamp(max=self.farthest), at_k[..., :1])
        return *rotated, q_first
