"""What methods share that attend by a feature map in the place of the exponential: sums that are
kept, and the newest tokens beside them.

B: rows; Hq, Hkv: query and key/value heads; T: tokens; D, Dv: of a key, of a value; F: features of
a head."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.interface import Backend, Call, Cost, Shape
from effattn.kernels import linear
from effattn.kernels.linear import step
from effattn.patterns.exact import torch_only
from effattn.states.base import State
from effattn.states.full import ROLLBACK, FullState
from effattn.states.recurrent import RecurrentState, folded
from effattn.states.static_sums import StaticSums


class KernelBackend(Backend):
    """Base of the methods that attend by a feature map: subclasses set `feature_map` and say how
    many features it has.

    They may map q and k first (`mapped`), and give `directions` and `decays`.
    """

    implementations = linear.IMPLEMENTATIONS
    feature_map: str  # a name in kernels.linear.MAPS
    normalize = True
    draws = 0  # how often random directions were drawn

    def __init__(self, impl: str = "auto"):
        super().__init__(impl)
        self.chosen_impl = linear.choose(impl)

    def feature_count(self, head_dim: int) -> int:
        """F, the number of features per head."""
        raise NotImplementedError

    def feature_flops(self, head_dim: int) -> int:
        """Operations in matrix products for the features of one token of one head."""
        return 0

    def mapped(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, Hq, Tq, D) and k (B, Hkv, Tk, D) as the kernel's feature map gets them."""
        return q, k

    def kernel_options(self, k: Tensor) -> dict:
        """directions (F, D) and decay (Hkv,), where there are any."""
        return {}

    def new_state(self) -> State:
        """Sums and the newest tokens; the reference keeps everything."""
        return FullState() if self.impl == "reference" else RecurrentState()

    def extend(self, extras, state, padding_mask, rotary):
        if isinstance(state, (RecurrentState, StaticSums)):
            if self.impl == "reference":
                raise ValueError(
                    f"{self.name}: state: impl='reference' needs every key; valid is its own "
                    "new_state()"
                )
            if state.draw not in (None, self.draws):
                raise ValueError(
                    f"{self.name}: state: its sums were made before redraw(), their features are "
                    "gone; finish the sequence first, or start again with state.reset()"
                )
            state.draw = self.draws
        return extras

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        impl = self.runs(linear.choose(self.impl, q.device))
        dtype = q.dtype
        q, k = self.mapped(q, k)
        return self._attend(q, k, v.to(k.dtype), call, impl).to(dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: str) -> Tensor:
        """`attend`, of mapped q and k."""
        mask = call.layout.mask
        options = {"scale": call.scale, "normalize": self.normalize, **self.kernel_options(k)}
        if impl == "reference":
            return self.definition(q, k, v, mask, call.causal, options)
        options |= {"feature_map": self.feature_map, "impl": impl}
        state = call.state
        if isinstance(state, StaticSums):
            return self._attend_static(q, k, v, call, state, mask, options, impl)
        if not isinstance(state, RecurrentState):  # none: a whole sequence
            return self.over_sums(q, k, v, mask, None, options, causal=call.causal)[0]
        return self._attend_state(q, k, v, call, state, mask, options)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, options: dict
    ) -> Tensor:
        """The method as the paper has it, slow and obvious."""
        from effattn.kernels.linear.reference import attention

        return attention(q, k, v, self.feature_map, mask=mask, causal=causal, **options)

    def over_sums(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        memory: linear.Memory | None,
        options: dict,
        *,
        causal: bool = True,
        keep: bool = False,
    ) -> tuple[Tensor | None, linear.Memory | None]:
        """The method over a memory and keys behind it: the output (None without queries), and with
        `keep` the memory that holds these keys too."""
        if q is None:
            return None, linear.fold(k, v, mask=mask, memory=memory, **options)
        return linear.attention(
            q, k, v, mask=mask, memory=memory, causal=causal, keep=keep, **options
        )

    def _attend_state(
        self, q, k, v, call: Call, state: RecurrentState, mask: Tensor | None, options: dict
    ) -> Tensor:
        """A call that goes on from sums, which then hold what is due by now."""
        # k and v are what the sums do not hold: some tokens of the past, and the new ones from
        # `first` on. Those before `cut` are due to go into the sums in this call.
        cut, first = state.due, k.shape[2] - q.shape[2]
        tokens = [slice(None, cut), slice(cut, None)]
        masks = [None if mask is None else mask[:, part] for part in tokens]
        (k_old, k_new), (v_old, v_new) = ([x[:, :, part] for part in tokens] for x in (k, v))
        # Where queries lie on both sides of the cut (a long prompt), the earlier ones must not see
        # sums over later keys: two calls, and the first one's sums are those that are kept.
        if call.causal and cut > first:
            before, memory = self.over_sums(
                q[:, :, : cut - first], k_old, v_old, masks[0], state.memory, options, keep=True
            )
            after, _ = self.over_sums(
                q[:, :, cut - first :], k_new, v_new, masks[1], memory, options
            )
            state.fold(cut, memory)
            return torch.cat([before, after], dim=2)
        # A decoding step: all is read first, then the oldest tokens move; one step in `ROLLBACK`
        # does.
        out, _ = self.over_sums(q, k, v, mask, state.memory, options, causal=call.causal)
        if cut:
            _, memory = self.over_sums(None, k_old, v_old, masks[0], state.memory, options)
            state.fold(cut, memory)
        return out

    def _attend_static(
        self, q, k, v, call: Call, state: StaticSums, mask: Tensor | None, options: dict, impl: str
    ) -> Tensor:
        """The same of a static state: a step in operations whose sizes do not change."""
        directions = options.get("directions")
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        features = linear.width(
            self.feature_map, k.shape[3], 0 if directions is None else len(directions)
        )
        weighs = linear.MAPS[self.feature_map].weighs
        memory = state.allocate(features, self.normalize, weighs, wide)
        if state.growing is not None:
            out = self._attend_state(q, k, v, call, state.growing, mask, options)
            state.settle()
            return out
        if impl == "triton":
            self.chosen_impl = torch_only(self.impl)
        how = step.Options(
            self.feature_map,
            directions,
            options.get("decay"),
            self.normalize,
            linear.factors_of(self.feature_map, call.scale),
            call.scale,
            wide,
        )
        number, total = call.layout.ring, call.layout.total
        # a step's layout has all of it
        assert number is not None
        assert total is not None
        assert mask is not None
        assert state.base is not None
        out = step.read(q, k, v, memory, mask, total - 1 - number, total - state.base, how).to(
            q.dtype
        )
        # The oldest tokens, whether or not they are due: where they are not, nothing is added.
        places = (state.base + torch.arange(ROLLBACK, device=k.device)) % k.shape[2]
        due = state.due
        old = (x.index_select(2, places) for x in (k, v))
        step.fold(*old, memory, mask.index_select(1, places), due, how)
        state.base.add_(torch.where(due, ROLLBACK, 0))
        return out

    def cost(self, shape: Shape) -> Cost:
        """A multiply-add per feature and value, for each key into the sums and for each query out
        of them (or, where that is less, the products of all pairs), and the features' own products;
        q, k, v and the output moved once. A call that continues reads the state, and writes the
        sums when tokens go into them. Elementwise work and the normaliser, which is one more column
        of the values, are not counted.

        Backward: twice per query (dq, the sums' gradient) and three times per key (the sums again,
        dk, dv)."""
        features = self.feature_count(shape.head_dim)
        row = 2 * features * shape.value_dim
        new, past = shape.queries, shape.keys - shape.queries
        if not shape.causal:
            new, past = shape.keys, 0
        tokens = shape.heads * shape.queries + shape.kv_heads * new
        maps = tokens * self.feature_flops(shape.head_dim)
        pairs = shape.heads * (
            shape.queries * (shape.queries + 1) // 2 if shape.causal else shape.queries * shape.keys
        )
        # short sequences need less by the T x T matrix of weights than by sums of F x Dv numbers
        one = 2 * pairs * (features + shape.value_dim)
        token = shape.kv_bytes // shape.keys
        if shape.backward:
            sums = min(
                row * (2 * shape.heads * shape.queries + 3 * shape.kv_heads * new), one * 5 // 2
            )
            return Cost(
                flops=shape.batch * (sums + 2 * maps),
                read_bytes=shape.query_bytes + new * token + 2 * shape.output_bytes,
                write_bytes=shape.query_bytes + new * token,
            )
        sums = row * tokens
        sums = min(sums, one + row * shape.heads * shape.queries * bool(past))
        held = self.held_bytes(shape, past)
        rewritten = self.memory_bytes(shape) if past and folded(shape.keys) > folded(past) else 0
        return Cost(
            flops=shape.batch * (sums + maps),
            read_bytes=shape.query_bytes + new * token + held,
            write_bytes=shape.output_bytes + rewritten,
            state_bytes=self.held_bytes(shape, shape.keys),
        )

    def held_bytes(self, shape: Shape, tokens: int) -> int:
        """Bytes of a state after `tokens`."""
        newest = (tokens - folded(tokens)) * (shape.kv_bytes // shape.keys)
        return newest + (self.memory_bytes(shape) if folded(tokens) else 0)

    def memory_bytes(self, shape: Shape) -> int:
        """Bytes of the sums, fp32 or better."""
        columns = shape.value_dim + self.normalize  # the normaliser is one more value, always 1
        each = self.feature_count(shape.head_dim) * columns + linear.MAPS[self.feature_map].weighs
        return shape.batch * shape.kv_heads * each * max(4, shape.itemsize)
