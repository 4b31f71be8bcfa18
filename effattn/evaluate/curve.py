"""Perplexity by position: how well tokens are predicted the further a sequence goes.

    found = effattn.evaluate.by_position(model, sequences)      # int64 (n, T + 1)
    [(row["last"], row["perplexity"]) for row in found["rows"]]

n: sequences; T: predictions in each, of T + 1 tokens; V: the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.encoding import begun
from effattn.errors import Unsupported
from effattn.evaluate.logits import Scores
from effattn.evaluate.loss import Progress, perplexity_of
from effattn.hf import anatomy
from effattn.hf.beginning import bos_of
from effattn.hf.placement import input_device


@torch.no_grad()
def token_scores(
    model,
    sequences: Tensor,
    *,
    batch: int = 1,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """For every token but the first of each sequence: its cross-entropy in nats, float32 (n, T),
    and whether it was the most likely one, bool (n, T).

    sequences: int64 (n, T + 1), each read whole and without a cache, `batch` at a time. At
    most 256 MiB of logits exist at a time. bos: whether BOS takes the place of each one's first
    token (None: as the model's tokenizer does it). progress(sequences done, all of them). Raises
    ValueError for anything but such sequences."""
    _check(model, sequences)
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch: got {batch!r}, valid is a whole number of at least 1")
    training = model.training
    if not anatomy.of(model).causal:
        raise Unsupported(f"{type(model).__name__} predicts no next tokens: it is not causal")
    device, beginning = input_device(model), bos_of(model, bos)
    nats = torch.empty(len(sequences), sequences.shape[1] - 1)
    right = torch.empty(nats.shape, dtype=torch.bool)
    model.eval()
    try:
        for start in range(0, len(sequences), batch):
            ids = sequences[start : start + batch].to(device)
            found = Scores.of(model, begun(ids[:, :-1], beginning))
            truth = ids[:, 1:].flatten()
            rows = [one[start : start + batch].view(-1) for one in (nats, right)]
            for at in found.pieces():
                logits = found.logits(at)
                rows[0][at] = F.cross_entropy(logits, truth[at], reduction="none").cpu()
                rows[1][at] = (logits.argmax(-1) == truth[at]).cpu()
            if progress:
                progress(min(start + batch, len(sequences)), len(sequences))
    finally:
        model.train(training)
    return nats, right


def by_position(
    model,
    sequences: Tensor,
    edges: Sequence[int] | None = None,
    *,
    batch: int = 1,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """Cross-entropy, perplexity and next-token accuracy by how many tokens a prediction has behind
    it. Cross-entropies are in nats a token.

    sequences: int64 (n, T + 1), `batch` of them at a time. edges: where the stretches of positions
    begin and end, ascending from 0 to T; None: 0, 16, 32, ..., doubling. Returns {"sequences",
    "tokens" (T), "cross_entropy", "perplexity", "accuracy", "rows"}; a row is of the positions
    first to last - 1: {"first", "last", "cross_entropy", "perplexity", "accuracy"}. Position p
    predicts from p + 1 tokens. bos: as in `token_scores`. Raises ValueError for edges that are
    none."""
    _check(model, sequences)
    length = sequences.shape[1] - 1
    edges = doubling(length) if edges is None else [*edges]
    if (
        len(edges) < 2
        or edges[0] != 0
        or edges[-1] != length
        or any(b <= a for a, b in pairwise(edges))
    ):
        raise ValueError(f"edges: got {edges}, valid are ascending positions from 0 to {length}")
    nats, right = token_scores(model, sequences, batch=batch, bos=bos, progress=progress)
    rows = [
        {"first": a, "last": b, **scores(nats[:, a:b], right[:, a:b])} for a, b in pairwise(edges)
    ]
    return {"sequences": len(sequences), "tokens": length, **scores(nats, right), "rows": rows}


def scores(nats: Tensor, right: Tensor) -> dict[str, float]:
    """What a report says of some tokens: the mean cross-entropy, its exp, the share that was the
    most likely.
    """
    mean = nats.double().mean().item()
    return {
        "cross_entropy": mean,
        "perplexity": perplexity_of(mean),
        "accuracy": right.double().mean().item(),
    }


def doubling(length: int, first: int = 16) -> list[int]:
    """0, first, 2 first, 4 first, ... and `length`."""
    edges = [0]
    while first < length:
        edges.append(first)
        first *= 2
    return [*edges, length]


def _check(model, sequences: Tensor) -> None:
    if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64 or sequences.dim() != 2:
        got = (
            f"{sequences.dtype} {tuple(sequences.shape)}"
            if isinstance(sequences, Tensor)
            else type(sequences)
        )
        raise ValueError(f"sequences: got {got}, valid is an int64 tensor (n, T + 1)")
    if not len(sequences) or sequences.shape[1] < 2:
        raise ValueError(
            f"sequences: got {tuple(sequences.shape)}, valid is at least one of at least two tokens"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(sequences.min()) < 0 or int(sequences.max()) >= vocabulary:
        raise ValueError(
            f"sequences: ids run to {int(sequences.max())}, the model's are 0 to {vocabulary - 1}"
        )
