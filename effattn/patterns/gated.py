"""Linear attention with gates: each token says how much of the past is forgotten; and the gated
delta rule, which first takes out of the memory what it holds for a key already.

    S_t = a_t S_(t-1) + phi(k_t) v_t^T,                       o_t = phi(q_t) S_t / phi(q_t) n_t
    S_t = (1 - b_t phi(k_t) phi(k_t)^T) a_t S_(t-1) + b_t phi(k_t) v_t^T,     o_t = phi(q_t) S_t

The first is gated linear attention (GLA, arXiv:2312.06635; one decay a head: Mamba-2,
arXiv:2405.21060), here with linear attention's denominator; the second the gated delta rule
(arXiv:2412.06464; without a gate DeltaNet, arXiv:2406.06484; with a decay for every feature Kimi
Delta Attention, arXiv:2510.26692).

B: rows; Hq, H: query and key/value heads; T: tokens; D, V: of a key, of a value; F: features of a
head; E: 1, or F."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import check_choice
from effattn.interface import Call, Cost, Shape
from effattn.kernels import gated, linear
from effattn.kernels.linear.features import mapped
from effattn.patterns.linear import Linear, check_decay
from effattn.registry import register
from effattn.states.full import ROLLBACK
from effattn.states.static_sums import StaticSums

GATES = ("head", "feature")
# shares of the strongest decay that a gate begins with at least and at most: it learns from there
SHARES = (2.0**-16, 1 - 2.0**-6)


@register("gated")
class Gated(Linear):
    """Linear attention with learned gates, or the gated delta rule.

    feature_map, features: as for `linear`. gate: "head" (one decay a key/value head and token),
    "feature" (one for each feature), or None, with delta=True alone. decay: what the gates begin
    with, before they have learned: a number in (0, 1], a list of them, one per key/value head, or
    "retnet". delta: the delta rule; features then have length 1 and no denominator (`normalize` is
    False), and how much of a key is written is learned too.

    What a token says is read off its value, which no position rule turns: log a_t = -5 sigmoid(w
    v_t + c), so that a step keeps e^-5 at least, and b_t = sigmoid(w' v_t + c'). w and w' are 0 at
    first. The parameters exist after the first call: gate_weight (H, E, V), gate_bias (H, E),
    write_weight (H, V) and write_bias (H,)."""

    traits = replace(Linear.traits, bidirectional=False, learned=True)
    implementations = gated.IMPLEMENTATIONS

    def __init__(
        self,
        feature_map: str = "hedgehog",
        gate: str | None = "head",
        delta: bool = False,
        decay: float | str | list[float] = "retnet",
        normalize: bool | None = None,
        features: int | None = None,
        impl: str = "auto",
    ):
        if type(delta) is not bool:
            raise ValueError(f"gated: delta: got {delta!r}, valid are True and False")
        if gate is not None:
            check_choice("gated: gate", gate, GATES)
        elif not delta:
            raise ValueError(
                "gated: gate: got None, valid without delta=True are 'head' and 'feature'; linear "
                "attention without gates is `linear`"
            )
        if decay is None:
            raise ValueError(
                "gated: decay: got None, valid is what the gates begin with: 'retnet', a number "
                "in (0, 1] or a list of them"
            )
        check_decay("gated", decay, none="")
        if delta and normalize:
            raise ValueError(
                "gated: normalize: got True, but the delta rule has no denominator; valid with "
                "delta=True is False"
            )
        super().__init__(
            feature_map,
            decay=decay,
            normalize=not delta if normalize is None else normalize,
            features=features,
            impl=impl,
        )
        self.traits = type(self).traits
        self.gate, self.delta = gate, delta
        self.gate_weight = self.gate_bias = self.write_weight = self.write_bias = None
        if gate is not None:
            self.gate_weight, self.gate_bias = UninitializedParameter(), UninitializedParameter()
            self.per_kv_head += ("gate_weight", "gate_bias")
        if delta:
            self.write_weight, self.write_bias = UninitializedParameter(), UninitializedParameter()
            self.per_kv_head += ("write_weight", "write_bias")

    def extra_repr(self) -> str:
        parts = [f"feature_map={self.map!r}", f"gate={self.gate!r}"]
        parts += ["delta=True"] if self.delta else []
        parts += [f"decay={self.decay!r}"] if self.decay != "retnet" else []
        parts += [] if self.normalize or self.delta else ["normalize=False"]
        parts += [] if self.features is None else [f"features={self.features}"]
        return ", ".join([*parts, f"impl={self.impl!r}"])

    # Parameters
    # ---------------------------------------------------------------------------------------------

    def check_call(self, q, k, v, causal, extras):
        super().check_call(q, k, v, causal, extras)
        heads, wide = k.shape[1], 1
        if self.gate == "feature":
            wide = self.feature_count(k.shape[-1])
        sizes = {
            "gate_weight": (heads, wide, v.shape[-1]),
            "gate_bias": (heads, wide),
            "write_weight": (heads, v.shape[-1]),
            "write_bias": (heads,),
        }
        for name, size in sizes.items():
            parameter = getattr(self, name)
            if parameter is None:
                continue
            if is_lazy(parameter):
                parameter.materialize(size, device=v.device, dtype=torch.float32)
                with torch.no_grad():
                    parameter.zero_()
                    if name == "gate_bias":
                        parameter.copy_(_first_bias(self.decays(heads))[:, None])
            if parameter.shape != size:
                raise ValueError(
                    f"v: {name} has learned {tuple(parameter.shape)}, which {heads} key/value "
                    f"heads of {v.shape[-1]} do not fit"
                )

    def gates(self, v: Tensor) -> dict[str, Tensor | None]:
        """log_decay (B, H, T, E) and beta (B, H, T) of values v (B, H, T, V), in fp32 or better;
        None where there is no such gate."""
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        found: dict[str, Tensor | None] = {"log_decay": None, "beta": None}
        if self.gate_weight is not None:
            score = v @ self.gate_weight.to(v.dtype).mT + self.gate_bias.to(v.dtype)[:, None]
            found["log_decay"] = gated.LOWEST * score.sigmoid()
        if self.write_weight is not None:
            score = (v @ self.write_weight.to(v.dtype)[..., None])[..., 0]
            found["beta"] = (score + self.write_bias.to(v.dtype)[:, None]).sigmoid()
        return found

    # The method
    # ---------------------------------------------------------------------------------------------

    def mapped(self, q, k):
        if self.map_q is None:
            q, k = mapped(q, self.feature_map), mapped(k, self.feature_map)
        else:
            q, k = super().mapped(q, k)
        return (_unit(q), _unit(k)) if self.delta else (q, k)

    def kernel_options(self, k):
        return {}  # gates are told from the values, and the decay is only where they begin

    def definition(self, q, k, v, mask, causal, options):
        from effattn.kernels.gated.reference import attention

        return attention(q, k, v, mask=mask, **self._arguments(v, options))

    def over_sums(self, q, k, v, mask, memory, options, *, causal=True, keep=False):
        options = self._arguments(v, options) | {"impl": options["impl"]}
        if q is None:
            scale = options.pop("scale")  # noqa: F841 - of outputs, which there are none of
            return None, gated.fold(k, v, mask=mask, memory=memory, **options)
        return gated.attention(q, k, v, mask=mask, memory=memory, keep=keep, **options)

    def _arguments(self, v: Tensor, options: dict) -> dict:
        """What the kernel and the reference are told. Features of length 1 need no scale."""
        scale = 1.0 if self.delta else options["scale"]
        return {"scale": scale, "normalize": self.normalize, **self.gates(v)}

    def _attend_static(
        self, q, k, v, call: Call, state: StaticSums, mask: Tensor | None, options: dict, impl: str
    ) -> Tensor:
        wide = torch.promote_types(k.dtype, torch.float32)
        memory = state.allocate(k.shape[3], self.normalize, False, wide)
        if state.growing is not None:
            out = self._attend_state(q, k, v, call, state.growing, mask, options)
            state.settle()
            return out
        # The tokens in their order; of places that hold none the mask says so.
        order = (state.base + torch.arange(k.shape[2], device=k.device)) % k.shape[2]
        k, v = k.index_select(2, order), v.index_select(2, order)
        mask = mask.index_select(1, order).expand(k.shape[0], -1)
        held = linear.Memory(*(None if x is None else x.clone() for x in memory))
        # the query is the last token that is there, wherever that is: keys behind it are hidden
        out, _ = self.over_sums(q, k, v, mask, held, options)
        first = (slice(None), slice(None), slice(ROLLBACK))
        due, keys = state.due, mask[:, :ROLLBACK]
        _, new = self.over_sums(None, k[first], v[first], keys, held, options)
        for old, x in zip(memory, new, strict=True):
            if old is not None:
                old.copy_(torch.where(due, x, old))
        state.base.add_(torch.where(due, ROLLBACK, 0))
        return out

    def cost(self, shape: Shape) -> Cost:
        """As for `linear`, with the gates' own products, and for the delta rule one more product
        of each key with the sums, of which it takes out what it finds. Elementwise work is not
        counted."""
        new = shape.keys if shape.backward else shape.queries
        scores = self.delta + (self.feature_count(shape.head_dim) if self.gate == "feature" else 1)
        token = 2 * shape.value_dim * (scores if self.gate or self.delta else 0)
        if self.delta:
            token += 2 * self.feature_count(shape.head_dim) * shape.value_dim
        flops = shape.batch * shape.kv_heads * new * token
        return super().cost(shape) + Cost(flops=flops * (2 if shape.backward else 1))


def _unit(x: Tensor) -> Tensor:
    """Features of length 1, (..., F); 0 where there is nothing."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1, eps=1e-6).to(x.dtype)


def _first_bias(decays: list[float]) -> nn.Parameter | Tensor:
    """(H,) fp32: with it a gate begins at these decays, or as near as it can learn from."""
    shares = [min(max(math.log(a) / gated.LOWEST, SHARES[0]), SHARES[1]) for a in decays]
    return torch.tensor(shares, dtype=torch.float64).logit().float()
