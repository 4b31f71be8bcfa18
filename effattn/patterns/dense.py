"""Dense softmax attention: every query sees every key, or the keys up to itself; or a prefix-LM.

B: rows; Hq, Hkv: query and key/value heads; T: tokens; D, Dv: of a key, of a value."""

from __future__ import annotations

import torch

from effattn.interface import Call, Traits
from effattn.kernels.flash.pattern import Pattern
from effattn.patterns import prefix
from effattn.patterns.exact import ExactBackend
from effattn.registry import register

EVERYTHING = Pattern()


@register("dense")
class Dense(ExactBackend):
    """Plain attention: what every other exact pattern takes keys away from.

    A causal call may bring a `prefix`: the first tokens of each row, which see each other in both
    directions (prefix-LM: T5, arXiv:1910.10683; UniLM, arXiv:1905.03197). (B,) int, how many real
    tokens of each row, or (B, T) bool, which. All other tokens see what is not later, as ever. In
    whole sequences, or the first call of a state."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="full")
    plain = True
    extras = (*ExactBackend.extras, "prefix")

    def forward(
        self,
        q,
        k,
        v,
        causal=True,
        padding_mask=None,
        state=None,
        scale=None,
        rotary=None,
        documents=None,
        **extras,
    ):
        """As `Backend.forward`."""
        if extras.get("prefix") is not None:
            prefix.check(q, k, causal, state, rotary, documents)
            extras["prefix"] = prefix.mask_of(extras["prefix"], k, padding_mask)
        call = (q, k, v, causal, padding_mask, state, scale, rotary, documents)
        return super().forward(*call, **extras)

    def sees(self, i, j, h, heads, causal):
        return (j <= i) if causal else (j == j) & (i == i)

    def pattern(self, causal):
        return EVERYTHING

    def counts(self, q, k, call):
        """As `sees` has it, and the pairs of a prefix."""
        visible = super().counts(q, k, call)
        if call.prefix is None:
            return visible
        last = call.layout.tokens(k.shape[2])
        of_q = call.prefix[:, last - q.shape[2] : last]
        return visible | (of_q[:, None, :, None] & call.prefix[:, None, None])

    def attend_many(self, q, k, v, call: Call, impl: str, lse: bool):
        given = super().attend_many(q, k, v, call, impl, lse)
        if call.prefix is None:
            return given
        return prefix.joined(given, q, k, v, call, impl, lse)

    def pairs(self, i, shape):
        return shape.heads * (i + 1 if shape.causal else torch.full_like(i, shape.keys))

    def still_seen(self, j, shape):
        return torch.ones_like(j, dtype=torch.bool)
