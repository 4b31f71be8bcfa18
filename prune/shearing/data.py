"""Named domains to shear on: groups of the embedded corpus, or one text file or folder each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from effattn.dataset_rows import read_dataset
from effattn.encoding import encode
from effattn.textdata import (
    EMBEDDED,
    check_held_out,
    interleaved,
    read_files,
    said_of,
    separate,
)

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
    held-out tokens of all together (M,), and where both come from."""

    train: dict[str, Tensor]
    proportions: dict[str, float]
    evaluation: Tensor
    source: str
    evaluation_source: str


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
    evaluation_text: Sequence[Path] = (),
) -> DomainText:
    """Up to `train` tokens of every domain and `evaluation` held-out ones: of the files or folders
    (all .txt, .md and .py files in them) in `domains`, each a domain called by its stem; of a
    `dataset`, one domain; or else of the embedded corpus. Held out is the last part of what is read
    of each domain, or with `evaluation_text` the first part of those files. Raises ValueError for
    what is missing, empty, not UTF-8 or called alike, and for too little text to hold out."""
    if domains and dataset:
        raise ValueError(
            "domain and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )
    if evaluation_text:
        apart = separate(evaluation_text, tokenizer, evaluation)
        evaluation = 0
    if dataset:
        found = _split(
            {"dataset": read_dataset(dataset, column)},
            tokenizer,
            train,
            evaluation,
            said_of(dataset),
        )
    elif domains:
        texts: dict[str, list[str]] = {}
        for path in map(Path, domains):
            if path.stem in texts:
                raise ValueError(
                    f"domain: two are called {path.stem!r}, valid are files or folders of "
                    "different names"
                )
            texts[path.stem] = read_files(_files(path))
        source = ", ".join(map(str, domains))
        found = _split(texts, tokenizer, train, evaluation, source)
    else:
        found = _embedded(tokenizer, train, evaluation)
    if evaluation_text:
        found.evaluation, found.evaluation_source = apart
    return found


def _embedded(tokenizer, train: int, evaluation: int) -> DomainText:
    """The training files of the embedded corpus by their place in the library, and its validation
    files."""
    from effattn import embedded
    from effattn.embedded import corpus

    texts: dict[str, list[str]] = {}
    for name, text in corpus.documents("train"):
        texts.setdefault(stdlib_domain(name), []).append(text)
    texts = dict(sorted(texts.items()))
    return DomainText(
        {name: encode(documents, tokenizer, train) for name, documents in texts.items()},
        {
            name: float(sum(len(text.encode()) for text in documents))
            for name, documents in texts.items()
        },
        embedded.tokens("validation", max(1, evaluation), tokenizer=tokenizer),
        EMBEDDED,
        EMBEDDED,
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
    """The last part of what is read of every domain is held out: as many tokens of each, together
    `evaluation`. ValueError, naming the domain, for one that is too short."""
    kept, held_out, shares = {}, [], {}
    for name, documents in texts.items():
        last = evaluation // len(texts) + (len(kept) < evaluation % len(texts))
        tokens = encode(documents, tokenizer, train + last)
        if len(tokens) < 2:
            raise ValueError(f"domain: {name!r} holds no text")
        check_held_out(len(tokens) - 1, last, f"the domain {name!r}", "domain")
        cut = len(tokens) - last
        kept[name], shares[name] = tokens[:cut][:train], float(cut)
        held_out.append(tokens[cut:])
    return DomainText(kept, shares, interleaved(held_out), source, f"{source}, held out")
