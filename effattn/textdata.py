"""Token streams to calibrate, train and evaluate on: text files, a `datasets` name, or the embedded
corpus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from effattn import embedded
from effattn.dataset_rows import read_dataset
from effattn.encoding import encode

PASSES = 20  # over the same text that a training may make
BLOCK = 2048  # tokens of one file before the next one's: any part of a stream has all files in it
LEAST = 64  # tokens of a file that are worth reading it for
EMBEDDED = "embedded corpus (Python standard library)"


@dataclass
class Streams:
    """train (N,) and evaluation (M,) int64, disjoint, and where they come from: `source` what
    calibrates and trains, `evaluation_source` what is measured on."""

    train: torch.Tensor
    evaluation: torch.Tensor
    source: str
    evaluation_source: str

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
    evaluation_text: Sequence[Path] = (),
) -> Streams:
    """Up to `train` training tokens and `evaluation` held-out ones, from `text` files, a `dataset`,
    or else the embedded corpus (its train and validation files). No more is read than that.

    Files are taken in proportion to their lengths. Held out is the last part of what is read of
    each, or with `evaluation_text` the first part of those files, and nothing of the others. Raises
    ValueError for files that are missing, empty or not UTF-8, for sources with nothing in them, and
    for too little text to hold so much out."""
    check_source(text, dataset)
    if evaluation_text:
        measured, evaluation_source = separate(evaluation_text, tokenizer, evaluation)
        evaluation = 0
    if not text and not dataset:
        if not evaluation_text:
            measured = embedded.tokens("validation", evaluation, tokenizer=tokenizer)
            evaluation_source = EMBEDDED
        learned = embedded.tokens("train", train, tokenizer=tokenizer)
        return Streams(learned, measured, EMBEDDED, evaluation_source)

    if text:
        parts, source = from_files(text, tokenizer, train + evaluation)
    else:
        rows = read_dataset(dataset, column)
        parts, source = [encode(rows, tokenizer, train + evaluation)], said_of(dataset)
    argument, found = "text" if text else "dataset", sum(map(len, parts))
    if found < 2:
        raise ValueError(f"{argument}: {source} holds no text")
    check_held_out(found - 1, evaluation, source, argument)  # one is left to train on, at least
    parts, last = hold_out(parts, evaluation)
    if not evaluation_text:
        measured, evaluation_source = interleaved(last), f"{source}, held out"
    return Streams(interleaved(parts)[:train], measured, source, evaluation_source)


def separate(paths: Sequence[Path], tokenizer, count: int) -> tuple[torch.Tensor, str]:
    """`count` tokens of files to measure on, and the files in words. ValueError for less text."""
    parts, source = from_files(paths, tokenizer, count)
    found = interleaved(parts)[:count]
    check_held_out(len(found), count, source, "evaluation_text")
    return found, source


def check_held_out(found: int, wanted: int, source: str, argument: str) -> None:
    """ValueError for less text than is to be measured on."""
    if found < wanted:
        raise ValueError(
            f"{argument}: {wanted:,} tokens are to be held out to measure on, {source} has "
            f"{max(found, 0):,}; ask for less to measure on, or give more text"
        )


def from_files(paths: Sequence[Path], tokenizer, count: int) -> tuple[list[torch.Tensor], str]:
    """Up to `count` tokens of the files together: the first ones of each, in proportion to the
    files' lengths, as one tensor (n,) a file; and the files in words. Of very many files some are
    taken, evenly, so that each gives `LEAST` tokens or so. Raises what `read_files` does."""
    paths = list(paths)[:: math.ceil(len(paths) * LEAST / max(count, LEAST))]
    texts = read_files(paths)
    quotas = {number: _share(count, text, texts) for number, text in enumerate(texts)}
    found = [encode([text], tokenizer, quotas[number]) for number, text in enumerate(texts)]
    # A character is not as many tokens in every file: what one lacks, others have.
    while (missing := count - sum(map(len, found))) > 0:
        cut = [number for number, ids in enumerate(found) if len(ids) == quotas[number]]
        for number in cut:
            quotas[number] += _share(missing, texts[number], [texts[one] for one in cut])
            found[number] = encode([texts[number]], tokenizer, quotas[number])
        if not cut:
            break
    return found, ", ".join(map(str, paths))


def _share(count: int, text: str, texts: Sequence[str]) -> int:
    """Of `count` tokens, those of one of the texts."""
    return math.ceil(count * len(text) / sum(map(len, texts)))


def hold_out(
    parts: Sequence[torch.Tensor], count: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(what is left of each part, its last tokens): `count` of these together, in proportion."""
    total = done = 0
    left, held = [], []
    for part in parts:
        total += len(part)
        last = round(count * total / sum(map(len, parts))) - done
        done += last
        left.append(part[: len(part) - last])
        held.append(part[len(part) - last :])
    return left, held


def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one stream in which they take turns, `BLOCK` tokens at a time, so that the first
    tokens of it are of all of them."""
    blocks = []
    for part in parts:
        split = part.split(BLOCK)
        blocks += [((place + 0.5) / len(split), block) for place, block in enumerate(split)]
    return torch.cat([block for _, block in sorted(blocks, key=lambda one: one[0])])


def said_of(name: str) -> str:
    """A dataset in words."""
    return f"dataset {name}"


def held_out(
    text: Sequence[Path] = (), dataset: str | None = None, column: str | None = None
) -> tuple[Iterable[str], str]:
    """(texts to measure on, where they come from), where nothing is trained: the files, the rows of
    a dataset, or else the embedded validation files. To be read once. Raises as `streams` does."""
    check_source(text, dataset)
    if text:
        return read_files(text), ", ".join(map(str, text))
    if dataset:
        return read_dataset(dataset, column), said_of(dataset)
    found = (body for _, body in embedded.corpus.documents("validation"))
    return found, "embedded corpus (Python standard library, validation files)"


def measured_on(
    tokenizer,
    count: int,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    column: str | None = None,
) -> tuple[torch.Tensor, str]:
    """`count` tokens of `held_out`, or as many as there are, int64 (n,), and where they come from:
    of files one after the other, each in proportion. Raises as `streams` does."""
    if text and not dataset:
        parts, source = from_files(text, tokenizer, count)
        return torch.cat(parts)[:count], source
    documents, source = held_out(text, dataset, column)
    return encode(documents, tokenizer, count), source


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
