"""The corpus that every machine with Python has: the source of the standard library.

Files are split by a hash of their path, so a file keeps its side in every Python release.
Validation files come from the library proper (some distributions ship no `test` package), training
files from everywhere. Left out: `test` data, generated tables, machine-specific files, files that
are not UTF-8, and training files that share many lines with a validation file.

    documents("train")    -> list of (path relative to the standard library, text), in a fixed order
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.09
SALT = "37 "  # of the first forty salts, the one whose validation files are long and varied
MIN_BYTES, MAX_BYTES = 1_000, 400_000
NEAR_DUPLICATE = (
    0.15  # share of a training file's three-line windows that also stand in validation files
)

# Generated tables, data and files that differ from machine to machine.
_LEFT_OUT_PARTS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "pydoc_data",
    "data",
}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "bad_", "badsyntax", "bad", "pydocfodder", "config-")
_TEST_PARTS = {"test", "tests", "idle_test"}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _is_left_out(relative: Path) -> bool:
    parts = relative.parts
    if _LEFT_OUT_PARTS & set(parts) or parts[-1].startswith(_LEFT_OUT_PREFIXES):
        return True
    if any(part.endswith(("data", "_data")) for part in parts[:-1]) or parts[-1].endswith(
        "_data.py"
    ):
        return True
    return parts[0] == "encodings" and parts[-1] != "__init__.py"


def _windows(text: str) -> set[int]:
    """Hashes of every run of three non-trivial lines."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 3]
    return {hash(tuple(lines[i : i + 3])) for i in range(len(lines) - 2)}


@functools.lru_cache(maxsize=1)
def _splits() -> dict[str, list[tuple[str, str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _is_left_out(relative) or not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        name = relative.as_posix()
        is_library = not _TEST_PARTS & set(relative.parts)
        held_out = is_library and _hash(SALT + name) / 2**64 < VALIDATION_SHARE
        splits["validation" if held_out else "train"].append((name, text))

    held_out_windows = set().union(*(_windows(text) for _, text in splits["validation"]))

    def is_new(text: str) -> bool:
        windows = _windows(text)
        return len(windows & held_out_windows) <= NEAR_DUPLICATE * max(1, len(windows))

    splits["train"] = [(name, text) for name, text in splits["train"] if is_new(text)]
    for split in SPLITS:  # a fixed order that mixes packages
        splits[split].sort(key=lambda document: _hash("order " + document[0]))
    if not splits["train"] or not splits["validation"]:
        raise FileNotFoundError(
            f"no usable Python source under {root}: this Python ships its standard library "
            "without sources, so the embedded corpus is not available; pass text files instead"
        )
    return splits


def documents(split: str) -> list[tuple[str, str]]:
    """The documents of `split` ("train" or "validation") as (relative path, text), in a fixed
    order.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, valid are {', '.join(map(repr, SPLITS))}")
    return _splits()[split]
