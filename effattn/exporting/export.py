"""`effattn.export`: a checkpoint for another engine, and the proof that it computes the same there.

    report = effattn.export("runs/gqa2", to="gguf", output="runs/gqa2-gguf", check=True)

Everything that can be refused is refused before anything is written, and the output has its name
only when the check has passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from effattn.errors import Unsupported, check_choice
from effattn.exporting import capabilities, checking, gguf_file, gguf_tokenizer, llama_cpp, plain
from effattn.exporting.report import KIND, ExportReport
from effattn.hf import anatomy
from effattn.hf.weight_files import file_bytes
from effattn.outputs import atomic_folder, check_new_folder
from effattn.profiling.environment import environment
from effattn.projections import packed
from effattn.surgery.checkpoint import load_model
from effattn.surgery.replace import replace

TARGETS = tuple(target for target in capabilities.ENGINES if target != capabilities.EFFATTN)
GGUF = Path("model.gguf")
STEPS = 3  # loaded, written, checked
CONTEXTS = (512, 4096)  # of the speeds, in tokens


@dataclass
class Source:
    """A checkpoint that is exported: its model, and what was done so that the target has it."""

    name: str
    model: nn.Module
    tokenizer: object
    notes: list[str]
    weight_bytes: int


def export(
    model: str | Path,
    to: str,
    output: str | Path,
    *,
    format: str | None = None,
    check: bool = False,
    before: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> ExportReport:
    """Writes the checkpoint `model` (what `effattn.load` takes) for another engine into the new
    folder `output`, with a report; returns the report.

    to: "gguf" (llama.cpp: Llama, Qwen 2 and 3; layers that differ as `deci`), "transformers" (where
    effattn is not installed) or "vllm". format: of a GGUF file's matrices, "f16" (default), "q8_0",
    "bf16" or "f32". An `output` that ends with .gguf is that file, without a report beside it.
    check: run the export, in llama.cpp (`pip install 'effattn[llama-cpp]'`) or in a fresh process
    with transformers, and compare logits and greedy tokens with ours; vLLM is not run. before: the
    checkpoint that this one was made of, whose speed is measured beside it. progress: called with
    (steps done, steps).

    Packed zeros become dense. Raises ValueError for bad arguments and a missing package,
    Unsupported, naming the parts and what would be lost, for what the engine cannot express, and
    RuntimeError when the engine computes something else: all before the output is there."""
    output = Path(output)
    kind = _check(to, output, format, check, before)
    source = _source(model, to)
    _prepare(source, to, kind)
    progress(1, STEPS)
    if output.suffix == gguf_file.SUFFIX:
        with _one_file(output) as folder:
            return _written(source, to, kind, folder, check, before, progress)
    with atomic_folder(output) as folder:
        report = _written(source, to, kind, folder, check, before, progress)
        report.save(folder)
    return report


def _check(to: str, output: Path, format: str | None, check: bool, before) -> str | None:
    """What can be known to be wrong before a model is loaded; the format."""
    check_choice("to", to, TARGETS)
    if format is not None and to != "gguf":
        raise ValueError(f"format: got {format!r} with to={to!r}, it is of GGUF files")
    kind = check_choice("format", format or "f16", gguf_file.FORMATS) if to == "gguf" else None
    if to == "gguf":
        gguf_file.require_gguf()
    if check and to == "vllm":
        raise Unsupported("check: vLLM is not run by effattn; valid is check=False")
    if before is not None and not (check and to == "gguf"):
        raise ValueError(
            "before: its speed is measured in llama.cpp, with to='gguf' and check=True"
        )
    if check and to == "gguf":
        llama_cpp.require()
    if output.suffix == gguf_file.SUFFIX:
        if to != "gguf":
            raise ValueError(f"output: got {str(output)!r} with to={to!r}, valid is a new folder")
        if output.exists():
            raise ValueError(f"output: {str(output)!r} exists; nothing was written")
    else:
        check_new_folder("output", output)
    return kind


def _source(name: str | Path, to: str) -> Source:
    """The model, with packed weights unpacked. Unsupported for parts that the target has not."""
    model, tokenizer = load_model(name)
    size = sum(p.nbytes for p in dict.fromkeys([*model.parameters(), *model.buffers()]))
    notes: list[str] = []
    if to == "transformers":
        model, notes = plain.windows(model)
    if parts := capabilities.lost(model, to):
        engine = capabilities.ENGINES[to]
        raise Unsupported(
            f"model: {str(name)!r} has parts that {engine} cannot express, and would compute "
            f"something else without: {'; '.join(parts.values())}"
        )
    if zeros := packed.layers_of(model):
        replace(model, {path: layer.to_linear() for path, layer in zeros.items()})
        notes.append(f"{len(zeros)} packed matrices are dense, with their zeros")
    return Source(str(name), model, tokenizer, notes, file_bytes(name) or size)


def _prepare(source: Source, to: str, kind: str | None) -> None:
    """Unsupported for a class that the target has not."""
    parts = anatomy.of(source.model)
    if to == "gguf":
        assert kind is not None
        gguf_file.check(parts, kind)
        gguf_tokenizer.of(source.tokenizer, parts.embeddings.weight.shape[0])
    elif to == "vllm":
        plain.check_vllm(parts)
        source.notes += plain.notes_for_vllm(parts)


def _written(
    source: Source,
    to: str,
    kind: str | None,
    folder: Path,
    check: bool,
    before: str | Path | None,
    progress: Callable[[int, int], None],
) -> ExportReport:
    """Writes the export into `folder`, checks it, and says what it is."""
    found, speeds = None, []
    if to == "gguf":
        assert kind is not None
        file = folder / GGUF
        _write_gguf(source, file, kind)
        progress(2, STEPS)
        if check:
            found, speeds = _in_llama_cpp(source, file, kind, before)
    else:
        found = plain.write(source.model, source.tokenizer, folder, check)
    progress(STEPS, STEPS)
    files = {one.name: one.stat().st_size for one in sorted(folder.iterdir()) if one.is_file()}
    return ExportReport(
        {
            "kind": KIND,
            "settings": {
                "model": source.name,
                "to": to,
                "format": kind,
                "before": None if before is None else str(before),
            },
            "files": files,
            "weight_bytes": source.weight_bytes,
            "notes": source.notes,
            "check": found,
            "speeds": speeds,
            "environment": environment(),
        }
    )


def _write_gguf(source: Source, file: Path, kind: str) -> None:
    size = source.model.get_input_embeddings().weight.shape[0]
    gguf_file.write(source.model, gguf_tokenizer.of(source.tokenizer, size), file, kind)


def _in_llama_cpp(
    source: Source, file: Path, kind: str, before: str | Path | None
) -> tuple[dict, list[dict]]:
    """What it computes there, and how fast, beside the parent's file in the same format."""
    text, said = checking.prompts(source.tokenizer)
    # our own numbers without the rounding of a 16-bit model's steps
    found = checking.compare(source.model.float(), source.tokenizer, file, kind, text, said)
    longest = anatomy.of(source.model).trained_length or CONTEXTS[0]
    contexts = tuple(one for one in CONTEXTS if one + 64 <= longest) or (longest // 2,)
    parent = None
    if before is not None:
        parent = file.parent / f".before{gguf_file.SUFFIX}"
        other = _source(before, "gguf")
        _prepare(other, "gguf", kind)
        _write_gguf(other, parent, kind)
    try:
        return found, checking.speeds(file, parent, text, contexts)
    finally:
        if parent is not None:
            parent.unlink()


@contextmanager
def _one_file(output: Path) -> Iterator[Path]:
    """A folder whose one file becomes `output` at the end."""
    with atomic_folder(output.with_name(f"{output.name}.parts")) as folder:
        yield folder
        made = folder / GGUF
        if made.is_file():
            made.replace(output)
    output.with_name(f"{output.name}.parts").rmdir()
