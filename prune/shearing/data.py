"""Named domains to shear on: groups of the embedded corpus, or one text file or folder each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effattn.textdata import HELD_OUT, encode, read_dataset, read_files

TESTS = {"test", "tests", "idle_test"}
TOOLS = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "unittest",
    "venv",
}
NETWORK = {"asyncio", "email", "html", "http", "urllib", "wsgiref", "xml", "xmlrpc"}


@dataclass
class DomainText:
    """Training tokens by domain, each domain's share of the text (in bytes, before any limit),
    held-out tokens of all together (M,) and where they come from."""

    train: dict[str, Tensor]
    proportions: dict[str, float]
    evaluation: Tensor
    source: str


def stdlib_domain(path: str) -> str:
    """The domain of a file of the standard library by its path there: "tests", "modules" (single
    files), "tools", "network" or "packages" (all others)."""
    parts = path.split("/")
    if TESTS & set(parts):
        return "tests"
    if len(parts) == 1:
        return "modules"
    return "tools" if parts[0] in TOOLS else "network" if parts[0] in NETWORK else "packages"


def domain_text(
    tokenizer,
    *,
    train: int,
    evaluation: int,
    domains: Sequence[Path] = (),
    dataset: str | None = None,
    column: str | None = None,
) -> DomainText:
    """Up to `train` tokens of every domain and `evaluation` held-out ones: of the files or folders
    (all .txt, .md and .py files in them) in `domains`, each a domain called by its stem; of a
    `dataset`, one domain; or else of the embedded corpus. Raises ValueError for what is missing,
    empty, not UTF-8 or called alike."""
    if domains and dataset:
        raise ValueError(
            "domain and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )
    if dataset:
        return _split(
            {"dataset": read_dataset(dataset, column)},
            tokenizer,
            train,
            evaluation,
            f"dataset {dataset}",
        )
    if domains:
        texts: dict[str, list[str]] = {}
        for path in map(Path, domains):
            if path.stem in texts:
                raise ValueError(
                    f"domain: two are called {path.stem!r}, valid are files or folders of "
                    "different names"
                )
            texts[path.stem] = read_files(_files(path))
        return _split(texts, tokenizer, train, evaluation, ", ".join(map(str, domains)))
    from effattn import embedded
    from effattn.embedded import corpus

    texts = {}
    for name, text in corpus.documents("train"):
        texts.setdefault(stdlib_domain(name), []).append(text)
    texts = dict(sorted(texts.items()))
    return DomainText(
        {name: encode(documents, tokenizer, train) for name, documents in texts.items()},
        {
            name: float(sum(len(text.encode()) for text in documents))
            for name, documents in texts.items()
        },
        embedded.tokens("validation", evaluation, tokenizer=tokenizer),
        "embedded corpus (Python standard library)",
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(
        file for file in path.rglob("*") if file.suffix in (".txt", ".md", ".py") and file.is_file()
    )
    if not found:
        raise ValueError(f"domain: the folder {path} has no .txt, .md or .py files")
    return found


def _split(texts: dict, tokenizer, train: int, evaluation: int, source: str) -> DomainText:
    """Every domain's last tenth is held out, and of those as many tokens are taken as its share of
    `evaluation`.
    """
    kept, held_out, shares = {}, [], {}
    for name, documents in texts.items():
        tokens = encode(documents, tokenizer, int((train + evaluation) / (1 - HELD_OUT)) + 1)
        if len(tokens) < 2:
            raise ValueError(f"domain: {name!r} holds no text")
        cut = len(tokens) - min(-(-evaluation // len(texts)), max(1, int(len(tokens) * HELD_OUT)))
        kept[name], shares[name] = tokens[:cut][:train], float(cut)
        held_out.append(tokens[cut:])
    return DomainText(kept, shares, torch.cat(held_out), source)
