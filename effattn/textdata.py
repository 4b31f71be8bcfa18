"""Token streams to calibrate, train and evaluate on: text files, a `datasets` name, or the embedded
corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from effattn import embedded
from effattn.dataset_rows import read_dataset
from effattn.encoding import encode

HELD_OUT = 0.1  # share of the user's text that is kept for evaluation
PASSES = 20  # over the same text that a training may make


@dataclass
class Streams:
    """train (N,) and evaluation (M,) int64, disjoint, and where they come from."""

    train: torch.Tensor
    evaluation: torch.Tensor
    source: str

    def check_passes(self, argument: str, tokens: int, advice: str = "") -> None:
        """ValueError when a training on `tokens` would read the text more than PASSES times."""
        most = PASSES * len(self.train)
        if tokens > most:
            raise ValueError(
                f"{argument}: got {tokens:,}, the text has {len(self.train):,} tokens: more than "
                f"{PASSES} passes over it; give more text{advice or f' or at most {most:,}'}"
            )


def streams(
    tokenizer,
    *,
    train: int,
    evaluation: int,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    column: str | None = None,
) -> Streams:
    """Up to `train` training tokens and `evaluation` held-out ones, from `text` files, a `dataset`,
    or else the embedded corpus (its train and validation files). Raises ValueError for files that
    are missing, empty or not UTF-8, and for sources with nothing in them."""
    check_source(text, dataset)
    if not text and not dataset:
        return Streams(
            embedded.tokens("train", train, tokenizer=tokenizer),
            embedded.tokens("validation", evaluation, tokenizer=tokenizer),
            "embedded corpus (Python standard library)",
        )
    wanted = int((train + evaluation) / (1 - HELD_OUT)) + 1
    documents = read_files(text) if text else read_dataset(dataset, column)
    tokens = encode(documents, tokenizer, wanted)
    source = ", ".join(str(path) for path in text) if text else f"dataset {dataset}"
    if len(tokens) < 2:
        raise ValueError(f"{'text' if text else 'dataset'}: {source} holds no text")
    held_out = min(evaluation, max(1, int(len(tokens) * HELD_OUT)))
    cut = len(tokens) - held_out
    return Streams(tokens[:cut][:train], tokens[cut:], source)


def held_out(
    text: Sequence[Path] = (), dataset: str | None = None, column: str | None = None
) -> tuple[Iterable[str], str]:
    """(texts to measure on, where they come from), where nothing is trained: the files, the rows of
    a dataset, or else the embedded validation files. To be read once. Raises as `streams` does."""
    check_source(text, dataset)
    if text:
        return read_files(text), ", ".join(map(str, text))
    if dataset:
        return read_dataset(dataset, column), f"dataset {dataset}"
    found = (body for _, body in embedded.corpus.documents("validation"))
    return found, "embedded corpus (Python standard library, validation files)"


def check_source(text: Sequence[Path], dataset: str | None) -> None:
    """ValueError for files and a dataset at once."""
    if text and dataset:
        raise ValueError(
            "text and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )


def read_files(paths: Sequence[Path]) -> list[str]:
    """The texts of UTF-8 files. Raises ValueError naming the file that is missing, empty or not
    UTF-8.
    """
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(
                f"text: {path} {'is a folder' if path.is_dir() else 'does not exist'}, valid is a "
                "file"
            )
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: {path} is not UTF-8 (byte {error.start} is "
                f"{error.object[error.start]:#04x})"
            ) from None
        if not text.strip():
            raise ValueError(f"text: {path} is empty")
        texts.append(text)
    return texts
