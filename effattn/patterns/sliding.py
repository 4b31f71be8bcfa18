"""Sliding-window attention, with two kinds of sinks under two names.

`sinks=s` (StreamingLLM, arXiv:2309.17453): the first s keys stay visible, at their place in the
cache. `sink_logits=True` (gpt-oss): a learned logit per head stands in the softmax's denominator,
and holds no key.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); i, j: positions of queries and keys; h: a
query head."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported
from effattn.interface import Call, Traits
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Window
from effattn.patterns.exact import ExactBackend, check_size, keys_back
from effattn.patterns.residues import by_residue
from effattn.registry import register
from effattn.states.full import RingState, first_positions


@register("sliding")
class Sliding(ExactBackend):
    """A query sees exactly `window` keys, itself included: 0 <= i - j < window; bidirectional,
    (window - 1)/2 a side.

    dilation d: the keys are d apart, so that window keys span window * d tokens (Longformer's
    dilation). sinks s: the first s keys too. With a rotary rule their distance is min(i - j, window
    + s - 1 - j): keys are kept raw, and the query stands at position window + s - 1 of a cache at
    most. sink_logits: one learned logit a head, zero at first; its parameter is made at the first
    call, or at once when `heads` is given."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="ring")

    def __init__(
        self,
        window: int,
        sinks: int = 0,
        dilation: int = 1,
        sink_logits: bool = False,
        heads: int | None = None,
        impl: str = "auto",
    ):
        super().__init__(impl)
        self.window = check_size("sliding", "window", window)
        self.sinks = check_size("sliding", "sinks", sinks, least=0)
        self.dilation = check_size("sliding", "dilation", dilation)
        if sinks and dilation > 1:
            raise Unsupported(
                "sliding: sinks and dilation cannot be combined; valid is one of them"
            )
        # StreamingLLM's section 3.2: positions count within the cache of sinks and window, so that
        # a query is never further from a sink than when the cache first was full
        self.farthest = window + sinks - 1 if sinks else None
        self.sink_logits = None
        if sink_logits:
            self.sink_logits = (
                UninitializedParameter() if heads is None else nn.Parameter(torch.zeros(heads))
            )

    def extra_repr(self) -> str:
        parts = [f"window={self.window}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("sinks",) if getattr(self, name)]
        parts += [f"dilation={self.dilation}"] if self.dilation > 1 else []
        parts += ["sink_logits=True"] if self.sink_logits is not None else []
        return ", ".join([*parts, super().extra_repr()])

    def check_call(self, q, k, v, causal, extras):
        if not causal and self.sinks:
            raise Unsupported(
                "sliding: sinks need causal=True; for a bidirectional model use longformer's "
                "global tokens"
            )
        if not causal and self.window % 2 == 0:
            near = f"{self.window - 1} or {self.window + 1}"
            raise ValueError(
                f"sliding: window: got {self.window}, a bidirectional window is odd; valid is "
                f"{near}"
            )
        logits = self.sink_logits
        if logits is not None:
            if extras.get("sink_logits") is not None:
                raise ValueError(
                    "sliding: sink_logits: the model passes its own; leave out sink_logits=True"
                )
            if is_lazy(logits):
                logits.materialize((q.shape[1],), device=q.device, dtype=torch.float32)
                nn.init.zeros_(logits)
            if logits.shape != (q.shape[1],):
                raise ValueError(
                    f"q: expected {len(logits)} heads, as many as sink_logits, got {q.shape[1]}"
                )
            extras["sink_logits"] = logits

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        given = state_dict.get(prefix + "sink_logits")
        if given is not None and self.sink_logits is not None and is_lazy(self.sink_logits):
            self.sink_logits.materialize(given.shape, device=given.device, dtype=given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sees(self, i, j, h, heads, causal):
        back = keys_back(self.window, causal)
        near = (i - j < back * self.dilation) & (j - i < (1 if causal else back * self.dilation))
        near = near & ((i - j) % self.dilation == 0)
        return near | ((j < self.sinks) & (j <= i)) if self.sinks else near

    def pattern(self, causal):
        if self.dilation > 1:
            return None
        back = keys_back(self.window, causal)
        return Window(first=self.sinks, back=back, ahead=1 if causal else back)

    def attend_many(self, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: str, lse: bool):
        if self.dilation == 1:
            return super().attend_many(q, k, v, call, impl, lse)
        back = keys_back(self.window, call.causal)

        def run(q, k, v, layout):
            return flash.attention(
                q,
                k,
                v,
                Window(back=back, ahead=1 if call.causal else back),
                layout,
                causal=call.causal,
                scale=call.scale,
                softcap=call.softcap,
                impl=impl,
                lse=True,
            )

        # without gradients a long sequence is taken in pieces, each with the keys that it sees
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        reach = (self.window - 1) * self.dilation if call.causal and not learning else None
        return by_residue(self.dilation, q, k, v, call.layout, run, back=reach, lse=lse)

    def new_state(self) -> RingState:
        return RingState(
            (self.window - 1) * self.dilation + 1, partial(first_positions, self.sinks)
        )

    def pairs(self, i, shape):
        back = keys_back(self.window, shape.causal)
        near = (i // self.dilation + 1).clamp(max=back)
        if not shape.causal:
            near = near + ((shape.keys - 1 - i) // self.dilation).clamp(max=back - 1)
        # sinks that are not in the window anyway
        return shape.heads * (near + (i - self.window + 1).clamp(0, self.sinks))

    def still_seen(self, j, shape):
        first = shape.keys - shape.queries
        # the first query that is a multiple of the dilation away
        next_query = first + (j - first) % self.dilation
        near = (next_query < shape.keys) & (next_query - j <= (self.window - 1) * self.dilation)
        return near | (j < self.sinks)
