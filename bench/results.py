"""The results file: what it was measured with, how it is read back, and when it is gone on with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch

import bench
import effattn
import effattn.kernels
import effattn.prune
import effattn.quant
from effattn.profiling.environment import device_name, module_version
from effattn.reports.files import finite, write_all_atomic

KIND, VERSION = "bench", 1
# What may change between two runs that stand in one file: which cases there are, not what they
# measure.
CASES = "bench/rows"


def sources() -> str:
    """A digest of the package's sources: results of other code are not added to."""
    return digest_of((effattn, effattn.kernels, effattn.prune, effattn.quant, bench))


def digest_of(packages: Iterable[ModuleType]) -> str:
    """Of the sources of these packages, which are folders beside each other in a checkout; `CASES`
    do not count."""
    found: dict[str, bytes] = {}
    for package in packages:
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            found[f"{package.__name__}/{file.relative_to(root).as_posix()}".replace(".", "/")] = (
                file.read_bytes()
            )
    counted = (
        name.encode() + source
        for name, source in sorted(found.items())
        if not name.startswith(CASES)
    )
    return hashlib.sha256(b"".join(counted)).hexdigest()[:16]


def settings(device: torch.device, quick: bool, seconds: float) -> dict:
    """What has to be the same for two measurements to stand in one file."""
    return {
        "device": device.type,
        "name": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": module_version("triton"),
        "quick": quick,
        "seconds": seconds,
        "sources": sources(),
    }


def new(wanted: dict) -> dict:
    """Results without a case, for the settings that were asked for."""
    return {"kind": KIND, "version": VERSION, "settings": wanted, "cases": {}}


def read(path: Path) -> dict:
    """The results in `path`. ValueError in one line for what is not one of ours, or of another
    version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); start over with --fresh") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        kind = found.get("kind") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: got kind {kind!r}, valid is {KIND!r}; start over with --fresh")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: results of version {found.get('version')}, this is version {VERSION}; start "
            "over with --fresh"
        )
    if not isinstance(found.get("settings"), dict) or not all(
        _whole(x) for x in _values(found.get("cases"))
    ):
        raise ValueError(f"{path}: settings or cases are damaged; start over with --fresh")
    return found


def _values(cases: object) -> list:
    return list(cases.values()) if isinstance(cases, dict) else [None]


def _whole(measured: object) -> bool:
    return isinstance(measured, dict) and all(
        isinstance(measured.get(x), dict) for x in ("case", "contenders")
    )


def resume(path: Path, wanted: dict) -> dict:
    """The results in `path` to go on with, or new ones where there is none. ValueError if they
    cannot be added to.
    """
    if not path.exists():
        return new(wanted)
    found = read(path)
    if differing := [name for name in wanted if found["settings"].get(name) != wanted[name]]:
        said = "; ".join(
            f"{name}: {found['settings'].get(name)!r}, now {wanted[name]!r}" for name in differing
        )
        raise ValueError(f"{path}: measured with other settings ({said}); start over with --fresh")
    return found


def save(path: Path, results: Mapping, page: str | None = None) -> None:
    """Writes the results and, with it, the page beside them, whole or not at all."""
    files = {} if page is None else {path.with_suffix(".html").name: page}
    text = json.dumps(finite(dict(results)), indent=1, allow_nan=False) + "\n"
    write_all_atomic(path.parent, {**files, path.name: text})


def default_path(device: torch.device, root: Path = Path("results")) -> Path:
    """Where a device's results lie."""
    return root / slug(device) / "bench.json"


def slug(device: torch.device) -> str:
    """A folder's name for this device: cpu-epyc-2core, nvidia-h200."""
    words = re.sub(r"\((r|tm)\)|@.*|\b\d+-core\b", " ", device_name().lower())
    words = (
        re.sub(r"\b(amd|intel|processor|cpu|with)\b", " ", words) if device.type == "cpu" else words
    )
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"
    return f"cpu-{name}-{torch.get_num_threads()}core" if device.type == "cpu" else name
