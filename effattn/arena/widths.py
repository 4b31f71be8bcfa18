"""Every bidirectional pattern at about one reach: an eighth of the tokens."""

from __future__ import annotations

LEAST = 16  # tokens


def eighths(length: int) -> list[str]:
    """A spec of each bidirectional pattern for inputs of `length` tokens: windows, blocks, chunks,
    slots and codes of an eighth of them, features of a quarter."""
    reach = max(LEAST, length // 8 // 2 * 2)
    return [
        "dense",
        f"block(block={reach})",
        f"sliding(window={reach + 1})",
        f"longformer(window={reach + 1}, global_tokens=1)",
        f"longnet(segments=[{reach}, {4 * reach}], dilations=[1, 4])",
        f"s2(block={reach})",
        f"lsh(rounds=2, buckets=8, chunk={reach})",
        f"linformer(k={reach}, max_length={length})",
        f"performer(features={2 * reach})",
        "linear",
        f"vq(codes={reach})",
    ]
