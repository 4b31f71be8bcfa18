"""States of methods that sum up the past: the newest tokens as they came, and a summary of the
older ones.

`append` gives out everything held with the new tokens; the backend's `attend`, which gets the state
too (`Call.state`), brings the summary up to date and lets go of the oldest tokens.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: slots, the summaries
of finished blocks; C: codes of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, first_real
from effattn.states.full import ROLLBACK, FullState
from effattn.states.sizes import check_fits


class SummaryState(FullState):
    """Keys and values of the newest `keep` + `ROLLBACK` tokens, in order, and the tensors named in
    `summary`, whose first size is the batch. The tokens at numbers `oldest` to `total` - 1 are
    held; `past` tokens had come before the present call."""

    read_by_method = True
    summary: tuple[str, ...] = ()

    def __init__(self, keep: int):
        self.keep = keep
        self.reset()

    def _reset(self) -> None:
        self.k = self.v = None
        self.total = self.oldest = self.past = 0
        for name in self.summary:
            setattr(self, name, None)

    def _seen(self) -> int:
        return self.total

    @property
    def _tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("k", "v", *self.summary)}
        return {name: x for name, x in found.items() if x is not None}

    def _bytes(self) -> int:
        return sum(x.nbytes for x in self._tensors.values())

    def held(self, tokens: int) -> int:
        """How many tokens are held as they came once `tokens` have come at once."""
        return min(tokens, self.keep + ROLLBACK)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        self.past = self.total
        if self.k is not None:
            check_fits(self.k, self.v, k, v)
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        self.total = self.oldest + k.shape[2]
        start, mask = None, None
        if padding_mask is not None:
            start, mask = first_real(padding_mask), padding_mask[:, self.oldest :]
        return k, v, Layout(tail=self.oldest, start=start, mask=mask)

    def let_go(self) -> None:
        """Forgets the tokens beyond keep + ROLLBACK, which the summary has by now."""
        extra = self.total - self.oldest - self.held(self.total)
        if extra > 0:
            self.k, self.v = self.k[:, :, extra:].contiguous(), self.v[:, :, extra:].contiguous()
            self.oldest += extra

    def _select(self, index: Tensor) -> None:
        for name, x in self._tensors.items():
            setattr(self, name, x.index_select(0, index))

    def _repeat(self, n: int) -> None:
        for name, x in self._tensors.items():
            setattr(self, name, x.repeat_interleave(n, dim=0))

    def _check_crop(self, n: int) -> None:
        # A summary cannot give a token back; of those that are held, the last `keep` before the
        # next token have to be there as they came.
        least = self.oldest + self.keep if self.oldest else 0
        if n < least:
            raise ValueError(
                f"crop: got {n}, but tokens needed then were summed up; valid are 0 and {least} "
                f"to {self.total}"
            )

    def _crop(self, n: int) -> None:
        self.k, self.v = (x[:, :, : n - self.oldest].contiguous() for x in (self.k, self.v))
        self.total = n


class SlotState(SummaryState):
    """`slots_k` (B, Hkv, S, D) and `slots_v` (B, Hkv, S, Dv): what finished blocks of `block`
    tokens were projected to, in the keys' dtype. Blocks count from each row's first real token;
    slots of blocks that a row has not finished hold nothing of meaning."""

    summary = ("slots_k", "slots_v")

    def __init__(self, block: int):
        super().__init__(block)


class CodeState(SummaryState):
    """`counts` (B, Hkv, C) int32 and `sums` (B, Hkv, C, Dv) float32 or better: of the tokens that
    were let go, how many have each code, and the sum of their values."""

    summary = ("counts", "sums")

    def __init__(self):
        super().__init__(0)
