"""Whether calibration tokens can serve: what they are, how many there are, whose vocabulary."""

from __future__ import annotations

import torch

from effattn.hf import anatomy as hf

TOKENS_PER_DIMENSION = 10  # with fewer, moments are of the sample rather than of the text


def tokens_needed(parts: hf.Anatomy) -> int:
    """How many tokens statistics of a layer take at least: ten per input dimension."""
    return TOKENS_PER_DIMENSION * max(
        parts.embeddings.weight.shape[1], parts.heads * parts.head_dim
    )


def check_calibration(
    tokens: torch.Tensor, parts: hf.Anatomy, length: int, needed: int | None = None
) -> int:
    """Raises ValueError for unusable calibration tokens (valid: int64 (N,), of the model's
    vocabulary, enough of them: `needed`, None for what statistics of a layer take); returns the
    window length to use, in tokens: `length`, or what the model was trained at if that is less."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
        got = (
            f"{tokens.dtype} {tuple(tokens.shape)}"
            if isinstance(tokens, torch.Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"calibration: got {got}, valid is an int64 tensor (N,) of token ids")
    needed = tokens_needed(parts) if needed is None else needed
    if len(tokens) < needed:
        raise ValueError(
            f"calibration: got {len(tokens):,} tokens, at least {needed:,} are needed "
            f"({TOKENS_PER_DIMENSION} per hidden dimension); 50,000 are plenty"
        )
    vocabulary = parts.embeddings.weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"calibration: token ids run from {int(tokens.min())} to {int(tokens.max())}, the "
            f"model's vocabulary is 0 to {vocabulary - 1}: was it made with another tokenizer?"
        )
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length: got {length!r}, valid is a number of tokens, at least 1")
    length = min(length, parts.trained_length or length)
    if len(tokens) < length:
        raise ValueError(
            f"length: got windows of {length:,} tokens, calibration has {len(tokens):,}; valid is "
            "at most that many"
        )
    return length
