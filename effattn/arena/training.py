"""A row of the arena: an encoder with one pattern, trained on one task, and what that took.

    row = train(TASKS["listops"], "performer(features=64)", Budget(steps=500), progress)

Time is that of the processor, not the clock's, so that others on the machine do not count. With
`pretraining` the encoder first learns to restore masked tokens of the training inputs, no others:
"Never train from scratch" (arXiv:2310.02980) says that this closes most of the gap between
methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from effattn.arena.encoder import Encoder
from effattn.arena.tasks import Examples, Task
from effattn.evaluate.loss import Progress
from effattn.profiling.memory import PeakMemory

MASKED = 0.3  # share of tokens that pretraining hides
WARMUP = 0.1  # share of the steps
HELD_OUT = 1 << 20  # added to the seed
CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class Budget:
    """What every row has alike. examples: to train on, drawn once; tested: others. batch: sequences
    a step; lr: the peak learning rate."""

    length: int = 256
    width: int = 64
    layers: int = 2
    heads: int = 4
    examples: int = 4000
    tested: int = 1000
    steps: int = 1000
    pretraining: int = 0  # steps before
    batch: int = 32
    lr: float = 1e-3
    seed: int = 0


def train(task: Task, pattern: str, budget: Budget, progress: Progress) -> dict[str, object]:
    """{"accuracy", "error" (its standard error), "loss" (the last tenth's mean, nats), "majority"
    (of one who always says the most frequent class), "parameters", "seconds" (of the processor,
    training), "ms" (a step's), "peak_bytes" (of a step), "tokens" (of an input)}."""
    torch.manual_seed(budget.seed)
    known = task.make(budget.examples, budget.length, budget.seed)
    tested = task.make(budget.tested, budget.length, budget.seed + HELD_OUT)
    sizes = {"width": budget.width, "layers": budget.layers, "heads": budget.heads}
    encoder = Encoder(task, pattern, length=known.tokens.shape[1], **sizes)
    encoder(known.tokens[: budget.batch], known.real[: budget.batch])  # shapes that it waits for

    done, total = 0, budget.pretraining + budget.steps

    def told(step: int) -> None:
        progress(done + step, total)

    began = time.process_time()
    if budget.pretraining:
        _fit(encoder, _restoring, known, budget, budget.pretraining, told)
        done = budget.pretraining
    losses = _fit(encoder, _classifying, known, budget, budget.steps, told)
    seconds = time.process_time() - began
    right = _right(encoder, tested, budget.batch)
    accuracy, count = right.double().mean().item(), len(right)
    return {
        "accuracy": accuracy,
        "error": (accuracy * (1 - accuracy) / count) ** 0.5,
        "loss": sum(losses[-(len(losses) // 10 or 1) :]) / (len(losses) // 10 or 1),
        "majority": tested.labels.bincount().max().item() / count,
        "parameters": sum(one.numel() for one in encoder.parameters()),
        "seconds": seconds,
        "ms": 1e3 * seconds / total,
        "peak_bytes": _peak(encoder, known, budget),
        "tokens": known.tokens.shape[1],
    }


Loss = Callable[[Encoder, Tensor, Tensor, Tensor, torch.Generator], Tensor]


def _classifying(encoder, tokens, real, labels, chance) -> Tensor:
    return cross_entropy(encoder(tokens, real), labels)


def _restoring(encoder, tokens, real, labels, chance) -> Tensor:
    hidden = real & (torch.rand(tokens.shape, generator=chance) < MASKED)
    hidden[:, 0] |= ~hidden.any(1)  # a loss of nothing has no mean
    guessed = encoder.restored(tokens.masked_fill(hidden, encoder.mask), real)
    return cross_entropy(guessed[hidden], tokens[hidden])


def _fit(
    encoder: Encoder,
    loss: Loss,
    known: Examples,
    budget: Budget,
    steps: int,
    told: Callable[[int], None],
) -> list[float]:
    """The losses of so many steps of AdamW, with a warm-up and a cosine's half. FloatingPointError
    for one that is no number."""
    chance = torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=budget.lr, weight_decay=0.01)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
        ],
        [warm],
    )
    losses = []
    encoder.train()
    for step in range(steps):
        rows = torch.randint(len(known.labels), (budget.batch,), generator=chance)
        found = loss(encoder, known.tokens[rows], known.real[rows], known.labels[rows], chance)
        if not torch.isfinite(found):
            raise FloatingPointError(f"loss: got {found.item()} at step {step + 1}")
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(found.item())
        told(step + 1)
    return losses


@torch.no_grad()
def _right(encoder: Encoder, tested: Examples, batch: int) -> Tensor:
    """(N,) bool: which of the examples get their label."""
    encoder.eval()
    pieces = zip(tested.tokens.split(batch), tested.real.split(batch), strict=True)
    guessed = torch.cat([encoder(tokens, real).argmax(-1) for tokens, real in pieces])
    return guessed == tested.labels


def _peak(encoder: Encoder, known: Examples, budget: Budget) -> int | None:
    """Bytes that one step holds at once over the weights, forward and backward."""
    encoder.train()
    encoder.zero_grad()
    rows = slice(0, budget.batch)
    tokens, real, labels = known.tokens[rows], known.real[rows], known.labels[rows]
    with PeakMemory("cpu") as peak:
        cross_entropy(encoder(tokens, real), labels).backward()
    return peak.bytes
