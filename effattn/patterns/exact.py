"""What the exact patterns share: softmax attention over the keys that a predicate shows, by the
flash and decode kernels. A pattern file says who sees whom (`sees`, the definition), how a kernel
does it (`pattern` or `attend_many`), what must be remembered (`new_state`), and how many pairs
there are (`pairs`).

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries, the last of all tokens, and keys; D,
Dv: of a key, of a value. i, j: positions of queries and keys; h: a query head."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.interface import Backend, Call, Cost, Shape
from effattn.kernels import decode, flash
from effattn.kernels.flash.dropout import Dropout
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.patterns.defined import by_definition
from effattn.states.full import RingState


class ExactBackend(Backend):
    """Base of the exact patterns. Subclasses set `traits` and write `sees`, and `pattern` if one
    predicate suffices.
    """

    implementations = flash.IMPLEMENTATIONS
    extras: tuple[str, ...] = ("softcap", "sink_logits", "latent", "dropout")

    def __init__(self, impl: str = "auto"):
        super().__init__(impl)
        self.chosen_impl = flash.choose(impl)

    def sees(self, i: Tensor, j: Tensor, h: Tensor, heads: int, causal: bool) -> Tensor:
        """How often the query at position i of head h sees the key at position j: bool, or a count.
        The definition: i, j and h broadcast against each other; negative positions are padding."""
        raise NotImplementedError

    @property
    def score_rules(self) -> bool:
        return True

    def pattern(self, causal: bool) -> Pattern | None:
        """The predicate as the kernels take it; None when the subclass writes `attend_many`
        itself.
        """
        return None

    def pairs(self, i: Tensor, shape: Shape) -> Tensor:
        """How many keys the queries at positions i (N,) see, over all heads and counted as often as
        `sees` says: int64 of any shape that sums up to the number of (query, key) pairs of one
        batch row."""
        raise NotImplementedError

    def still_seen(self, j: Tensor, shape: Shape) -> Tensor:
        """bool: which of the keys at positions j (N,), all before the first query, some query of a
        causal call sees.
        """
        raise NotImplementedError

    def held(self, tokens: int) -> int:
        """How many tokens a state holds after `tokens`."""
        state = self.new_state()
        return state.held(tokens) if isinstance(state, RingState) else tokens

    def cost(self, shape: Shape) -> Cost:
        """Two matrix products over the pairs that see each other; q, what is seen of k and v, and
        the output moved once. The softmax's own operations are not counted, as everywhere.

        Backward: five products, since scores are computed again from q, k and the log-sum-exps
        (FlashAttention-2, arXiv:2307.08691, algorithm 2); the output and its gradient are read too,
        all gradients written."""
        first = shape.keys - shape.queries
        pairs = int(self.pairs(torch.arange(first, shape.keys), shape).sum())
        keys = shape.keys  # bidirectional calls are whole sequences
        if shape.causal and first:
            keys = shape.queries + int(self.still_seen(torch.arange(first), shape).sum())
        token = shape.kv_bytes // shape.keys
        if shape.backward:
            return Cost(
                flops=2 * shape.batch * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + keys * token
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        return Cost(
            flops=2 * shape.batch * pairs * (shape.head_dim + shape.value_dim),
            read_bytes=shape.query_bytes + keys * token,
            write_bytes=shape.output_bytes,
            state_bytes=self.held(shape.keys) * token,
        )

    @property
    def packable(self) -> bool:
        """Whether its cache may hold packed keys (`effattn.quant`): one unshifted predicate says
        who sees them.
        """
        pattern = self.pattern(causal=True)
        return (
            pattern is not None
            and not getattr(pattern, "shifted", False)
            and "global_qkv" not in self.extras
        )

    def turns_keys(self, q, k, v, layout, rule):
        return self.impl != "reference" and self._few(q, k, v, layout)

    def _few(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> bool:
        """Whether the decode kernels serve a call: rings have no other way. Only plain torch has
        gradients there.
        """
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return layout.ring is not None or (q.shape[2] <= decode.MOST_QUERIES and not learning)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.dropout:
            call = replace(call, drop=self._drawn(q, k, call))
        if call.sink_logits is None:
            return self.attended(q, k, v, call, False)
        # A logit in the denominator only: out * Z / (Z + exp(logit)), and Z = exp(lse). The kernels
        # need not know of it, and its gradient is the sigmoid's.
        out, lse = self.attended(q, k, v, call, True)
        share = torch.sigmoid(lse - call.sink_logits.to(lse.dtype)[None, :, None])
        return (out.to(lse.dtype) * share[..., None]).to(out.dtype)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool):
        """`attend` without `call.sink_logits`: out (B, Hq, Tq, Dv), and with `lse` the log-sum-exp
        (B, Hq, Tq)."""
        impl = self.runs(flash.choose(self.impl, q.device))
        if isinstance(call.layout.total, Tensor) and impl == "triton":
            impl = self.runs(torch_only(self.impl))
        packed = call.state if call.state is not None and call.state.packed else None
        if impl == "reference" and packed is None:
            out, sums = self._reference(q, k, v, call)
            return (out, sums) if lse else out
        # The Triton kernels have no gradient for a bias' parameters. "auto" may take torch then; an
        # explicit impl runs or raises.
        if (
            impl == "triton"
            and call.bias is not None
            and torch.is_grad_enabled()
            and call.bias.params.requires_grad
        ):
            if self.impl == "triton":
                raise Unsupported(
                    "impl: 'triton' has no gradients for learned biases; valid are 'auto' and "
                    "'torch'"
                )
            impl = self.runs("torch")
        if packed is not None:  # only it can read what it holds, and k, v are the new tokens
            return packed.attend(q, k, v, self.pattern(call.causal), call, impl, lse)
        if self._undefined(call):
            return self._by_definition(q, k, v, call, lse)
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if call.drop is None and self._few(q, k, v, call.layout):
            return self.attend_few(q, k, v, call, "torch" if learning else impl, lse)
        return self.attend_many(q, k, v, call, impl, lse)

    def _undefined(self, call: Call) -> bool:
        """Whether no kernel has what a call asks for: dropout over a ring, and dropout or scores
        pair by pair in a pattern that is made of several parts."""
        layout = call.layout
        far = call.far is not None or (call.turn is not None and call.turn.window is not None)
        if call.drop is None:
            return (far or call.bias is not None) and self.pattern(call.causal) is None
        in_parts = self.pattern(call.causal) is None
        ordered = layout.ring is None and layout.slots_at is None and layout.total is None
        return in_parts or not ordered or call.turn is not None

    def _by_definition(self, q, k, v, call: Call, lse: bool):
        if self.impl == "triton":
            asked = "dropout" if call.drop is not None else "scores pair by pair"
            raise Unsupported(
                f"impl: 'triton' has no {asked} for this call of {self.name}; valid are 'auto' and "
                "'torch'"
            )
        self.chosen_impl = "torch"
        return by_definition(self.counts, self.pattern(call.causal), q, k, v, call, lse)

    def _drawn(self, q: Tensor, k: Tensor, call: Call) -> Dropout:
        """Which weights of a call are dropped: by positions, so that padding changes nothing."""
        at_q = call.layout.query_positions(q.shape[2], k.shape[2], q.device)
        at_k = call.layout.key_positions(k.shape[2], k.device)
        return Dropout.drawn(call.dropout, at_q, at_k, q.shape[0], q.shape[1])

    def attend_few(self, q, k, v, call: Call, impl: str, lse: bool):
        """Up to 16 new tokens over any layout, without gradients."""
        pattern = self.pattern(call.causal) if call.prefix is None else None
        counts = self.counts(q, k, call) if pattern is None else None
        return decode.attention(
            q,
            k,
            v,
            pattern,
            call.layout,
            causal=call.causal,
            scale=call.scale,
            softcap=call.softcap,
            q_first=call.q_first,
            counts=counts,
            turn=call.turn,
            bias=call.bias,
            impl=impl,
            lse=lse,
        )

    def attend_many(self, q, k, v, call: Call, impl: str, lse: bool):
        """Whole sequences and long chunks, keys in order, with gradients."""
        if self.pattern(call.causal) is None:
            raise NotImplementedError(f"{self.name}: write `pattern`, or `attend_many`")
        return flash.attention(
            q,
            k,
            v,
            self.pattern(call.causal),
            call.layout,
            causal=call.causal,
            scale=call.scale,
            softcap=call.softcap,
            q_first=call.q_first,
            far=call.far,
            bias=call.bias,
            drop=call.drop,
            impl=impl,
            lse=lse,
        )

    def weights(self, q: Tensor, k: Tensor, **call) -> Tensor:
        """How much of each value an output holds, (B, Hq, Tq, Tk) in q's dtype: what the reference
        gives for the values of the identity. Memory and time are those of every pair, and more.

        call: as for `forward`; `global_qkv` without a state."""
        keys = k.shape[2]
        eye = torch.eye(keys, dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        if call.get("global_qkv") is not None:
            call["global_qkv"] = (*call["global_qkv"][:2], eye)
        own = copy.copy(self)  # the same parameters
        own.impl = own.chosen_impl = "reference"
        return own(q, k, eye, **call)

    def counts(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """`sees` of every query and key of a call, (1 or B, Hq, Tq, Tk); padding sees and shows
        nothing.
        """
        i = call.layout.query_positions(q.shape[2], k.shape[2], q.device)[:, None, :, None]
        j = call.layout.key_positions(k.shape[2], k.device)[:, None, None, :]
        h = torch.arange(q.shape[1], device=q.device)[:, None, None]
        return self.sees(i, j, h, q.shape[1], call.causal) * ((i >= 0) & (j >= 0))

    def _reference(self, q, k, v, call: Call):
        from effattn.kernels.flash.reference import attention

        i = call.layout.query_positions(q.shape[2], k.shape[2], q.device)[:, :, None]
        j = call.layout.key_positions(k.shape[2], k.device)[:, None, :]
        first, pattern = None, self.pattern(call.causal)
        if call.q_first is not None and pattern is not None:
            first = ((j >= 0) & (j < pattern.first))[:, 0]
        return attention(
            q,
            k,
            v,
            self.counts(q, k, call),
            scale=call.scale,
            softcap=call.softcap,
            q_first=call.q_first,
            first=first,
            far=call.far,
            bias=call.bias,
            distance=i - j,
            drop=call.drop,
        )


def torch_only(impl: str) -> str:
    """ "torch", for a static state, whose length the Triton kernels cannot read. Unsupported where
    "triton" was asked for."""
    if impl == "triton":
        raise Unsupported(
            "impl: 'triton' takes lengths from the host, and a static state's is on the device; "
            "valid with it are 'auto' and 'torch'"
        )
    return "torch"


def keys_back(window: int, causal: bool) -> int:
    """How many keys of a window lie at a query's own position or before it: all when causal, else
    (window + 1) / 2 of an odd one, and as many ahead."""
    return window if causal else (window + 1) // 2


def check_size(backend: str, argument: str, value: int, least: int = 1) -> int:
    """`value` if it is an int of at least `least`. ValueError naming the argument otherwise."""
    if type(value) is not int or value < least:
        raise ValueError(
            f"{backend}: {argument}: got {value!r}, valid is a whole number of at least {least}"
        )
    return value
