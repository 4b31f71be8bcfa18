"""The English text of `make real`: The Debian Administrator's Handbook (GPL-2+ or CC BY-SA 3.0), of
Debian's package `debian-handbook`; or any file that one gives.

It is cut into `PARTS`. One of them is measured on, and the others calibrate: files that are taken
in proportion, so that any number of tokens to calibrate on comes from all over the book, as what is
measured does, and nothing is in both."""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from effattn.reports.files import write_text_atomic

PACKAGE = "debian-handbook"
PAGES = "./usr/share/doc/debian-handbook/html/en-US/"
PARTS, HELD_OUT = 12, 7
LEAST = 600_000  # characters: the part to measure on is then long enough for every step
SKIPPED = {"script", "style", "head"}
BLOCKS = {"p", "div", "li", "pre", "h1", "h2", "h3", "h4", "h5", "tr", "br", "dt", "dd", "title"}
ADVICE = "; valid is --text FILE, an English text of your own"


def prepare(folder: Path, text: Path | None = None) -> tuple[list[Path], Path]:
    """(files to calibrate on, the one to measure on), written to `folder`. text: instead of the
    handbook, which is fetched once. ValueError for too little text, and where none can be had."""
    from effattn.textdata import read_files

    if text is None:
        text = folder / "handbook.txt"
        if not text.is_file():
            write_text_atomic(text, handbook(package(folder)))
    (body,) = read_files([text])
    if len(body) < LEAST:
        raise ValueError(f"text: {text} has {len(body):,} characters, valid are {LEAST:,} or more")
    files = []
    for number, part in enumerate(divided(body)):
        files.append(folder / "parts" / f"{number:02d}.txt")
        write_text_atomic(files[-1], part)
    held_out = files.pop(HELD_OUT)
    return files, held_out


def divided(body: str) -> Iterator[str]:
    """`PARTS` parts of a text, of equal lengths but for the line that each ends with."""
    start = 0
    for number in range(1, PARTS + 1):
        end = body.find("\n", number * len(body) // PARTS) + 1 if number < PARTS else len(body)
        yield body[start:end]
        start = end


def package(folder: Path) -> Path:
    """The package's file, downloaded by apt. ValueError in one line where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob(f"{PACKAGE}_*.deb")):
        return found[-1]
    if shutil.which("apt-get") is None:
        raise ValueError(f"text: Debian's {PACKAGE} needs apt-get, which is not here{ADVICE}")
    asked = ["apt-get", "download", PACKAGE]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True)
    if done.returncode or not (found := sorted(folder.glob(f"{PACKAGE}_*.deb"))):
        said = (done.stderr.strip().splitlines() or ["no file"])[-1]
        raise ValueError(f"text: apt-get download {PACKAGE}: {said}{ADVICE}")
    return found[-1]


def handbook(deb: Path) -> str:
    """The English pages of the package as text, in the order of their names."""
    with tarfile.open(fileobj=io.BytesIO(contents(deb.read_bytes()))) as archive:
        pages = {
            one.name: archive.extractfile(one).read().decode("utf-8")
            for one in archive
            if one.isfile() and one.name.startswith(PAGES) and one.name.endswith(".html")
        }
    return "\n\n".join(stripped(pages[name]) for name in sorted(pages)) + "\n"


def contents(deb: bytes) -> bytes:
    """The tar archive inside a .deb, an `ar` archive. ValueError for another file."""
    at, magic = 8, b"!<arch>\n"
    while deb.startswith(magic) and at < len(deb):
        name, size = deb[at : at + 16].decode().strip(), int(deb[at + 48 : at + 58])
        body = deb[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            return lzma.decompress(body) if name.rstrip("/").endswith(".xz") else body
        at += 60 + size + size % 2
    raise ValueError("text: the package is no Debian package with a data.tar")


class _Text(HTMLParser):
    """What a reader sees of a page, a line a block."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag, attrs):
        self.skipped += tag in SKIPPED
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self.skipped -= tag in SKIPPED
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self.skipped:
            self.pieces.append(data)


def stripped(page: str) -> str:
    """The text of an HTML page: a line a block, and where its source has one; spaces as one."""
    reader = _Text()
    reader.feed(page)
    lines = (" ".join(line.split()) for line in "".join(reader.pieces).splitlines())
    return "\n".join(filter(None, lines))
