"""Learning rates of shearing, by a model's width and by how many steps there are."""

from __future__ import annotations

PAPER_STEPS = 3_200  # of pruning, with learning rates of 1.0 for masks and multipliers
RAMP = 0.2  # share of the mask stage in which the target is ramped up: the paper's 640 steps


def default_lr(hidden: int) -> float:
    """Peak learning rate of the weights by width: the paper's 1e-4 at 4096, more for narrower
    models, up to 3e-4.

    Higher rates undo more of what a model has learned than a short stage brings back: the embedded
    model, cut by `structured` and trained on 100,000 tokens, gets better at 2e-4, not at 5e-4, and
    worse at 1e-3; the masks' stage does better at 3e-4 than at 1.5e-3."""
    return min(3e-4, 1e-4 * 4096 / hidden)


def recover_lr(hidden: int) -> float:
    """The same for learning a teacher's predictions, which are less noisy than the text, up to 8e-4
    (the embedded model, cut to half, 1.1 million tokens: perplexity 19.65 at 3e-4, 19.23 at
    8e-4)."""
    return min(8e-4, 1e-4 * 4096 / hidden)


def scratch_lr(hidden: int) -> float:
    """The same for a model with random weights, up to 2e-3."""
    return min(2e-3, 1e-4 * 4096 / hidden)


def default_mask_lrs(steps: int, ramp: float = RAMP) -> tuple[float, float, float]:
    """Learning rates of the log alphas, of the rows' levels and of the multipliers.

    The first and the last: the paper's 1.0 for its 3,200 steps, less for fewer, since few steps
    average little noise, and multipliers that grew as fast would ask for more than the target
    before the gates could follow. A level must get from 1 to about 0 while the target is ramped up,
    and behind it soon enough (found by simulation, 50 to 200 steps)."""
    share = min(1.0, steps / PAPER_STEPS)
    return share, min(0.2, 6 / max(1.0, ramp * steps)), share
