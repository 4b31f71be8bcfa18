"""Linear attention: a feature map in the place of the exponential, so that the past is a sum of
fixed size.

    o_t = sum_j w_tj v_j / sum_j w_tj,  w_tj = decay^(t - j) phi(q_t).phi(k_j),  j <= t if causal

Katharopoulos et al., arXiv:2006.16236. With decay it is what RetNet (arXiv:2307.08621) and
Lightning attention (arXiv:2401.04658) compute, normalised or not. A learned map is Hedgehog's
(arXiv:2402.04347).

B: rows; Hq, Hkv: query and key/value heads; T: tokens; D, Dv: of a key, of a value; F: features of
a head."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported, check_choice
from effattn.interface import Backend, Call, Cost, Shape, Traits
from effattn.kernels import linear
from effattn.kernels.linear import step
from effattn.kernels.linear.features import LOWEST, normalized
from effattn.patterns.exact import check_size
from effattn.registry import register
from effattn.states.base import State
from effattn.states.full import ROLLBACK, FullState
from effattn.states.recurrent import RecurrentState, folded
from effattn.states.static_sums import StaticSums

LEARNED = ("hedgehog", "exp")
_FIXED = [(one.signed, name) for name, one in linear.MAPS.items() if not one.directed]
# those that can be normalised first
MAPS = (
    *(name for signed, name in _FIXED if not signed),
    *LEARNED,
    *(name for signed, name in _FIXED if signed),
)
# of a key's exponents in the map "exp": no maximum is taken off, since their size weighs the keys
MOST = 8.0


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
        self.chosen_impl = impl = linear.choose(self.impl, q.device)
        dtype = q.dtype
        q, k = self.mapped(q, k)
        return self._attend(q, k, v.to(k.dtype), call, impl).to(dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: str) -> Tensor:
        """`attend`, of mapped q and k."""
        mask = call.layout.mask
        options = {"scale": call.scale, "normalize": self.normalize, **self.kernel_options(k)}
        if impl == "reference":
            from effattn.kernels.linear.reference import attention

            return attention(q, k, v, self.feature_map, mask=mask, causal=call.causal, **options)
        options |= {"feature_map": self.feature_map, "impl": impl}
        state = call.state
        if isinstance(state, StaticSums):
            return self._attend_static(q, k, v, call, state, mask, options)
        if not isinstance(state, RecurrentState):  # none: a whole sequence
            return linear.attention(q, k, v, mask=mask, causal=call.causal, **options)[0]
        return self._attend_state(q, k, v, call, state, mask, options)

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
            before, memory = linear.attention(
                q[:, :, : cut - first],
                k_old,
                v_old,
                mask=masks[0],
                memory=state.memory,
                keep=True,
                **options,
            )
            after, _ = linear.attention(
                q[:, :, cut - first :], k_new, v_new, mask=masks[1], memory=memory, **options
            )
            state.fold(cut, memory)
            return torch.cat([before, after], dim=2)
        # A decoding step: all is read first, then the oldest tokens move; one step in `ROLLBACK`
        # does.
        out, _ = linear.attention(
            q, k, v, mask=mask, causal=call.causal, memory=state.memory, **options
        )
        if cut:
            state.fold(
                cut, linear.fold(k_old, v_old, mask=masks[0], memory=state.memory, **options)
            )
        return out

    def _attend_static(
        self, q, k, v, call: Call, state: StaticSums, mask: Tensor | None, options: dict
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


@register("linear")
class Linear(KernelBackend):
    """Linear attention with a choice of features, and optional decay.

    feature_map: "elu" (elu(x) + 1), "relu", "relu2" (squared), "softmax" (over a head's
    dimensions), "identity" (with normalize=False), or learned: "hedgehog", the softmax of [W x, -W
    x], and "exp", their exponential, Hedgehog's map before it was normalised: long keys keep their
    weight, and a pretrained head is matched more closely. W: one matrix per query head and one per
    key/value head, which exist after the first call, of `features` rows (default: as many as a head
    has dimensions), the identity at first, and orthogonal matrices below it. `scale` has no meaning
    for the features: it multiplies the output if that is not normalised, and cancels otherwise.
    decay: None, a number in (0, 1], "retnet" (1 - 2^(-5 - h) for key/value head h), or a list, one
    per key/value head; causal only. normalize=False leaves out the denominator (RetNet, Lightning).
    """

    traits = Traits(exact=False, causal=True, bidirectional=True, learned=False, state="recurrent")
    per_kv_head: tuple[str, ...] = ()  # parameters whose first size is that of k's heads

    def __init__(
        self,
        feature_map: str = "elu",
        decay: float | str | list[float] | None = None,
        normalize: bool = True,
        features: int | None = None,
        impl: str = "auto",
    ):
        super().__init__(impl)
        self.map = check_choice("linear: feature_map", feature_map, MAPS)
        if type(normalize) is not bool:
            raise ValueError(f"linear: normalize: got {normalize!r}, valid are True and False")
        if feature_map == "identity" and normalize:
            raise ValueError(
                "linear: feature_map='identity' has weights of either sign, which no denominator "
                "can normalise; valid is normalize=False with it"
            )
        if features is not None and feature_map not in LEARNED:
            raise ValueError(
                f"linear: features: only a learned map has them, feature_map={feature_map!r} is "
                "fixed"
            )
        self.features = None if features is None else check_size("linear", "features", features)
        self.decay, self.normalize = _check_decay(decay), normalize
        self.feature_map = "identity" if feature_map in LEARNED else feature_map
        self._rates: tuple = (None, None)  # of the last call: for what, and the numbers
        self.map_q = self.map_k = None
        if feature_map in LEARNED:
            self.traits = replace(type(self).traits, learned=True)
            self.map_q, self.map_k = UninitializedParameter(), UninitializedParameter()
            self.per_kv_head = ("map_k",)

    def extra_repr(self) -> str:
        parts = [f"feature_map={self.map!r}"]
        parts += [f"decay={self.decay!r}"] if self.decay is not None else []
        parts += [] if self.normalize else ["normalize=False"]
        parts += [] if self.features is None else [f"features={self.features}"]
        return ", ".join([*parts, super().extra_repr()])

    def check_call(self, q, k, v, causal, extras):
        if self.decay is not None and not causal:
            raise Unsupported(
                "linear: decay counts from the past on; causal=False is valid without decay only"
            )
        if isinstance(self.decay, list) and len(self.decay) != k.shape[1]:
            raise ValueError(
                f"linear: decay: got {len(self.decay)} values, k has {k.shape[1]} key/value heads"
            )
        if self.map_q is None:
            return
        dim, rows = q.shape[-1], self.features or q.shape[-1]
        for name, parameter, heads in (
            ("q", self.map_q, q.shape[1]),
            ("k", self.map_k, k.shape[1]),
        ):
            # "exp" starts from exp(q.k / sqrt(D)), so each side has the fourth root
            if is_lazy(parameter):
                parameter.materialize((heads, rows, dim), device=q.device, dtype=torch.float32)
                with torch.no_grad():
                    parameter.copy_(
                        _first_map(rows, dim) * (dim**-0.25 if self.map == "exp" else 1.0)
                    )
            if parameter.shape != (heads, rows, dim):
                raise ValueError(
                    f"{name}: expected {parameter.shape[0]} heads of {parameter.shape[2]}, as "
                    f"map_{name} has learned, got {heads} of {dim}"
                )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        for name in ("map_q", "map_k"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and own is not None and is_lazy(own):
                own.materialize(given.shape, device=given.device, dtype=given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def feature_count(self, head_dim: int) -> int:
        return 2 * (self.features or head_dim) if self.map in LEARNED else head_dim

    def feature_flops(self, head_dim: int) -> int:
        return head_dim * self.feature_count(head_dim) if self.map in LEARNED else 0

    def mapped(self, q, k):
        if self.map_q is None:
            return q, k
        if self.map == "exp":
            return _exponential(q, self.map_q, query=True), _exponential(k, self.map_k, query=False)
        return _hedgehog(q, self.map_q), _hedgehog(k, self.map_k)

    def kernel_options(self, k):
        if self.decay is None:
            return {}
        heads = k.shape[1]
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        key = (heads, dtype, k.device)
        if not torch.compiler.is_compiling() and self._rates[0] == key:
            return {"decay": self._rates[1]}
        if self.decay == "retnet":  # eq. 8 of arXiv:2307.08621
            values = [1 - 2.0 ** (-5 - h) for h in range(heads)]
        else:
            values = self.decay if isinstance(self.decay, list) else [self.decay] * heads
        decay = torch.tensor(values, dtype=torch.float64).to(dtype)
        decay = decay.to(k.device, non_blocking=True)  # the host does not wait for it
        self._rates = key, decay
        return {"decay": decay}


def _first_map(rows: int, dim: int) -> Tensor:
    """(rows, dim): the identity, and random orthogonal matrices below it."""
    draw = torch.Generator().manual_seed(0)
    blocks = [torch.eye(dim)]
    while len(blocks) * dim < rows:
        blocks.append(torch.linalg.qr(torch.randn(dim, dim, generator=draw))[0])
    return torch.cat(blocks)[:rows]


def _exponential(x: Tensor, weight: nn.Parameter, query: bool) -> Tensor:
    """exp([W x, -W x]) per head: (B, H, T, D) -> (B, H, T, 2 F). A query's largest exponent is
    taken off, which cancels in the quotient; a key's exponents end at `MOST`. Both end at `LOWEST`
    below."""
    y = _both_signs(x, weight)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    wide = wide - wide.amax(dim=-1, keepdim=True).detach() if query else wide.clamp(max=MOST)
    return wide.clamp(min=LOWEST).exp().to(y.dtype)


def _hedgehog(x: Tensor, weight: nn.Parameter) -> Tensor:
    """softmax([W x, -W x]) per head: (B, H, T, D) -> (B, H, T, 2 D). Equation 6 of
    arXiv:2402.04347.
    """
    return normalized(_both_signs(x, weight))


def _both_signs(x: Tensor, weight: nn.Parameter) -> Tensor:
    """[W x, -W x], in x's dtype; fp16 in fp32, since the gradient of a feature is as large as the
    feature is small.
    """
    x = x.float() if x.dtype == torch.float16 else x
    y = x @ weight.to(x.dtype).mT
    return torch.cat([y, -y], dim=-1)


def _check_decay(decay) -> float | str | list[float] | None:
    """`decay` if it means something. ValueError otherwise."""
    if decay is None or decay == "retnet":
        return decay
    values = list(decay) if isinstance(decay, (list, tuple)) else [decay]
    for value in values:
        if type(value) not in (int, float) or not (math.isfinite(value) and 0 < value <= 1):
            raise ValueError(
                f"linear: decay: got {value!r}, valid are None, 'retnet', a number in (0, 1] or a "
                "list of them"
            )
    if not values:
        raise ValueError("linear: decay: got an empty list, valid is one number per key/value head")
    return values if isinstance(decay, (list, tuple)) else decay
