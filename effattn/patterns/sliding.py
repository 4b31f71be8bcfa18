"""Sliding-window attention, with two kinds of sinks under two names.

`sinks=s` (StreamingLLM, arXiv:2309.17453): the first s keys stay visible, at their place in the
cache. `sink_logits=True` (gpt-oss): a learned logit per head stands in the softmax's denominator,
and holds no key.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); i, j: positions of queries and keys; h: a
query head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported
from effattn.interface import Call, Cost, Shape, Traits
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Window
from effattn.kernels.merge import merge
from effattn.patterns.by_head import ByHead
from effattn.patterns.compressed import Compressed
from effattn.patterns.dense import Dense
from effattn.patterns.exact import ExactBackend, check_size, keys_back
from effattn.patterns.residues import by_residue
from effattn.positions.bound import Positions
from effattn.registry import register
from effattn.states.base import State
from effattn.states.full import RingState, first_positions

EVERYTHING = 2**40  # keys of a window that has no end


@register("sliding")
class Sliding(ExactBackend):
    """A query sees exactly `window` keys, itself included: 0 <= i - j < window; bidirectional,
    (window - 1)/2 a side.

    dilation d: the keys are d apart, so that window keys span window * d tokens (Longformer's
    dilation). sinks s: the first s keys too. With a rotary rule their distance is min(i - j, window
    + s - 1 - j): keys are kept raw, and the query stands at position window + s - 1 of a cache at
    most. sink_logits: one learned logit a head, zero at first; its parameter is made at the first
    call, or at once when `heads` is given.

    window a list: one for each K/V head, None for a head that sees everything (DuoAttention,
    arXiv:2410.10819; `effattn.fit_windows` finds one). The state is a ring for each group of heads
    with the same window.

    compress c: what the window evicts is kept as means of c keys and values, each for c tokens, and
    of these the newest `means` (Compressive Transformer; None: as many as the window has tokens).
    window and sinks are multiples of c: a query sees the whole groups of its window, and of its own
    what is not later. Positions are places in the cache then, sinks or not, and a mean takes
    one."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="ring")

    def __init__(
        self,
        window: int | Sequence[int | None],
        sinks: int = 0,
        dilation: int = 1,
        sink_logits: bool = False,
        heads: int | None = None,
        compress: int | None = None,
        means: int | None = None,
        impl: str = "auto",
    ):
        super().__init__(impl)
        # by K/V head, None where all heads have the same; `window` is the widest of them then
        self.windows: tuple[int | None, ...] | None = None
        if isinstance(window, int):
            self.window = check_size("sliding", "window", window)
        else:
            self.windows = check_windows(window)
            self.window = max(map(_width, self.windows))
        self.sinks = check_size("sliding", "sinks", sinks, least=0)
        self.dilation = check_size("sliding", "dilation", dilation)
        if sinks and dilation > 1:
            raise Unsupported(
                "sliding: sinks and dilation cannot be combined; valid is one of them"
            )
        # StreamingLLM's section 3.2: positions count within the cache of sinks and window, so that
        # a query is never further from a sink than when the cache first was full
        self.farthest = self.window + sinks - 1 if sinks else None
        self.first_keys = sinks
        self.compressed = None
        if compress is not None or means is not None:
            self.compressed = self._compressed(compress, means)
            self.farthest = self.compressed.farthest
            self.extras = tuple(name for name in self.extras if name != "dropout")
            self.traits = replace(
                self.traits, exact=False, bidirectional=False, state="ring, means of what left it"
            )
        self.by_head = None
        if self.windows is not None:
            self.by_head = self._by_head(self.windows)
            whole = self.windows.count(None)
            every = f", full in {whole} of {len(self.windows)} heads" if whole else ""
            self.traits = replace(self.traits, state=f"rings by head{every}")
        self.sink_logits = None
        if sink_logits:
            self.sink_logits = (
                UninitializedParameter() if heads is None else nn.Parameter(torch.zeros(heads))
            )

    def extra_repr(self) -> str:
        parts = [f"window={self.window if self.windows is None else [*self.windows]}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("sinks",) if getattr(self, name)]
        parts += [f"dilation={self.dilation}"] if self.dilation > 1 else []
        if self.compressed is not None:
            parts += [f"compress={self.compressed.group}, means={self.compressed.means}"]
        parts += ["sink_logits=True"] if self.sink_logits is not None else []
        return ", ".join([*parts, super().extra_repr()])

    def _by_head(self, windows: tuple[int | None, ...]) -> ByHead:
        """A backend for each window, and the heads that have it."""
        different = sorted(set(windows), key=_width)

        def made(window: int | None) -> ExactBackend:
            if window is None:
                return Dense(impl=self.impl)
            return Sliding(window, self.sinks, self.dilation, impl=self.impl)

        return ByHead(
            [made(window) for window in different],
            [[head for head, own in enumerate(windows) if own == one] for one in different],
        )

    def _compressed(self, compress: int | None, means: int | None) -> Compressed:
        """What is kept of evicted tokens. Raises what the constructor does."""
        if compress is None:
            raise ValueError(f"sliding: means: got {means!r} without compress; valid is None")
        check_size("sliding", "compress", compress, least=2)
        if self.windows is not None or self.dilation > 1:
            raise Unsupported(
                "sliding: compress goes with one window for all heads, and no dilation"
            )
        for name, size in (("window", self.window), ("sinks", self.sinks)):
            if size % compress:
                near = size + compress - size % compress
                raise ValueError(
                    f"sliding: {name}: got {size} with compress={compress}, valid is a multiple of "
                    f"it, such as {near}"
                )
        count = self.window if means is None else check_size("sliding", "means", means)
        return Compressed(self.window, self.sinks, compress, count)

    def repeated(self, times: int) -> Sliding:
        wide = super().repeated(times)
        assert isinstance(wide, Sliding)
        if wide.windows is not None:
            wide.windows = tuple(one for one in wide.windows for _ in range(times))
            wide.by_head = wide._by_head(wide.windows)
        return wide

    def run(self, q, k, v, causal, padding_mask, state, scale, rotary, extras):
        """As `Backend.run`; where windows differ by head, group by group."""
        if self.compressed is not None:
            return self._run_compressed(q, k, v, padding_mask, state, scale, rotary, extras)
        # which weights are dropped is drawn by each group of heads
        whole = state is None and rotary is None and not extras.get("dropout")
        defined = self.impl == "reference" and whole
        if self.by_head is None or defined:
            return super().run(q, k, v, causal, padding_mask, state, scale, rotary, extras)
        for one in self.by_head.backends:
            one.impl = self.impl
        out = self.by_head.run(q, k, v, causal, padding_mask, state, scale, rotary, extras)
        self.chosen_impl = self.by_head.backends[0].chosen_impl
        return out

    @property
    def score_rules(self) -> bool:
        return self.compressed is None and super().score_rules

    def _run_compressed(self, q, k, v, mask, state, scale, rotary, extras) -> Tensor:
        if isinstance(rotary, Positions) and not rotary.only_turns:
            raise Unsupported(
                f"rotary: {rotary.spec!r} with compress, whose positions are places in the cache; "
                "valid are rules that only turn by fixed angles"
            )
        impl = self.runs(flash.choose(self.impl, q.device))
        how = {
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "softcap": extras.get("softcap"),
        }
        assert self.compressed is not None
        with torch.autocast(q.device.type, enabled=False):
            out, lse = self.compressed.run(q, k, v, mask, state, rotary, impl, **how)
        if extras.get("sink_logits") is None:
            return out
        share = torch.sigmoid(lse - extras["sink_logits"].to(lse.dtype)[None, :, None])
        return (out.to(lse.dtype) * share[..., None]).to(out.dtype)

    def check_call(self, q, k, v, causal, extras):
        if self.windows is not None and k.shape[1] != len(self.windows):
            raise ValueError(
                f"sliding: window: got {len(self.windows)} windows, valid is one for each of k's "
                f"{k.shape[1]} heads, or a single number"
            )
        if self.by_head is not None and extras.get("latent") is not None:
            raise Unsupported(
                "sliding: windows by head and keys that are latents, which all heads share; valid "
                "is one window"
            )
        if self.compressed is not None and extras.get("latent") is not None:
            raise Unsupported(
                "sliding: compress and keys that are latents; valid is sliding without compress"
            )
        if not causal and self.sinks:
            raise Unsupported(
                "sliding: sinks need causal=True; for a bidirectional model use longformer's "
                "global tokens"
            )
        even = [one for one in self.windows or (self.window,) if one is not None and one % 2 == 0]
        if not causal and even:
            near = f"{even[0] - 1} or {even[0] + 1}"
            raise ValueError(
                f"sliding: window: got {even[0]}, a bidirectional window is odd; valid is {near}"
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
        back = self._back(h, heads, causal)
        near = (i - j < back * self.dilation) & (j - i < (1 if causal else back * self.dilation))
        near = near & ((i - j) % self.dilation == 0)
        return near | ((j < self.sinks) & (j <= i)) if self.sinks else near

    def _back(self, h: Tensor, heads: int, causal: bool) -> Tensor | int:
        """How many keys of head h's window lie at a query's own position or before it."""
        if self.windows is None:
            return keys_back(self.window, causal)
        back = [keys_back(_width(one), causal) for one in self.windows]
        return torch.tensor(back, device=h.device)[h // (heads // len(back))]

    def pattern(self, causal):
        if self.dilation > 1 or self.by_head is not None or self.compressed is not None:
            return None
        back = keys_back(self.window, causal)
        return Window(first=self.sinks, back=back, ahead=1 if causal else back)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool):
        if call.sinks is None:
            return super().attended(q, k, v, call, lse)
        alone = Sliding(self.window, impl=self.impl)
        near = alone.attended(q, k, v, replace(call, sinks=None), True)
        self.chosen_impl = alone.chosen_impl
        first = call.sinks.attention(call.scale, call.softcap, call.drop)
        out, sums = merge([near, first])
        return (out, sums) if lse else out

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

    def growth(self, shape):
        if self.windows is None:
            return super().growth(shape)
        return super().growth(shape) * self.windows.count(None) / len(self.windows)

    def new_state(self) -> State:
        if self.by_head is not None:
            return self.by_head.new_state()
        if self.compressed is not None:
            return self.compressed.new_state(self.impl)
        return RingState(
            (self.window - 1) * self.dilation + 1, partial(first_positions, self.sinks)
        )

    def held(self, tokens: int) -> int:
        return super().held(tokens) if self.compressed is None else self.compressed.held(tokens)

    def cost(self, shape: Shape) -> Cost:
        if self.compressed is not None:
            return self.compressed.cost(shape)
        return super().cost(shape) if self.by_head is None else self.by_head.cost(shape)

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


def _width(window: int | None) -> int:
    return EVERYTHING if window is None else window


def check_windows(windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """One for each K/V head, as a tuple. ValueError for anything else."""
    if not isinstance(windows, (list, tuple)) or not windows:
        raise ValueError(
            f"sliding: window: got {windows!r}, valid is a whole number of at least 1, or a list "
            "with one for each K/V head"
        )
    return tuple(one if one is None else check_size("sliding", "window", one) for one in windows)
