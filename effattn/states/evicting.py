"""A cache of which each key/value head keeps tokens of its own: the state behind
`cache="evict(policy='snapkv', keep=0.5)"`.

    state = EvictingState(Rule(policy=parse("norm"), keep=256))
    y = attn(q, k, v, state=state)                       # attn: dense

A prompt sees all of itself; after it, tokens go. What stays of the older ones lies packed by head
(`effattn.kernels.ragged`), in exactly its bytes; the newest are all there, in order. Keys are
rotated, so that a token keeps its position. Rows share what was kept (beams, `repeat`) until tokens
go again.

B: rows; Hq, H: query and key/value heads; T: new tokens; D, Dv: of a key, of a value; M: tokens
that are held, the older ones in as many places as the head has that keeps the most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels import decode, flash, ragged
from effattn.kernels.decode import MOST_QUERIES
from effattn.kernels.flash.pattern import Layout, Pattern, first_real
from effattn.kernels.latent.packed import width
from effattn.kernels.merge import in_order, merge
from effattn.kernels.pack import Coding
from effattn.kernels.ragged import Ragged
from effattn.states.base import State
from effattn.states.full import FullState
from effattn.states.policies import Policy, Seen, Turns

FEW = 16  # tokens that the memory of the newest has room for


@dataclass(frozen=True)
class Rule:
    """Who goes when. keep: tokens of each head, or a share of those that came. sinks, recent: so
    many first and newest tokens stay. every: tokens go again once so many have come; None: after
    prompts and chunks only. adaptive: heads of a row share one total, of which each has the share
    `floor` of its own for sure (AdaKV, arXiv:2407.11550). codings: of older keys and values."""

    policy: Policy
    keep: int | float
    sinks: int = 4
    recent: int = 64
    every: int | None = 256
    adaptive: bool = False
    floor: float = 0.2
    codings: tuple[Coding | None, Coding | None] = (None, None)

    @property
    def packs(self) -> bool:
        """Whether older tokens are packed."""
        return self.codings != (None, None)

    def budget(self, tokens: Tensor) -> Tensor:
        """Of rows with so many tokens (B,), how many each head keeps; with `adaptive`, on
        average."""
        if type(self.keep) is int:
            most = torch.full_like(tokens, self.keep)
        else:
            most = (tokens.double() * self.keep).long()
        return torch.minimum(tokens, most.clamp(min=self.sinks + self.recent))


class Newest(FullState):
    """The newest tokens, with little room for more."""

    room = FEW


class EvictingState(State):
    """`kept`, what older tokens left, None while nothing has gone; `newest`, the others; `queries`
    (B, Hq, n, D), the newest, where the policy will ask for them. `since`: tokens that came since
    tokens went. rope: how queries and keys are turned, as the policy asks. context: told before a
    call by a live model."""

    packed = True

    def __init__(self, rule: Rule, rope: Callable[[], Turns] | None = None):
        self.rule, self.rope = rule, rope
        self.newest = Newest()
        self._reset()

    def _reset(self) -> None:
        self.newest._reset()
        self.kept: Ragged | None = None
        self.queries: Tensor | None = None
        self.total = self.since = 0
        self.context: Any = None

    def _seen(self) -> int:
        return self.total

    def tensors(self) -> Iterator[Tensor]:
        yield from self.newest.tensors()
        yield from () if self.kept is None else self.kept.tensors()
        yield from () if self.queries is None else (self.queries,)

    def _bytes(self) -> int:
        own = self.newest._bytes() + (0 if self.queries is None else self.queries.nbytes)
        return own + (0 if self.kept is None else self.kept.nbytes)

    def predicted_bytes(
        self,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        value_dim: int | None = None,
    ) -> int:
        """After a prompt of so many tokens."""
        dims = head_dim, head_dim if value_dim is None else value_dim
        rule, heads = self.rule, batch * kv_heads
        held = int(rule.budget(torch.tensor([tokens])))
        newest = min(rule.recent, tokens)
        left = held < tokens or (rule.packs and newest < tokens)
        if tokens <= MOST_QUERIES or not left:
            return heads * tokens * sum(dims) * itemsize
        stored = sum(
            dim * itemsize if coding is None else width(coding, dim)
            for dim, coding in zip(dims, rule.codings, strict=True)
        )
        tables = 8 * (heads + 1 + batch)
        return heads * (newest * sum(dims) * itemsize + (held - newest) * stored) + tables

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Tokens without their queries: all of them stay, until the next call that lets some go."""
        layout = self.layout(padding_mask)
        self.newest.append(k, v)
        self.total += k.shape[2]
        self.since += k.shape[2]
        return k, v, layout

    # Reading
    # ---------------------------------------------------------------------------------------------

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        if padding_mask is None:
            return Layout(tail=self.total)
        mask = padding_mask[:, self.total :]
        return Layout(tail=self.total, start=first_real(padding_mask), mask=mask)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `State.attend`. Tokens that may be taken back come by themselves, after the others
        have gone. Unsupported for calls that are not causal, position rules that turn keys as they
        are read, and gradients."""
        self._refuse(q, k, v, call)
        tokens = q.shape[2]
        # what is replaced, not written to, so that keeping it undoes everything
        before = {name: getattr(self, name) for name in ("kept", "queries", "total", "since")}
        held = (self.newest.k, self.newest.v)
        cut = tokens - min(self.candidates, tokens - 1)
        try:
            parts = [self._piece(q, k, v, 0, cut, call, impl, lse)]
            if cut < tokens:
                parts.append(self._piece(q, k, v, cut, tokens, call, impl, lse))
        except BaseException:
            vars(self).update(before)
            self.newest.k, self.newest.v = held
            self.newest.rooms = None
            raise
        finally:
            self.candidates, self.context = 0, None
        out, sums = in_order(parts)
        return (out, sums) if lse else out

    def _refuse(self, q: Tensor, k: Tensor, v: Tensor, call) -> None:
        valid = "valid are full and packed caches"
        if not call.causal:
            raise Unsupported("cache: evict with causal=False, valid is causal=True")
        if call.turn is not None or call.far is not None or call.bias is not None:
            raise Unsupported(
                "cache: evict holds keys as they were rotated, and a position rule reads them "
                f"otherwise, or by their distance; {valid}, or a rule that turns by fixed angles"
            )
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q: got {q.shape[2]} tokens, valid are the {k.shape[2]} new ones")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise Unsupported(
                "cache: evict has no gradients; valid are torch.no_grad(), or use_cache=False "
                "while training"
            )

    def _piece(
        self, q: Tensor, k: Tensor, v: Tensor, low: int, high: int, call, impl: str, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens [low, high), which are held afterwards; then others go."""
        q, k, v = (x[:, :, low:high] for x in (q, k, v))
        self.newest.learning = False
        k, v, _ = self.newest.append(k, v)
        self.total += high - low
        mask = call.padding_mask
        mask = None if mask is None else mask[:, self.total - k.shape[2] : self.total]
        layout = Layout(tail=self.total - k.shape[2], start=call.layout.start, mask=mask)
        few, both = high - low <= MOST_QUERIES, self.kept is not None
        common = dict(scale=call.scale, softcap=call.softcap, impl=impl)
        run = decode.attention if few else flash.attention
        found = run(q, k, v, Pattern(), layout, causal=True, lse=lse or both, **common)
        if self.kept is not None:
            found = merge([found, ragged.attention(q, self.kept, **common)])
        self._note(q)
        self.since += high - low
        rule = self.rule
        if not few or (rule.every is not None and self.since >= rule.every):
            self._evict(q if not few else self.queries, mask, call)
        return found if isinstance(found, tuple) else (found, None)

    def _note(self, q: Tensor) -> None:
        """Holds those of the new queries that the policy will ask for when tokens go."""
        rule, new = self.rule, q.shape[2]
        if rule.every is None or not rule.policy.queries:
            return
        first = max(0, rule.every - rule.policy.queries - self.since)  # of the new ones
        if new > MOST_QUERIES or first >= new:
            return
        q = q[:, :, first:]
        self.queries = q.clone() if self.queries is None else torch.cat([self.queries, q], dim=2)

    # Forgetting
    # ---------------------------------------------------------------------------------------------

    def _evict(self, q: Tensor | None, mask: Tensor | None, call) -> None:
        """Lets go of all but what the rule keeps. q: the newest queries; mask (B, t): which of the
        newest tokens are real."""
        rule, (k, v) = self.rule, (self.newest.k, self.newest.v)
        batch, heads, tokens, _ = k.shape
        self.queries, self.since = None, 0
        real = torch.ones(batch, tokens, dtype=torch.bool, device=k.device)
        real = (real if mask is None else mask)[:, None].expand(-1, heads, -1)
        came = torch.full((batch,), self.total, device=k.device)
        if call.layout.start is not None:
            came = came - call.layout.start
        budget = rule.budget(came)
        older, stored = real, None
        if self.kept is not None:
            stored = self.kept.padded()
            older = torch.cat([stored[2], real], dim=2)
        newest = min(max(rule.recent, self.candidates), tokens)
        old = tokens - newest
        fits = bool((older.sum(dim=(1, 2)) <= budget * heads).all())
        # what is older is packed even where all may stay: rows would depend on their neighbours
        if fits and not (rule.packs and old):
            return
        if fits:
            stays = older[..., : older.shape[2] - newest]
        else:
            scores = self._scores(q, k, v, older, stored, call)
            stays = chosen(rule, scores, older, budget, newest)
        given = [
            ragged.encode(x[:, :, :old], coding)
            for x, coding in zip((k, v), rule.codings, strict=True)
        ]
        if stored is not None:
            given = [torch.cat(pair, dim=2) for pair in zip(stored, given)]  # noqa: B905
        dims = k.shape[3], v.shape[3]
        self.kept = Ragged.of_mask(*given, stays, dims, k.dtype, rule.codings)
        self.newest.k, self.newest.v = (x[:, :, old:].clone() for x in (k, v))
        self.newest.rooms = None

    def _scores(self, q: Tensor | None, k: Tensor, v: Tensor, real: Tensor, stored, call) -> Tensor:
        """(B, H, M): what the policy thinks of the tokens that are held: `stored`, what
        `Ragged.padded` gives of the older ones, and k and v, the newest."""
        keys, values = k, v
        if stored is not None:
            numbers = self.kept.unpacked().padded() if self.kept.packed else stored
            keys, values = (torch.cat([a, b], dim=2) for a, b in zip(numbers, (k, v)))  # noqa: B905
        q = k[:, :, :0] if q is None else q
        rope = None if self.rope is None else self.rope()
        return self.rule.policy.score(
            Seen(q, keys, values, real, call.scale, rope, self.context),
        )

    # Changing what is held
    # ---------------------------------------------------------------------------------------------

    def _select(self, index: Tensor) -> None:
        if self.newest.k is None:
            return
        index = index.to(self.newest.k.device)
        self.newest._select(index)
        self.kept = None if self.kept is None else self.kept.select(index)
        self.queries = None if self.queries is None else self.queries.index_select(0, index)

    def _repeat(self, n: int) -> None:
        self.newest._repeat(n)
        self.kept = None if self.kept is None else self.kept.repeat(n)
        if self.queries is not None:
            self.queries = self.queries.repeat_interleave(n, dim=0)

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        self.newest._change(how)
        self.kept = None if self.kept is None else self.kept.map(how)
        self.queries = None if self.queries is None else how(self.queries)

    def _check_crop(self, n: int) -> None:
        least = self.total - self.newest._seen()
        if self.kept is not None and n < max(least, 1):
            raise ValueError(
                f"crop: got {n}, but heads have let go of tokens before number {least}; valid are "
                f"0 and {max(least, 1)} to {self.total}"
            )

    def _crop(self, n: int) -> None:
        gone = self.total - n
        self.newest._crop(self.newest._seen() - gone)
        if self.queries is not None:
            left = self.queries.shape[2] - gone
            self.queries = self.queries[:, :, :left].clone() if left > 0 else None
        self.total, self.since = n, max(0, self.since - gone)


def chosen(rule: Rule, scores: Tensor, real: Tensor, budget: Tensor, newest: int) -> Tensor:
    """(B, H, M - newest) bool: which of the older tokens stay. scores, real (B, H, M); budget (B,):
    of each head, the `newest` among them; sinks are the first real tokens that a head has."""
    heads, old = scores.shape[1], scores.shape[2] - newest
    left = (budget - real[:, 0, old:].sum(dim=1)).clamp(min=0)  # of each head
    real, scores = real[..., :old], scores[..., :old].float()
    sink = real & (real.cumsum(dim=2) <= rule.sinks)
    scores = scores.masked_fill(sink, torch.inf).masked_fill(~real, -torch.inf)
    if not rule.adaptive:
        return real & (_rank(scores) < left[:, None, None])
    # what each head has for sure is above all that they compete for
    sure = (left.double() * rule.floor).long()
    scores = scores.masked_fill(real & (_rank(scores) < sure[:, None, None]), torch.inf)
    flat = _rank(scores.flatten(1)).view(scores.shape)
    return real & (flat < left[:, None, None] * heads)


def _rank(scores: Tensor) -> Tensor:
    """The place of each number among those of the last dimension, the highest first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter_(-1, order, place)
