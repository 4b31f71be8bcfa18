"""`effattn.export`: a checkpoint for another engine, and the proof that it computes the same there.

    report = effattn.export("runs/gqa2", to="gguf", output="runs/gqa2-gguf", check=True)

Everything that can be refused is refused before anything is written, and the output has its name
only when the check has passed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.exporting import capabilities, checking, gguf_file, llama_cpp
from effattn.exporting.report import KIND, ExportReport
from effattn.exporting.targets.base import TARGETS as AXIS
from effattn.exporting.targets.base import Source, Target
from effattn.hf import anatomy
from effattn.hf.weight_files import file_bytes
from effattn.outputs import atomic_folder, check_file, check_new_folder
from effattn.profiling.environment import environment
from effattn.projections import packed
from effattn.surgery.checkpoint import load_model, outline
from effattn.surgery.replace import replace

TARGETS = tuple(target for target in capabilities.ENGINES if target != capabilities.EFFATTN)
GGUF = Path(llama_cpp.FILE)
STEPS = 3  # loaded, written, checked
CONTEXTS = (512, 4096)  # of the speeds, in tokens


@dataclass(frozen=True)
class Asked:
    """What an export was asked for: its target, the format (None where it has none), whether to
    check, the parent, and what `Source` has of a cache."""

    target: type[Target]
    format: str | None
    check: bool
    before: str | Path | None
    cache: dict[str, Any]


def export(
    model: str | Path,
    to: str,
    output: str | Path,
    *,
    format: str | None = None,
    check: bool = False,
    before: str | Path | None = None,
    kv_cache: str | None = None,
    kv_skip: Sequence[int] = (),
    calibration: Tensor | Callable[[Any], Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> ExportReport:
    """Writes the checkpoint `model` (what `effattn.load` takes) for another engine into the new
    folder `output`, with a report; returns the report.

    to: "gguf" (llama.cpp: Llama, Qwen 2 and 3; layers that differ as `deci`), "openvino" (with its
    cache; layers that differ too), "transformers" (where effattn is not installed) or "vllm".
    format: of the matrices; of a GGUF file "f16" (default), "q8_0", "bf16" or "f32", of an OpenVINO
    model "f16" (default) or "f32". An `output` that ends with .gguf is that file, without a report
    beside it. check: run the export, in llama.cpp (`pip install 'effattn[llama-cpp]'`), in OpenVINO
    (`pip install 'effattn[openvino]'`) or in a fresh process with transformers, and compare logits
    and greedy tokens with ours; vLLM is not run. before: the checkpoint that this one was made of,
    whose speed is measured beside it. kv_cache: "fp8", for vLLM: scales of keys and values are
    written, of all layers but those in `kv_skip`, so that the largest of `calibration` is the
    largest code (int64 (N,), or a function of the tokenizer; None: a text of the package's).
    progress: called with (steps done, steps).

    Packed zeros become dense. Raises ValueError for bad arguments and a missing package,
    Unsupported, naming the parts and what would be lost, for what the engine cannot express, and
    RuntimeError when the engine computes something else: all before the output is there."""
    output = Path(output)
    cache = {"kv_cache": kv_cache, "kv_skip": tuple(kv_skip), "calibration": calibration}
    asked = _check(to, output, format, check, before, cache)
    if before is not None:
        _parent(asked, outline)  # it is written last: what is wrong with it is said first
    source = _source(model, asked, load_model)
    progress(1, STEPS)
    if output.suffix == gguf_file.SUFFIX:
        with _one_file(output) as folder:
            return _written(source, asked, folder, progress)
    with atomic_folder(output) as folder:
        report = _written(source, asked, folder, progress)
        report.save(folder)
    return report


def _check(
    to: str, output: Path, format: str | None, check: bool, before, cache: dict[str, Any]
) -> Asked:
    """What can be known to be wrong before a model is loaded."""
    if to in capabilities.NOT_HERE:
        raise Unsupported(f"to: got {to!r}, which is not here: {capabilities.NOT_HERE[to]}")
    target = AXIS.find(check_choice("to", to, TARGETS))
    if format is not None and not target.formats:
        raise ValueError(
            f"format: got {format!r} with to={to!r}, it is of GGUF files and OpenVINO models"
        )
    kind = None
    if target.formats:
        kind = check_choice("format", format or target.formats[0], target.formats)
    if before is not None and not (check and target.engine is not None):
        raise ValueError(
            "before: its speed is measured in llama.cpp or OpenVINO, with to='gguf' and check=True "
            "or to='openvino' and check=True"
        )
    _check_cache(to, target, **cache)
    target.require(check)
    if output.suffix == gguf_file.SUFFIX:
        if to != "gguf":
            raise ValueError(f"output: got {str(output)!r} with to={to!r}, valid is a new folder")
        if os.path.lexists(output):
            raise ValueError(f"output: {str(output)!r} exists; nothing was written")
        check_file("output", output)
        check_new_folder("output", _parts_of(output))
    else:
        check_new_folder("output", output)
    return Asked(target, kind, check, before, cache)


def _check_cache(to: str, target: type[Target], kv_cache, kv_skip, calibration) -> None:
    """ValueError for scales of a cache that this target does not read."""
    if kv_cache is None:
        if kv_skip or calibration is not None:
            name = "kv_skip" if kv_skip else "calibration"
            raise ValueError(f"{name}: it is of kv_cache, which was not asked for")
    elif not target.caches:
        raise ValueError(f"kv_cache: got {kv_cache!r} with to={to!r}, it is of to='vllm'")
    else:
        check_choice("kv_cache", kv_cache, target.caches)


def _source(name: str | Path, asked: Asked, load: Callable) -> Source:
    """The model, with packed weights unpacked. Unsupported for what the target has not. load:
    `load_model`, or `outline`, of which there is no more to be had than whether it is refused."""
    target = asked.target
    model, tokenizer = load(name)
    size = sum(p.nbytes for p in dict.fromkeys([*model.parameters(), *model.buffers()]))
    notes = capabilities.unpaged(model)
    model, adapted = target.adapt(model)
    notes += adapted
    if parts := capabilities.lost(model, target.name):
        engine = capabilities.ENGINES[target.name]
        raise Unsupported(
            f"model: {str(name)!r} has parts that {engine} cannot express, and would compute "
            f"something else without: {'; '.join(parts)}"
        )
    if zeros := packed.layers_of(model):
        replace(model, {path: layer.to_linear() for path, layer in zeros.items()})
        notes.append(f"{len(zeros)} packed matrices are dense, with their zeros")
    source = Source(str(name), model, tokenizer, notes, file_bytes(name) or size, **asked.cache)
    target.refuse(source, asked.format)
    return source


def _parent(asked: Asked, load: Callable) -> Source:
    """The model named `before`. Raises what `_source` does, of that argument."""
    assert asked.before is not None
    try:
        return _source(asked.before, asked, load)
    except ValueError as error:
        raise type(error)(f"before: {str(error).removeprefix('model: ')}") from error


def _written(
    source: Source, asked: Asked, folder: Path, progress: Callable[[int, int], None]
) -> ExportReport:
    """Writes the export into `folder`, checks it, and says what it is."""
    target = asked.target
    found, speeds = None, []
    target.write(source, folder, asked.format)
    progress(2, STEPS)
    files = {one.name: one.stat().st_size for one in sorted(folder.iterdir()) if one.is_file()}
    if asked.check:
        text, said = checking.prompts(source.tokenizer)
        found = target.check(source, folder, asked.format, text, said)
        if target.engine is not None:
            speeds = _speeds(source, asked, folder, text)
    progress(STEPS, STEPS)
    return ExportReport(
        {
            "kind": KIND,
            "settings": {
                "model": source.name,
                "to": target.name,
                "format": asked.format,
                "before": None if asked.before is None else str(asked.before),
                "kv_cache": asked.cache["kv_cache"],
                "kv_skip": list(asked.cache["kv_skip"]),
            },
            "files": files,
            "weight_bytes": source.weight_bytes,
            "notes": source.notes,
            "check": found,
            "speeds": speeds,
            "environment": environment(),
        }
    )


def _speeds(source: Source, asked: Asked, folder: Path, text) -> list[dict]:
    """How fast the engine decodes, beside the parent's export in the same format."""
    target = asked.target
    assert target.engine is not None
    longest = anatomy.of(source.model).trained_length or CONTEXTS[0]
    contexts = tuple(one for one in CONTEXTS if one + 64 <= longest) or (longest // 2,)
    parent = None
    try:
        if asked.before is not None:
            parent = folder / ".before"
            parent.mkdir()
            target.write(_parent(asked, load_model), parent, asked.format)
        return checking.speeds(target.engine, folder, parent, text, contexts)
    finally:
        if parent is not None:
            shutil.rmtree(parent, ignore_errors=True)


@contextmanager
def _one_file(output: Path) -> Iterator[Path]:
    """A folder whose one file becomes `output` at the end."""
    with atomic_folder(_parts_of(output)) as folder:
        yield folder
        made = folder / GGUF
        if made.is_file():
            made.replace(output)
    _parts_of(output).rmdir()


def _parts_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")
