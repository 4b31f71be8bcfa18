"""What is remembered of keys and values as latents: r numbers a token, of which both are made.

    state = LatentState(backend.new_state())
    y = backend(q, k, v, state=state, latent=Latent(c, maps))     # c: of the new tokens

The state behind `swap(heads="latent(...)")`. Which tokens are held, and where, is another state's
business, whose "keys" are the latents and whose values have no size: everything, or a ring.

B: rows; Hq, Hkv: query and key/value heads; T: new tokens; D, Dv: of a key, of a value; r: of a
latent."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels import flash, latent
from effattn.kernels.decode import MOST_QUERIES
from effattn.kernels.flash.pattern import Layout, Pattern, first_real
from effattn.kernels.flash.rules import Far
from effattn.kernels.latent.packed import PackedLatents, pack_rows
from effattn.states.base import State
from effattn.states.caches import LayerCache
from effattn.states.full import FullState


class LatentState(State):
    """Latents (B, 1, T, r) in `own`, a backend's own state. It attends by itself: keys are made of
    latents as they are read, values are not made at all while decoding.

    cache: how latents are packed, each token by itself, into rows of bytes; None: not at all. All
    queries see a token as it is packed, its own too, so that steps are prefill."""

    packed = True
    like: tuple[int, torch.dtype] | None = None  # of the latents that came last: r, and their dtype

    def __init__(self, own: FullState, cache: LayerCache | None = None):
        self.own, self.cache = own, cache

    @property
    def evicts(self) -> bool:
        """Whether tokens are forgotten."""
        return self.own.evicts

    def _seen(self) -> int:
        return self.own.seq_len

    def _bytes(self) -> int:
        return self.own.nbytes

    def fill(self, tokens: int, generator: torch.Generator) -> None:
        """Replaces what is held by so many random latents: what a step takes does not depend on
        their values."""
        like = self.own.k
        if like is None or self.like is None:
            raise ValueError("state: it holds nothing yet, valid is one that has seen a token")
        rank, dtype = self.like
        new = torch.randn(
            (like.shape[0], 1, tokens, rank), generator=generator, device=like.device, dtype=dtype
        )
        self.own.reset()
        self._take(new)

    def _take(self, c: Tensor, mask: Tensor | None = None) -> tuple[Tensor | PackedLatents, Layout]:
        """Appends latents (B, 1, T, r); returns all that is held, (B, T, r), and where it lies."""
        rank, dtype = self.like = c.shape[-1], c.dtype
        self.own.late = self.late  # so that it need not ask where padding ends
        if self.cache is None:
            held, _, layout = self.own.append(c, c[..., :0], mask)
            return held[:, 0], layout
        coding = self.cache.latent_coding(rank)
        rows = pack_rows(c, coding)
        held, _, layout = self.own.append(rows, rows[..., :0], mask)
        return PackedLatents(held[:, 0], rank, coding, dtype), layout

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        if padding_mask is None:
            return Layout(tail=self.own.seq_len)
        mask = padding_mask[:, self.own.seq_len :]
        return Layout(tail=self.own.seq_len, start=first_real(padding_mask), mask=mask)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if call.latent is None:
            raise ValueError(
                "latent: got None, valid with a latent state is that of the new tokens"
            )
        if not call.causal:
            raise Unsupported("latent: causal=False, valid is causal=True: it remembers the past")
        c, maps, past = call.latent.c, call.latent.maps, self.own.seq_len
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, c))
        if learning and self.cache is not None:
            raise Unsupported(
                f"cache: {self.cache.spec} has no gradients; valid are torch.no_grad(), or "
                "use_cache=False while training"
            )
        held, layout = self._take(c, call.padding_mask)
        few = "torch" if learning else impl  # of the kernels for few queries, torch has gradients
        common = dict(scale=call.scale, softcap=call.softcap, q_first=call.q_first)
        if layout.ring is not None or (q.shape[2] <= MOST_QUERIES and not learning):
            return latent.attention(
                q,
                held,
                maps,
                pattern,
                layout,
                turn=call.turn,
                bias=call.bias,
                impl=few,
                lse=lse,
                **common,
            )
        # Many queries read each key often: all that is held is expanded, for one call of one layer
        if past or self.cache is not None:
            c = held.unpacked() if isinstance(held, PackedLatents) else held
            k, v = maps.keys(c), maps.values(c)
        far = None
        if call.turn is not None:
            at = layout.key_positions(k.shape[2], k.device).clamp(min=0)
            if call.turn.window is not None:
                turned = call.turn.keys(k, at, far=True)
                far = Far(call.turn.q_far, turned, call.turn.window)
            k = call.turn.keys(k, at)
        return flash.attention(
            q,
            k,
            v,
            pattern,
            layout,
            causal=True,
            bias=call.bias,
            far=far,
            impl=impl,
            lse=lse,
            **common,
        )

    def _select(self, index: Tensor) -> None:
        self.own.select(index)

    def _repeat(self, n: int) -> None:
        self.own.repeat(n)

    def _check_crop(self, n: int) -> None:
        self.own.check_crop(n)

    def _crop(self, n: int) -> None:
        self.own.crop(n)

    def _reset(self) -> None:
        self.own.reset()
