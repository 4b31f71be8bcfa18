"""What pruning is calibrated on: tokens cut into windows."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.calibration.layerwise import windows
from effattn.hf.families import trained_length

LENGTH = 2048  # tokens of a window, where the model was trained for as many
BATCH_TOKENS = 2048  # tokens of a batch of windows


def check_tokens(tokens: Tensor, vocabulary: int, length: int) -> None:
    """ValueError unless tokens are int64 (N,), in the vocabulary, and make at least one window."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
        got = (
            f"{tokens.dtype} {tuple(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"tokens: got {got}, valid is an int64 tensor (N,) of token ids")
    if len(tokens) < length:
        raise ValueError(
            f"tokens: got {len(tokens):,}, less than a window of {length:,}; give more text, or a "
            "smaller length"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"tokens: ids run from {low} to {high}, the model's vocabulary is 0 to {vocabulary - 1}"
        )


def window_length(config, length: int | None) -> int:
    """`length`, or as many tokens as the model was trained for, up to `LENGTH`. ValueError for less
    than 8.
    """
    if length is None:
        return min(LENGTH, trained_length(config) or LENGTH)
    if length < 8:
        raise ValueError(f"length: got {length}, valid is 8 tokens or more")
    return length


def batches_of(
    tokens: Tensor, length: int, bos: int | None = None, most: int | None = None
) -> list[Tensor]:
    """Windows of `length` tokens, a few at a time: (batch, length) each. bos: the token that takes
    the place of each one's first. most: tokens of a batch, where a window has no more; by default
    `BATCH_TOKENS`."""
    most = BATCH_TOKENS if most is None else most
    return windows(tokens, length, max(1, most // length), bos)
