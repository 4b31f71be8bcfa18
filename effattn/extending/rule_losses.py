"""What one position rule reads: the same tokens in windows of every length, and repeated text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor, nn

from effattn.evaluate.curve import scores, token_scores
from effattn.evaluate.loss import Progress
from effattn.extending import texts
from effattn.extending.rules import Rule

CURVE = 8  # buckets of a loss curve in each trained length


def measured(
    rule: Rule,
    model: nn.Module,
    sequences: Tensor,
    lengths: Sequence[int],
    period: int,
    trained: int,
    progress: Progress | None = None,
) -> dict:
    """One rule's row: {"name", "axes", "kind", "logn", "seconds", "natural", "repeated", "curves"}.

    sequences: int64 (count, T + 1), T the longest of `lengths`, which ascend. natural: the same
    tokens in windows of every length. repeated: the first tokens of the repeated text (`texts`, by
    `period`) at every length, and under "copies" those behind the first copy. Each a dict of a
    length, cross_entropy (nats), perplexity and accuracy. curves: such dicts along a sequence,
    `CURVE` in each `trained` tokens."""
    again, longest, start = texts.repeated(sequences, period), lengths[-1], time.perf_counter()
    steps, done = len(lengths) + (len(lengths) if rule.varies else 1), 0

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal done
        found = token_scores(model, tokens, batch=max(1, longest // (tokens.shape[1] - 1)))
        done += 1
        if progress:
            progress(done, steps)
        return found

    natural, copies, curves = [], [], {}
    with rule.on(model):
        for length in lengths:
            nats, right = read(texts.windows(sequences, length))
            natural.append({"length": length, **scores(nats, right)})
        curves["natural"] = _curve(nats, right, trained)
        whole = read(again)
        curves["repeated"] = _curve(*whole, trained)
        for length in lengths:
            if rule.varies and length < longest:
                nats, right = read(again[:, : length + 1])
            else:  # what comes later changes nothing before
                nats, right = (one[:, :length] for one in whole)
            behind = scores(nats[:, period:], right[:, period:]) if length > period else None
            copies.append({"length": length, **scores(nats, right), "copies": behind})
    return {
        "name": rule.name,
        "axes": rule.axes,
        "kind": rule.kind,
        "logn": rule.logn,
        "seconds": time.perf_counter() - start,
        "natural": natural,
        "repeated": copies,
        "curves": curves,
    }


def _curve(nats: Tensor, right: Tensor, trained: int) -> list[dict]:
    """Rows of `by_position`, `CURVE` in each trained length."""
    size = max(1, trained // CURVE)
    return [
        {
            "first": at,
            "last": min(at + size, nats.shape[1]),
            **scores(nats[:, at : at + size], right[:, at : at + size]),
        }
        for at in range(0, nats.shape[1], size)
    ]
