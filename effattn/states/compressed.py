"""What attention with compressed memory remembers: the newest tokens as they came, the first ones,
and the means of groups of those between, of which the oldest are forgotten.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; N: places of means."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.states.full import ROLLBACK
from effattn.states.summaries import SummaryState


class CompressedState(SummaryState):
    """Tokens in order (`SummaryState`), all raw where the backend turns them when it reads them.

    sinks_k (B, Hkv, sinks, D), sinks_v: each row's first tokens. means_k (B, Hkv, N, D), means_v:
    the newest N groups of `group` tokens that have left a row's window, the newest last; places of
    groups that were not there hold nothing of meaning. N is `means`, and as many more as a crop of
    `ROLLBACK` tokens can bring back. `noted`: how many tokens there were when they were written."""

    evicts = True
    summary = ("sinks_k", "sinks_v", "means_k", "means_v")

    def __init__(self, window: int, sinks: int, group: int, means: int):
        self.sinks, self.group = sinks, group
        self.places = places_of(means, group)
        super().__init__(window)

    def _reset(self) -> None:
        super()._reset()
        self.noted = 0

    def begin(self) -> None:
        """Room for sinks and means, where there is none yet. After `append`."""
        if self.means_k is not None:
            return
        for name, x in (("k", self.k), ("v", self.v)):
            room = x.new_zeros(*x.shape[:2], self.sinks + self.places, x.shape[3])
            setattr(self, f"sinks_{name}", room[:, :, : self.sinks].clone())
            setattr(self, f"means_{name}", room[:, :, self.sinks :].clone())

    def before(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """The means as of the `past` tokens: later than that, after a crop, they lie further to the
        left. first (1 or B,): the number of each row's first token."""
        if self.noted == self.past:
            return self.means_k, self.means_v
        gone = (self.noted - first) // self.group - (self.past - first) // self.group
        at = torch.arange(self.places, device=first.device) - gone[:, None]
        at = at.clamp(min=0)
        return taken(self.means_k, at), taken(self.means_v, at)

    def finish(self, means_k: Tensor, means_v: Tensor, first: Tensor, padded: bool) -> None:
        """After a call: keeps the last of means (B, Hkv, N + new, D) that have left the window, and
        the first tokens; lets go of tokens that are older than the window. padded: whether rows may
        begin elsewhere than at the first token."""
        left = (self.total - first) // self.group - (self.past - first) // self.group
        at = torch.arange(self.places, device=first.device) + left[:, None]
        self.means_k, self.means_v = taken(means_k, at), taken(means_v, at)
        self.noted = self.total
        if padded or self.oldest < self.sinks:
            number = first[:, None] + torch.arange(self.sinks, device=first.device)
            there = (number >= self.oldest) & (number < self.total)
            at = (number - self.oldest).clamp(0, self.k.shape[2] - 1)
            there = there[:, None, :, None]
            self.sinks_k = torch.where(there, taken(self.k, at), self.sinks_k)
            self.sinks_v = torch.where(there, taken(self.v, at), self.sinks_v)
        self.let_go()


def places_of(means: int, group: int) -> int:
    """For how many means there is room, so that `means` are left after a crop."""
    return means + -(-ROLLBACK // group)


def taken(x: Tensor, at: Tensor) -> Tensor:
    """x (B, H, T, D) at places (1 or B, n) of each row -> (B, H, n, D)."""
    if at.shape[0] == 1:
        return x.index_select(2, at[0])
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
