"""Cross-entropy, perplexity and KL of causal LMs over a long token stream, by a sliding context.

N: tokens of the stream; M: positions; V: the vocabulary. All losses are in nats a token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from effattn.encoding import begun
from effattn.errors import Unsupported
from effattn.evaluate.logits import Scores, positions_at_a_time
from effattn.hf.beginning import bos_of
from effattn.hf.families import ENCODERS
from effattn.hf.packing import steady
from effattn.hf.placement import input_device
from effattn.textdata import Streams

Progress = Callable[[int, int], None]


def check_stream(model, tokens: torch.Tensor, context: int, stride: int | None) -> int:
    """Validates what every evaluation takes; returns the stride. Raises ValueError, and Unsupported
    for models that do not predict next tokens."""
    _check_predicts(model)
    if (
        not isinstance(tokens, torch.Tensor)
        or tokens.dtype != torch.int64
        or tokens.dim() != 1
        or len(tokens) < 2
    ):
        got = (
            f"{tokens.dtype} {tuple(tokens.shape)}"
            if isinstance(tokens, torch.Tensor)
            else type(tokens).__name__
        )
        raise ValueError(
            f"tokens: got {got}, valid is an int64 tensor (N,) of at least 2 token ids"
        )
    if context < 1:
        raise ValueError(f"context: got {context}, valid is a positive number of tokens")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride: got {stride}, valid is 1 to context ({context})")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"tokens: ids run to {int(tokens.max())}, the model's vocabulary is 0 to "
            f"{vocabulary - 1}"
        )
    return stride


def _check_predicts(model) -> None:
    """Unsupported for encoders, which see what they are asked for, classifiers, and models without
    a head.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    encoder = getattr(config, "model_type", None) in ENCODERS and not getattr(
        config, "is_decoder", False
    )
    headless = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None
    if encoder or (headless and "LM" not in kind):
        raise Unsupported(f"model: got {kind}, valid is a causal LM: perplexity is of next tokens")


def _windows(
    n: int, context: int, stride: int, batch_tokens: int
) -> list[tuple[list[int], int, int]]:
    """Groups of windows as (starts, width, first position whose prediction counts). Positions 0 ..
    n - 2 each predict the next token and count exactly once; windows of one group have the same
    width."""
    # with overlap, a window's first predictions were made by the one before, with more context
    rows, done, start = [], 0, 0
    while done < n - 1:
        width = min(context, n - 1 - start)
        rows.append((start, width, done - start))
        done = start + width
        start += stride
    groups: list[tuple[list[int], int, int]] = []
    for start, width, first in rows:
        last = groups[-1] if groups else None
        if last and last[1:] == (width, first) and len(last[0]) * width < batch_tokens:
            last[0].append(start)
        else:
            groups.append(([start], width, first))
    return groups


@torch.no_grad()
def token_losses(
    model,
    tokens: torch.Tensor,
    context: int,
    stride: int | None = None,
    *,
    bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats of tokens[1:], each scored exactly once: float32 (N - 1,).

    tokens: int64 (N,). Windows of `context` input tokens start every `stride` (default: `context`,
    no overlap); a window scores only what no earlier one did, so with a smaller stride every
    prediction but the first window's sees at least `context - stride` tokens before it. bos:
    whether BOS takes the place of each window's first token (None: as the model's tokenizer does
    it, see `effattn.hf.beginning`). At most 256 MiB of logits exist at a time."""
    stride = check_stream(model, tokens, context, stride)
    beginning = bos_of(model, bos)
    if isinstance(model, torch.nn.Module):
        steady(model)
    device = input_device(model)
    losses = torch.empty(len(tokens) - 1)
    groups = _windows(len(tokens), context, stride, batch_tokens)
    for number, (starts, width, first) in enumerate(groups):
        ids = torch.stack([tokens[start : start + width + 1] for start in starts]).to(device)
        scores = Scores.of(model, begun(ids[:, :-1], beginning), slice(first, None))
        targets = ids[:, 1 + first :].flatten()
        found = torch.empty(len(targets))
        for at in scores.pieces():
            found[at] = F.cross_entropy(scores.logits(at), targets[at], reduction="none")
        for start, row in zip(starts, found.view(len(starts), -1), strict=True):
            losses[start + first : start + width] = row
        if progress:
            progress(number + 1, len(groups))
    return losses


def perplexity_of(cross_entropy: float) -> float:
    """exp of a mean cross-entropy in nats; infinite beyond what a float holds (reports: null), NaN
    of NaN.
    """
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def perplexity(
    model, tokens: torch.Tensor, context: int, stride: int | None = None, **kwargs
) -> float:
    """exp of the mean cross-entropy of tokens[1:], each predicted once (`token_losses`).

    model: a causal LM, which is run in eval mode. tokens: int64 (N,). context: tokens of a window.
    stride: from one window's start to the next (None: context, no overlap); smaller ones give each
    prediction more context, at more cost. bos: whether BOS takes the place of each window's first
    token, see `token_losses`. Infinite where it is beyond a float. ValueError for anything else,
    Unsupported for a model that does not predict next tokens."""
    training = model.training
    model.eval()
    try:
        return perplexity_of(
            token_losses(model, tokens, context, stride, **kwargs).double().mean().item()
        )
    finally:
        model.train(training)


def kl_chunked(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """KL(teacher || student) in nats at every position, (M,), from logits (M, V): fp32 copies of
    only `chunk` positions exist at a time (None: what fits into `effattn.evaluate.logits.BYTES`).
    """
    parts, chunk = [], chunk or positions_at_a_time(student_logits.shape[-1])
    # fp32: log-probabilities of a large vocabulary differ in digits that half precision has not
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    for t, s in zip(teacher_logits.split(chunk), student_logits.split(chunk), strict=True):
        t, s = t.to(dtype).log_softmax(-1), s.to(dtype).log_softmax(-1)
        parts.append(F.kl_div(s, t, log_target=True, reduction="none").sum(-1))
    return torch.cat(parts)


@torch.no_grad()
def compare(
    teacher,
    student,
    tokens: torch.Tensor,
    context: int,
    *,
    bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Both models over tokens (N,) in windows of `context`: the student's cross-entropy and
    perplexity, and the mean forward KL (nats a token) from the teacher, in one pass. bos: as in
    `token_losses`, by the teacher."""
    check_stream(student, tokens, context, None)
    beginning = bos_of(teacher, bos)
    device = input_device(student)
    loss = divergence = 0.0
    groups = _windows(len(tokens), context, context, batch_tokens)
    for number, (starts, width, _) in enumerate(groups):
        ids = torch.stack([tokens[start : start + width + 1] for start in starts]).to(device)
        given = begun(ids[:, :-1], beginning)
        ours, theirs = (Scores.of(model, given) for model in (student, teacher))
        targets = ids[:, 1:].flatten()
        for at in ours.pieces():
            logits = ours.logits(at)
            loss += F.cross_entropy(logits, targets[at], reduction="sum").item()
            divergence += kl_chunked(theirs.logits(at), logits).sum().item()
        if progress:
            progress(number + 1, len(groups))
    count = len(tokens) - 1
    return {
        "perplexity": perplexity_of(loss / count),
        "cross_entropy": loss / count,
        "kl": divergence / count,
    }


def measure_parent(parent, data: Streams, length: int, progress: Progress | None = None) -> dict:
    """The start of a report's "quality": what was measured on, and the parent there, before it is
    changed. length: tokens of a window."""
    losses = token_losses(parent, data.evaluation, length, progress=progress)
    loss = float(losses.double().mean())
    return {
        "tokens": len(data.evaluation),
        "context": length,
        "source": data.evaluation_source,
        "bos": bos_of(parent) is not None,
        "before": {"perplexity": perplexity_of(loss), "cross_entropy": loss},
        "uptrained": None,
    }
