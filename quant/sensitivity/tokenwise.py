"""Quality with a cache that is really quantized: windows of text, decoded one token at a time, many
windows at once.

    found = tokenwise(parent, student, tokens, length=512)
    found["perplexity"], found["kl"], found["agreement"]

One pass over all tokens would attend over full-precision keys and quantize afterwards. Here every
token is a decoding step that reads the packed past, as in `generate()`; the text is given
(teacher-forced)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.encoding import begun
from effattn.evaluate.logits import positions_at_a_time
from effattn.evaluate.loss import Progress, check_stream, kl_chunked
from effattn.evaluate.streaming import cache_bytes
from effattn.hf.beginning import bos_of
from effattn.hf.cache import new_cache
from effattn.hf.placement import input_device


def windows(tokens: Tensor, length: int) -> Tensor:
    """tokens (N,) as whole windows (W, length + 1); each window's last token is the next one's
    first. Needs one.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(
            f"length: got {length}, the text has {len(tokens):,} tokens; valid is fewer than that"
        )
    return torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])


@torch.no_grad()
def tokenwise(
    parent,
    student,
    tokens: Tensor,
    length: int,
    *,
    batch: int = 16,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, float | int]:
    """Both models over tokens (N,) int64 in windows of `length`, `batch` of them side by side.

    The student takes one token a step through the cache that it makes itself. The parent, whose
    cache is exact, is given blocks. bos: whether BOS takes the place of each window's first token
    (None: as the parent's tokenizer does it). Returns, over all predicted tokens:

    - cross_entropy (nats), perplexity; parent_cross_entropy, parent_perplexity; and loss_error, the
      standard error of the mean difference of the two losses, which are paired token by token;
    - kl, the mean of KL(parent || student) in nats; agreement, the share of tokens where both find
      the same one most likely;
    - tokens; held_tokens and held_bytes, what the student's cache held at the end of a window, all
      rows of a batch."""
    check_stream(student, tokens, length, None)
    rows = windows(tokens, length)
    device, beginning = input_device(student), bos_of(parent, bos)
    vocabulary = student.get_input_embeddings().weight.shape[0]
    losses, differences, divergences, same = [], [], [], []
    held_tokens = held_bytes = done = 0
    training = [model for model in (parent, student) if model.training]
    for model in training:
        model.eval()
    try:
        for some in rows.split(batch):
            ids = some.to(device)
            given = begun(ids, beginning)
            theirs, ours = new_cache(parent), new_cache(student)
            # tokens whose logits of the parent wait for the student
            block = max(1, min(length, positions_at_a_time(vocabulary) // len(ids)))
            for start in range(0, length, block):
                stop = min(start + block, length)
                expected = parent(
                    input_ids=given[:, start:stop], past_key_values=theirs, use_cache=True
                ).logits
                steps = [
                    student(
                        input_ids=given[:, at : at + 1], past_key_values=ours, use_cache=True
                    ).logits
                    for at in range(start, stop)
                ]
                truth = ids[:, start + 1 : stop + 1].flatten()
                expected, got = expected.flatten(0, 1), torch.cat(steps, dim=1).flatten(0, 1)
                parent_loss, loss = _losses(expected, truth), _losses(got, truth)
                losses.append(loss)
                differences.append(loss - parent_loss)
                divergences.append(kl_chunked(expected, got).double().cpu())
                same.append((expected.argmax(-1) == got.argmax(-1)).double().cpu())
                done += len(truth)
                if progress:
                    progress(done, rows[:, 1:].numel())
            held_tokens, held_bytes = max(
                (held_tokens, held_bytes), (len(ids) * length, cache_bytes(ours))
            )
    finally:
        for model in training:
            model.train()
    loss, difference = torch.cat(losses), torch.cat(differences)
    mean, change = loss.mean().item(), difference.mean().item()
    return {
        "tokens": len(loss),
        "length": length,
        "cross_entropy": mean,
        "perplexity": _exp(mean),
        "parent_cross_entropy": mean - change,
        "parent_perplexity": _exp(mean - change),
        "loss_error": (difference.std() / len(loss) ** 0.5).item() if len(loss) > 1 else None,
        "kl": torch.cat(divergences).mean().item(),
        "agreement": torch.cat(same).mean().item(),
        "held_tokens": held_tokens,
        "held_bytes": held_bytes,
    }


def _losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, fp64 on the CPU."""
    return F.cross_entropy(logits.float(), truth, reduction="none").double().cpu()


def _exp(cross_entropy: float) -> float:
    """Perplexity, infinite where a float cannot hold it."""
    return math.inf if not cross_entropy < 700 else math.exp(cross_entropy)
