"""Per-token cross-entropy of a causal LM over a long stream, by a sliding context."""

from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.no_grad()
def token_losses(
    model, tokens: torch.Tensor, context: int, stride: int | None = None, batch_tokens: int = 4096
) -> torch.Tensor:
    """Cross-entropy in nats of tokens[1:], float32 (N - 1,), each scored exactly once.

    tokens: int64 (N,). Windows of `context` tokens start every `stride` (default: `context`); a window scores
    the tokens that no earlier one did, so with a smaller stride every token has at least
    `context - stride` tokens before it. Logits are taken a window at a time, never for the whole stream.
    """
    stride = stride or context
    n = len(tokens)
    device = model.get_input_embeddings().weight.device
    losses = torch.empty(n - 1)
    starts = list(range(0, max(1, n - context + stride), stride)) if n > context else [0]
    done = 1  # tokens[:done] have been scored (the first one never is)
    groups: dict[int, list[tuple[int, int]]] = {}
    for start in starts:
        end = min(start + context, n)
        if end <= done:
            continue
        groups.setdefault(end - start, []).append((start, done))
        done = end
    for width, windows in groups.items():
        size = max(1, batch_tokens // width)
        for i in range(0, len(windows), size):
            part = windows[i : i + size]
            ids = torch.stack([tokens[start : start + width] for start, _ in part]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, (start, first) in enumerate(part):
                keep = slice(first - start - 1, width - 1)
                loss = F.cross_entropy(logits[row, keep].float(), ids[row, 1:][keep], reduction="none")
                losses[first - 1 : start + width - 1] = loss.cpu()
    return losses
