"""What a method that sums over its keys remembers: the sums, and the newest tokens as they came.

    state = attn.new_state()
    y = attn(q, k, v, state=state)        # k, v: the new tokens

Its size does not depend on the sequence's length. A sum cannot take a token back, so the newest
ones stay outside of it, at least `ROLLBACK` and less than twice as many.

B: rows; Hkv: key/value heads; T: new tokens; R: tokens that are not in the sums; D, Dv: of a key,
of a value; F: features of a key."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, first_real
from effattn.kernels.linear import Memory
from effattn.states.base import State
from effattn.states.full import ROLLBACK
from effattn.states.sizes import check_fits


def folded(tokens: int) -> int:
    """How many of `tokens` tokens are in the sums: all but 16 to 31, so that one step in 16 moves
    some.
    """
    return max(0, tokens // ROLLBACK - 1) * ROLLBACK


class RecurrentState(State):
    """Sums (a `kernels.linear.Memory`) over the first `base` tokens, and k (B, Hkv, R, D), v (B,
    Hkv, R, Dv) of the others, in the inputs' dtype.

    sums (B, Hkv, F, Dv) of features times values, norms (B, Hkv, F) of features, top (B, Hkv): what
    the features were scaled by, for those that grow exponentially; all in fp32 or better.

    The backend that attends calls `fold` with the new sums. `draw`: the random features that the
    sums were made with; sums of two draws cannot be added."""

    def __init__(self):
        self.reset()

    def _reset(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.sums: Tensor | None = None
        self.norms: Tensor | None = None
        self.top: Tensor | None = None
        self.base = 0
        self.draw: int | None = None

    def _seen(self) -> int:
        return self.base + (0 if self.k is None else self.k.shape[2])

    @property
    def memory(self) -> Memory | None:
        """The sums over the first `base` tokens; None while there are none."""
        return None if self.sums is None else Memory(self.sums, self.norms, self.top)

    @property
    def due(self) -> int:
        """How many of the tokens in k and v belong into the sums by now."""
        return max(0, folded(self._seen()) - self.base)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Returns the tokens that are not in the sums, the new ones last."""
        if self.k is None:
            self.k, self.v = k, v
        else:
            check_fits(self.k, self.v, k, v)
            self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        if padding_mask is None:
            return self.k, self.v, Layout(tail=self.base)
        start, mask = first_real(padding_mask), padding_mask[:, self.base :]
        return self.k, self.v, Layout(tail=self.base, start=start, mask=mask)

    def fold(self, tokens: int, memory: Memory) -> None:
        """`memory` are the sums that also hold the first `tokens` of k and v, which go."""
        self.k, self.v = self.k[:, :, tokens:].contiguous(), self.v[:, :, tokens:].contiguous()
        self.sums, self.norms, self.top = memory
        self.base += tokens

    def _select(self, index: Tensor) -> None:
        for name, x in self._tensors().items():
            setattr(self, name, x.index_select(0, index))

    def _repeat(self, n: int) -> None:
        for name, x in self._tensors().items():
            setattr(self, name, x.repeat_interleave(n, dim=0))

    def _check_crop(self, n: int) -> None:
        if n < self.base:
            raise ValueError(
                f"crop: got {n}, but the first {self.base} tokens are in the sums, which cannot "
                f"take them back; valid are 0 and {self.base} to {self.seq_len}"
            )

    def _crop(self, n: int) -> None:
        self.k, self.v = (x[:, :, : n - self.base].contiguous() for x in (self.k, self.v))

    def _tensors(self) -> dict[str, Tensor]:
        """Those of the tokens, by name."""
        names = ("k", "v", "sums", "norms", "top")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
