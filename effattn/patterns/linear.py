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
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported, check_choice
from effattn.interface import Traits
from effattn.kernels import linear
from effattn.kernels.linear.features import LOWEST, mapped, normalized
from effattn.patterns.exact import check_size
from effattn.patterns.feature_maps import KernelBackend
from effattn.registry import register

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
        self.map = check_choice(f"{self.name}: feature_map", feature_map, MAPS)
        if type(normalize) is not bool:
            raise ValueError(f"{self.name}: normalize: got {normalize!r}, valid are True and False")
        if feature_map == "identity" and normalize:
            raise ValueError(
                f"{self.name}: feature_map='identity' has weights of either sign, which no "
                "denominator can normalise; valid is normalize=False with it"
            )
        if features is not None and feature_map not in LEARNED:
            raise ValueError(
                f"{self.name}: features: only a learned map has them, feature_map={feature_map!r} "
                "is fixed"
            )
        self.features = None if features is None else check_size(self.name, "features", features)
        self.decay, self.normalize = check_decay(self.name, decay), normalize
        self.feature_map = "identity" if feature_map in LEARNED else feature_map
        self._rates: tuple = (None, None)  # of the last call: for what, and the numbers
        # of an unmade size until the first call, None where the map is fixed
        self.map_q: Any = None
        self.map_k: Any = None
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
                f"{self.name}: decay counts from the past on; causal=False is valid without decay "
                "only"
            )
        if isinstance(self.decay, list) and len(self.decay) != k.shape[1]:
            raise ValueError(
                f"{self.name}: decay: got {len(self.decay)} values, k has {k.shape[1]} key/value "
                "heads"
            )
        if self.map_q is not None:
            self._check_maps(q, k)

    def _check_maps(self, q: Tensor, k: Tensor) -> None:
        """The learned maps, which exist from the first call on. ValueError for other heads."""
        dim, rows = q.shape[-1], self.features or q.shape[-1]
        for name, parameter, heads in (
            ("q", self.map_q, q.shape[1]),
            ("k", self.map_k, k.shape[1]),
        ):
            assert parameter is not None
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
        for name, own in self._parameters.items():
            given = state_dict.get(prefix + name)
            if given is not None and own is not None and is_lazy(own):
                own.materialize(given.shape, device=given.device, dtype=given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def feature_count(self, head_dim: int) -> int:
        return 2 * (self.features or head_dim) if self.map in LEARNED else head_dim

    def feature_flops(self, head_dim: int) -> int:
        return head_dim * self.feature_count(head_dim) if self.map in LEARNED else 0

    def mapped(self, q, k):
        return self.mapped_and_top(q, k)[:2]

    def mapped_and_top(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`mapped`, and what a query's largest exponent was (B, Hq, T), where that was taken off
        its features."""
        if self.map_q is None or self.map_k is None:
            return q, k, None
        if self.map == "exp":
            query, top = _exponential(q, self.map_q, query=True)
            return query, _exponential(k, self.map_k, query=False)[0], top
        return _hedgehog(q, self.map_q), _hedgehog(k, self.map_k), None

    def product_at_zero(self, dim: int) -> float:
        """phi(0) . phi(0) for heads of `dim`, whatever the learned maps are."""
        count = self.feature_count(dim)
        if self.map == "exp":
            return float(count)
        if self.map in LEARNED:  # they sum up to 1
            return 1 / count
        return float(mapped(torch.zeros(1, dim), self.map).square().sum())

    def decays(self, heads: int) -> list[float]:
        """Of each of `heads` key/value heads, for a decay that is not None."""
        assert self.decay is not None
        if isinstance(self.decay, str):  # "retnet": eq. 8 of arXiv:2307.08621
            return [1 - 2.0 ** (-5 - h) for h in range(heads)]
        return self.decay if isinstance(self.decay, list) else [self.decay] * heads

    def kernel_options(self, k):
        if self.decay is None:
            return {}
        heads = k.shape[1]
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        key = (heads, dtype, k.device)
        if not torch.compiler.is_compiling() and self._rates[0] == key:
            return {"decay": self._rates[1]}
        decay = torch.tensor(self.decays(heads), dtype=torch.float64).to(dtype)
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


def _exponential(x: Tensor, weight: Tensor, query: bool) -> tuple[Tensor, Tensor | None]:
    """exp([W x, -W x]) per head: (B, H, T, D) -> (B, H, T, 2 F). A query's largest exponent is
    taken off, which cancels in the quotient, and comes with it (B, H, T); a key's exponents end at
    `MOST`. Both end at `LOWEST` below."""
    y = _both_signs(x, weight)
    wide, top = y.to(torch.promote_types(y.dtype, torch.float32)), None
    if query:
        top = wide.amax(dim=-1).detach()
        wide = wide - top[..., None]
    else:
        wide = wide.clamp(max=MOST)
    return wide.clamp(min=LOWEST).exp().to(y.dtype), top


def _hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """softmax([W x, -W x]) per head: (B, H, T, D) -> (B, H, T, 2 D). Equation 6 of
    arXiv:2402.04347.
    """
    return normalized(_both_signs(x, weight))


def _both_signs(x: Tensor, weight: Tensor) -> Tensor:
    """[W x, -W x], in x's dtype; fp16 in fp32, since the gradient of a feature is as large as the
    feature is small.
    """
    x = x.float() if x.dtype == torch.float16 else x
    y = x @ weight.to(x.dtype).mT
    return torch.cat([y, -y], dim=-1)


def check_decay(name: str, decay, none: str = "None, ") -> float | str | list[float] | None:
    """`decay` if it means something. ValueError otherwise, which names None first unless a caller
    that refuses it says so.
    """
    if decay is None or decay == "retnet":
        return decay
    values = list(decay) if isinstance(decay, (list, tuple)) else [decay]
    for value in values:
        if type(value) not in (int, float) or not (math.isfinite(value) and 0 < value <= 1):
            raise ValueError(
                f"{name}: decay: got {value!r}, valid are {none}'retnet', a number in (0, 1] or a "
                "list of them"
            )
    if not values:
        raise ValueError(
            f"{name}: decay: got an empty list, valid is one number per key/value head"
        )
    return values if isinstance(decay, (list, tuple)) else decay
