"""A window's softmax and linear attention over everything before it, under one denominator.

    o_t = (sum_near e^s_tj v_j + sum_far w_tj v_j) / (sum_near e^s_tj + sum_far w_tj)
    s_tj = scale q_t.k_j,   w_tj = e^b phi(q_t).phi(k_j)

Near are the newest `window` keys and the first `sinks`, far are all others. LoLCATs
(arXiv:2410.10254, section 3.2), whose window's terms are relative to its highest score, which makes
a far key's weight depend on who is near; here both are weights of one kernel, e^s and what phi
estimates of it.

B: rows; Hq, Hkv: query and key/value heads; T: tokens; D, Dv: of a key, of a value; F: features of
a head."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.interface import Call, Cost, Shape
from effattn.kernels import flash, linear
from effattn.kernels.flash.pattern import Layout, Window
from effattn.kernels.linear.features import mapped
from effattn.kernels.merge import merge
from effattn.patterns.exact import check_size
from effattn.patterns.linear import Linear
from effattn.registry import register
from effattn.states.base import State
from effattn.states.full import FullState
from effattn.states.hybrid import HybridState
from effattn.states.recurrent import folded

NOTHING = 1e-30  # so little weight counts as none


@register("hybrid")
class Hybrid(Linear):
    """Exact over the newest `window` keys and the first `sinks`, linear over the rest, in one sum.

    A window of at least the sequence's length is exact softmax attention. feature_map, features: as
    for `linear`; "exp", which weighs keys by their size as the softmax does, by default. `balance`
    (Hq,), which exists after the first call, is b: what a far key counts beside a near one. It
    begins where queries and keys of 0 would count the same, far or near, and is learned."""

    traits = replace(
        Linear.traits, bidirectional=False, learned=True, state="window, sinks and sums"
    )

    def __init__(
        self,
        window: int,
        sinks: int = 0,
        feature_map: str = "exp",
        features: int | None = None,
        impl: str = "auto",
    ):
        super().__init__(feature_map, features=features, impl=impl)
        self.traits = type(self).traits
        self.window = check_size("hybrid", "window", window)
        self.sinks = check_size("hybrid", "sinks", sinks, least=0)
        self.balance = UninitializedParameter()

    def extra_repr(self) -> str:
        parts = [f"window={self.window}"]
        parts += [f"sinks={self.sinks}"] if self.sinks else []
        return ", ".join([*parts, super().extra_repr()])

    def check_call(self, q, k, v, causal, extras):
        super().check_call(q, k, v, causal, extras)
        heads = q.shape[1]
        if is_lazy(self.balance):
            self.balance.materialize((heads,), device=q.device, dtype=torch.float32)
            with torch.no_grad():
                # so that phi(0).phi(0) counts as e^0
                zero = self.product_at_zero(q.shape[-1])
                self.balance.fill_(-math.log(zero) if zero else 0.0)
        if self.balance.shape != (heads,):
            raise ValueError(
                f"q: expected {len(self.balance)} heads, as balance has learned, got {heads}"
            )

    def new_state(self) -> State:
        return FullState() if self.impl == "reference" else HybridState(self.window, self.sinks)

    # The method
    # ---------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        impl = self.runs(linear.choose(self.impl, q.device))
        if impl == "reference":
            return self._definition(q, k, v, call)
        near = flash.attention(
            q,
            k,
            v,
            Window(first=self.sinks, back=self.window),
            call.layout,
            causal=True,
            scale=call.scale,
            impl=impl,
            lse=True,
        )
        state = call.state if isinstance(call.state, HybridState) else None
        if state is None and k.shape[2] <= self.window:
            return near[0]
        # sinks that are kept apart are no far keys
        slots = call.layout.slots
        k, v = k[:, :, slots:], v[:, :, slots:]
        far = self._far(q, k, v, call.layout, state, impl)
        if state is not None and state.due:
            self._leave(q, k, v, call, state, impl)
        if far is None:
            return near[0]
        wide = (near[0].to(far[0].dtype), near[1].to(far[0].dtype))
        return merge([wide, far])[0].to(q.dtype)

    def _mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q and k as the kernel's map gets them, in fp32 or better, and what a query's largest
        exponent was."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return self.mapped_and_top(q.to(wide), k.to(wide))

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: HybridState | None, impl: str
    ) -> tuple[Tensor, Tensor] | None:
        """Linear attention over the keys before each query's window: out (B, Hq, Tq, Dv) and the
        log of its weights' sum (B, Hq, Tq); None where no query has such keys."""
        memory = None if state is None else state.memory
        # The last query sees all but the newest `window - 1` keys and its own, the one before it
        # one less: they lie as queries and keys without a window do.
        keys = k.shape[2] - self.window
        asking = min(q.shape[2], keys)
        if asking <= 0:
            return None
        query, key, top = self._mapped(q[:, :, q.shape[2] - asking :], k[:, :, :keys])
        out, _ = linear.attention(
            query,
            key,
            _counted(v[:, :, :keys], key.dtype),
            self.feature_map,
            mask=self._no_sinks(layout, keys, k),
            normalize=False,
            memory=memory,
            impl=impl,
        )
        total = out[..., -1]
        seen = total > NOTHING
        total = torch.where(seen, total, 1.0)
        lse = total.log() + self.balance.to(out.dtype)[:, None]
        lse = torch.where(seen, lse if top is None else lse + top, -torch.inf)
        out = torch.where(seen[..., None], out[..., :-1] / total[..., None], 0.0)
        before = q.shape[2] - asking
        return F.pad(out, (0, 0, before, 0)), F.pad(lse, (before, 0), value=-torch.inf)

    def _no_sinks(self, layout: Layout, keys: int, k: Tensor) -> Tensor | None:
        """(B, keys) bool: which of the first keys behind the slots are real and no sinks; None:
        all."""
        if not self.sinks and layout.mask is None:
            return None
        number = torch.arange(layout.tail, layout.tail + keys, device=k.device)[None]
        if layout.start is not None:
            number = number - layout.start[:, None]
        far = number >= self.sinks
        if layout.mask is not None:
            far = far & layout.mask[:, layout.slots : layout.slots + keys]
        return far.expand(k.shape[0], -1)

    def _leave(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: HybridState, impl: str
    ) -> None:
        """The oldest tokens go into the sums."""
        cut = state.due
        _, key, _ = self._mapped(q[:, :, :1], k[:, :, :cut])
        memory = linear.fold(
            key,
            _counted(v[:, :, :cut], key.dtype),
            self.feature_map,
            mask=self._no_sinks(call.layout, cut, k),
            normalize=False,
            memory=state.memory,
            impl=impl,
        )
        state.leave(cut, memory, call.padding_mask)

    def _definition(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Every pair, slow and obvious."""
        groups = q.shape[1] // k.shape[1]
        layout, device = call.layout, q.device
        i = layout.query_positions(q.shape[2], k.shape[2], device)[:, None, :, None]
        j = layout.key_positions(k.shape[2], device)[:, None, None]
        near = (i - j < self.window) | (j < self.sinks)
        query, key, top = self._mapped(q, k)
        if self.map in linear.MAPS:
            query, key = mapped(query, self.map), mapped(key, self.map)
        wide = query.dtype
        k, v, key = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v, key))
        scores = call.scale * q.to(wide) @ k.mT
        balance = self.balance.to(wide)[:, None, None]
        far = (query @ key.mT).log() + balance + (0.0 if top is None else top[..., None])
        scores = torch.where(near, scores, far)
        seen = ((j >= 0) & (j <= i)).expand_as(scores) & (scores > -torch.inf)
        weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(wide).min), dim=-1)
        return (torch.where(seen, weights, 0.0) @ v).to(q.dtype)

    # What it takes
    # ---------------------------------------------------------------------------------------------

    def cost(self, shape: Shape) -> Cost:
        """The window's and the sinks' two products by pair, and linear attention's products for
        keys and queries that are further apart; q, k, v and the output moved once, beside the
        state. Backward: as those two count it."""
        first = shape.keys - shape.queries
        at = torch.arange(first, shape.keys)
        near = (at + 1).clamp(max=self.window) + (at - self.window + 1).clamp(0, self.sinks)
        pairs, apart = (shape.heads * int(x.sum()) for x in (near, at + 1 - near))
        asking = min(shape.queries, max(0, shape.keys - self.window))
        features, columns = self.feature_count(shape.head_dim), shape.value_dim + 1
        queries, keys = shape.heads * asking, shape.kv_heads * asking
        maps = (queries + keys) * self.feature_flops(shape.head_dim) if apart else 0
        token = shape.kv_bytes // shape.keys
        # a few keys need less pair by pair than by sums
        one = 2 * apart * (features + columns)
        if shape.backward:
            products = 2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim)
            far = min(2 * features * columns * (2 * queries + 3 * keys), one * 5 // 2)
            return Cost(
                flops=shape.batch * (products + far + 2 * maps),
                read_bytes=shape.query_bytes
                + shape.kv_bytes
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        products = 2 * pairs * (shape.head_dim + shape.value_dim)
        far = min(2 * features * columns * (queries + keys), one)
        moved = self._folded(shape.keys) > self._folded(first)
        return Cost(
            flops=shape.batch * (products + far + maps),
            read_bytes=shape.query_bytes
            + shape.queries * token
            + (self.held_bytes(shape, first) if first else 0),
            write_bytes=shape.output_bytes + (self.memory_bytes(shape) if first and moved else 0),
            state_bytes=self.held_bytes(shape, shape.keys),
        )

    def _folded(self, tokens: int) -> int:
        return folded(tokens - self.window)

    def held_bytes(self, shape: Shape, tokens: int) -> int:
        token, gone = shape.kv_bytes // shape.keys, self._folded(tokens)
        kept = self.memory_bytes(shape) + self.sinks * token if gone else 0
        return (tokens - gone) * token + kept


def _counted(v: Tensor, dtype: torch.dtype) -> Tensor:
    """v (B, H, T, Dv + 1) with a column of ones, whose sum is that of the weights."""
    # rows 16 numbers longer, of which one is shown: strides stay multiples of 16 for the kernels
    return F.pad(v.to(dtype), (0, 16), value=1.0)[..., : v.shape[-1] + 1]
