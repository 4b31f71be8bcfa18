"""Dynamic batch loading: domains whose loss is further above its reference are read more often.

Algorithm 1 of Sheared LLaMA (arXiv:2310.06694), section 2.2, over any named streams of tokens.
Every window is a pure function of its number and of the weights' history, whatever process asks for
it, so that a killed run goes on exactly.

K: domains; U: updates of their weights; B: windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from effattn.encoding import begun
from effattn.errors import check_choice
from effattn.training.lending import TokenWindows

RULES = ("clamped", "signed", "fixed")
RATE = 1.0  # eta of the update
FLOOR = 1e-4  # c: the share of uniform weights mixed in
# steps whose windows are loaded before an update can reach them (accelerate fetches one batch
# early)
AHEAD = 1


def update(weights: Tensor, losses: Tensor, references: Tensor, rule: str = "clamped") -> Tensor:
    """Domain weights (K,), summing to 1, after an update: w exp(eta d) normalised, with a floor,
    for d = loss - reference in nats a token. "clamped": d is at least 0 (the paper); "signed": as
    it is (the released code); "fixed": no update."""
    check_choice("loading", rule, RULES)
    if rule == "fixed":
        return weights
    excess = losses - references
    excess = excess.clamp_min(0) if rule == "clamped" else excess
    # w exp(eta d), normalised; a domain whose weight came to 0 would never be read again, hence a
    # floor
    weights = torch.softmax(weights.log() + RATE * excess, -1)
    return (1 - FLOOR) * weights + FLOOR / len(weights)


class Domains:
    """Named token streams (int64, one-dimensional), the windows of each that are held out to
    measure losses on, and how often each domain is read at the start.

    streams: name -> tokens, or one tensor. length: tokens of a window. held_out: windows kept
    from the end of each stream. proportions: name -> share at the start; None: by length. bos:
    the token that takes the place of each window's first. end: the token that closes a document,
    so that those in a training window do not see each other (`TokenWindows`). Raises ValueError
    naming a domain that is too short, empty names, and proportions that do not fit."""

    def __init__(
        self,
        streams: Mapping[str, Tensor] | Tensor,
        length: int,
        *,
        held_out: int = 2,
        proportions: Mapping[str, float] | None = None,
        bos: int | None = None,
        end: int | None = None,
    ):
        streams = {"text": streams} if isinstance(streams, Tensor) else dict(streams)
        if not streams:
            raise ValueError(
                "data: got no domains, valid is a tensor of tokens or a dict of them by name"
            )
        if held_out < 1:
            raise ValueError(f"held_out: got {held_out}, valid is 1 window or more")
        for name, tokens in streams.items():
            if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
                got = (
                    f"{tokens.dtype} {tuple(tokens.shape)}"
                    if isinstance(tokens, Tensor)
                    else type(tokens).__name__
                )
                raise ValueError(
                    f"data: domain {name!r}: got {got}, valid is an int64 tensor (N,) of token ids"
                )
            least = (held_out + 2) * length
            if len(tokens) < least:
                raise ValueError(
                    f"data: domain {name!r} has {len(tokens):,} tokens; windows of {length} need "
                    f"at least {least:,} ({held_out} windows are held out): give it more text, or "
                    "shorter windows"
                )
        self.length, self.bos, self.end = length, bos, end
        self.train = {
            name: tokens[: len(tokens) - held_out * length] for name, tokens in streams.items()
        }
        self.held_out = {
            name: begun(tokens[-held_out * length :].view(held_out, length), bos)
            for name, tokens in streams.items()
        }
        if proportions is None:
            proportions = {name: len(tokens) for name, tokens in self.train.items()}
        if set(proportions) != set(streams) or min(proportions.values()) <= 0:
            raise ValueError(
                f"proportions: got {dict(proportions)}, valid is a positive share for each of "
                f"{', '.join(map(repr, streams))}"
            )
        shares = torch.tensor([float(proportions[name]) for name in streams], dtype=torch.float64)
        self.proportions = shares / shares.sum()

    @property
    def names(self) -> list[str]:
        """In order."""
        return list(self.train)

    @torch.no_grad()
    def losses(self, loss_of: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """The mean loss of each domain's held-out windows, (K,) fp64, by `loss_of` token ids (B,
        length).
        """
        found = [
            torch.stack([loss_of(window[None].to(device)).double() for window in windows]).mean()
            for windows in self.held_out.values()
        ]
        return torch.stack(found).cpu()


class LoadingWeights(nn.Module):
    """The history of the domain weights, as buffers, so that checkpoints have it: `history` (U + 1,
    K) fp64, row 0 the start's, and `done`, the number of updates so far of U = `updates`."""

    history: Tensor
    done: Tensor

    def __init__(self, start: Tensor, updates: int):
        super().__init__()
        self.register_buffer(
            "history", torch.cat([start[None], torch.zeros(updates, len(start))]).double()
        )
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    @property
    def now(self) -> Tensor:
        """(K,) fp64, on the CPU."""
        return self.history[int(self.done)].cpu()

    def add(self, weights: Tensor) -> None:
        """The weights (K,) after one more update."""
        self.done += 1
        self.history[int(self.done)] = weights.to(self.history)

    def at(self, number: int) -> Tensor:
        """The weights after `number` updates, (K,) on the CPU. RuntimeError before they exist."""
        if number > int(self.done):
            raise RuntimeError(
                f"the weights after update {number} were asked for, {int(self.done)} are done"
            )
        return self.history[number].cpu()


class DomainWindows(Dataset):
    """`steps` times `per_step` training windows, each from a domain drawn by the weights in force.

    Update u, made after step u · `every`, holds from step u · every + AHEAD on. Windows of one
    domain come in the order of its own `TokenWindows`, so that all of it is seen once before any of
    it is seen twice."""

    def __init__(
        self,
        domains: Domains,
        weights: LoadingWeights,
        steps: int,
        per_step: int,
        every: int,
        seed: int = 0,
    ):
        self.count = steps * per_step
        self.weights, self.per_step, self.every, self.seed = weights, per_step, every, seed
        self.streams = [
            TokenWindows(tokens, domains.length, self.count, seed + index, domains.bos, domains.end)
            for index, tokens in enumerate(domains.train.values())
        ]
        self._segment = -1
        # windows of each domain before the segment
        self._before = torch.zeros(len(self.streams), dtype=torch.int64)
        self._drawn = torch.empty(0, dtype=torch.int64)  # the segment's domains

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # A segment is the steps between two updates, drawn by the weights in force. Segments are
        # made in order, since each has to know how many windows of a domain came before it; an
        # earlier one is asked for only when a run begins again.
        segment = max(0, index // self.per_step - AHEAD) // self.every
        if segment < self._segment:
            self._segment, self._before, self._drawn = (
                -1,
                torch.zeros_like(self._before),
                self._drawn[:0],
            )
        while self._segment < segment:
            self._next_segment()
        place = index - self._start(segment)
        domain = int(self._drawn[place])
        earlier = int(self._before[domain] + (self._drawn[:place] == domain).sum())
        return self.streams[domain][earlier]

    def _start(self, segment: int) -> int:
        return self.per_step * (segment * self.every + AHEAD) if segment else 0

    def _next_segment(self) -> None:
        edges = self.weights.at(self._segment + 1).cumsum(-1)
        self._before = self._before + torch.bincount(self._drawn, minlength=len(self.streams))
        self._segment += 1
        size = self._start(self._segment + 1) - self._start(self._segment)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._segment)
        # the inverse of the distribution function at uniform numbers; rounding may end past the
        # last
        drawn = torch.searchsorted(
            edges, torch.rand(size, generator=generator, dtype=torch.float64) * edges[-1]
        )
        self._drawn = drawn.clamp_max(len(self.streams) - 1)
