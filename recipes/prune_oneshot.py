"""Prune a checkpoint's linear layers in one shot: SparseGPT, Wanda or magnitude, unstructured or
N:M.

    python recipes/prune_oneshot.py --model embedded --sparsity 2:4 --output runs/sparse24
    # one layer in memory at a time
    python recipes/prune_oneshot.py --model DIR --measure no --output DIR2
    accelerate launch recipes/prune_oneshot.py --model M --distill-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn prune oneshot`. From Python:

    from effattn.recipes.prune_oneshot import Settings, run
    report = run(Settings(output=Path("runs/sparse24"), sparsities=("2:4",)))

Zeros are stored like other weights and save no memory by themselves; `--pack bitmask`, or for 2:4
zeros `--pack 2:4`, keeps the weights without them, in a checkpoint that effattn.load reads.

Prune from file to file, one decoder layer in memory at a time. Then, where the model fits into
memory three times: measure it before and after, prune by the other methods and sparsities to
compare, distil with the zeros kept, time decoding, and prove in a fresh process that plain
transformers loads the result. `.<output>.partial` beside the output keeps an unfinished run; the
same command goes on at the layer, or the checkpoint, where it stopped.

Under torchrun or `accelerate launch` rank 0 prunes, measures and writes; the others wait, and take
part in the distillation.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, layerwise, options
from effattn.recipes.options import names, option, real, several, tokens, whole
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.prune.unstructured.report import OneShotReport
    from effattn.textdata import Streams

NOT_PACKED = "no"
LR = 1 / 3  # of what suits uptraining after a head conversion, which breaks more


def shares(_: str, given: Sequence[str]) -> tuple[str | tuple[str, ...], ...]:
    """ "0.5" and "2:4" as they are; "0.5,0.25", one for each layer, as a tuple."""
    return tuple(tuple(part.split(",")) if "," in part else part for part in given)


@dataclass
class Settings(options.Saving):
    """Prune linear layers in one shot (SparseGPT, Wanda, magnitude), unstructured or N:M, layer by
    layer.

    Zeros are stored like other weights: a pruned checkpoint saves no memory by itself. --pack keeps
    the weights without them."""

    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    sparsities: Sequence[str | Sequence[str]] = several(
        ("0.5",),
        "a share (0.5, the default), N:M with N zeros in every M (2:4), or one for each layer with "
        "commas; repeat to compare, the first one is saved",
        name="--sparsity",
        read=shares,
    )
    methods: Sequence[str] = names(
        ("sparsegpt", "wanda", "magnitude"), "to compare, the first one is saved"
    )
    modules: str = option("all", "all, attention or ffn")
    pack: str = option(
        NOT_PACKED,
        "save the weights without zeros, for effattn.load: bitmask, 2:4; no: as plain transformers "
        "loads them",
    )
    allocation: str = option("uniform", "shares by layer: uniform, or sensitivity")
    damping: float = real(0.1, "added to the Hessian's diagonal, as a share of it", above=0)
    raise_damping: bool = option(
        False, "where a factorisation fails, go on with more", name="--raise-damping"
    )
    text: Sequence[Path] = options.text_files("to calibrate on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = tokens(65_536, "to take Hessians of", least=1)
    evaluation_tokens: int = tokens(32_768, "held out, to measure on", least=16)
    length: int | None = options.window_length()
    measure: str = option(
        "auto", "load the models to measure and compare: auto (if they fit), yes, no"
    )
    distill_tokens: int = tokens(0, "to distil on after pruning, zeros kept; 0: none")
    batch: int = whole(2, "distillation windows a step and process", least=1)
    lr: float | None = real(None, "peak learning rate (default: by width and depth)", above=0)
    ce_weight: float = real(0.05, "weight of cross-entropy beside the KL", least=0)
    layer_weight: float = real(30.0, "weight of the distance to the dense layers' outputs", least=0)
    decode_contexts: Sequence[int] = options.decode_contexts((512, 4096))
    seed: int = options.random_seed("the distillation's data order")
    device: str = options.device_name()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "prune oneshot"
    APART: ClassVar = ("measure", "pack")

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return flow.partial_folder(self.output)

    @property
    def pruning(self) -> dict[str, object]:
        """What does not differ between the runs that are compared, as `oneshot` and `prune_files`
        call it."""
        same = ("modules", "allocation", "damping", "raise_damping", "length", "bos")
        return {name: getattr(self, name) for name in same}


def run(settings: Settings, show: Quiet | None = None) -> OneShotReport:
    """Prunes; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (model), FloatingPointError, LinAlgError,
    RuntimeError (the saved checkpoint is another model) and OSError (disk), each before anything
    appears under the output's name."""
    from effattn.prune.unstructured.report import OneShotReport

    with flow.output_of(settings, OneShotReport, show) as finished:
        if finished:
            return OneShotReport.load(settings.output)
        return prune(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def prune(settings: Settings, show: Quiet) -> OneShotReport:
    """The pruning, step by step."""
    from effattn.profiling.decode import rows_by_context

    main = main_process()
    check(settings)
    source, tokenizer, text = read(settings, show)
    pruned, report = prune_files(settings, show, source, text)

    student = None
    if layerwise.fits(settings, "distill_tokens", source):
        parent, student = load_both(settings, show, source, pruned)
        length = min(report.data["settings"]["length"], len(text.evaluation) - 1)
        if main:
            measure(settings, show, parent, student, text, length, report)
        # The dense model teaches what the zeros have cost; they stay zeros.
        if settings.distill_tokens:
            distil(settings, show, student, parent, text, length, report)
        if main and settings.decode_contexts:
            with show.stage("timing decode steps") as progress:
                models = {"before": parent, "after": student}
                report.data["decode"] = rows_by_context(models, settings.decode_contexts, progress)
    else:
        report.data["settings"]["measure"] = layerwise.TOO_LARGE
    if main:
        save(settings, show, student, tokenizer, pruned, text, report)
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is looked at. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.outputs import check_new_folder
    from effattn.prune.packed import check_format
    from effattn.prune.unstructured.layers import MODULES
    from effattn.prune.unstructured.nm import Sparsity
    from effattn.prune.unstructured.plan import ALLOCATIONS, METHODS

    for method in settings.methods:
        check_choice("methods", method, METHODS)
    asked = [[one] if isinstance(one, str) else one for one in settings.sparsities]
    for sparsity in (one for together in asked for one in together):
        Sparsity.parse(sparsity)
    if asked and settings.pack != NOT_PACKED:
        check_format("pack", settings.pack, *asked[0])
    if not settings.methods or not settings.sparsities:
        raise ValueError("methods, sparsities: got none, valid is at least one of each")
    check_choice("modules", settings.modules, MODULES)
    check_choice("allocation", settings.allocation, ALLOCATIONS)
    flow.device(settings.device)
    check_new_folder("output", settings.output)
    layerwise.check(settings, "distill_tokens")


def read(settings: Settings, show: Quiet) -> tuple:
    """The checkpoint's folder, its tokenizer, and the text to calibrate, distil and measure on. A
    model that cannot be pruned, or for whose copy there is no room, is refused first."""
    from effattn.hf.source import folder_of, load_tokenizer
    from effattn.hf.streamed import Checkpoint, StreamedModel
    from effattn.hf.weight_files import file_bytes
    from effattn.outputs import check_room
    from effattn.textdata import streams

    source = folder_of(settings.model)
    StreamedModel(Checkpoint(source))
    check_room("output", settings.output, file_bytes(source))
    with show.stage("reading text"):
        tokenizer = load_tokenizer(source)
        text = streams(
            tokenizer,
            train=max(settings.calibration_tokens, settings.distill_tokens),
            evaluation=settings.evaluation_tokens,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        text.check_passes("distill_tokens", settings.distill_tokens)
    return source, tokenizer, text


def prune_files(
    settings: Settings, show: Quiet, source: Path, text: Streams
) -> tuple[Path, OneShotReport]:
    """Prunes by the first method and sparsity: rank 0 goes from file to file, with one layer and
    its Hessians in memory at a time, the others wait. Returns the folder of the pruned files, and
    the report with what is known without loading a model."""
    from effattn.hf.weight_files import file_bytes
    from effattn.prune.unstructured import from_files
    from effattn.prune.unstructured.plan import said
    from effattn.prune.unstructured.report import OneShotReport
    from effattn.resuming import SETTINGS, as_json

    pruned, kept = settings.partial / "pruned", as_json(settings.kept())
    if main_process():
        from_files.resume(settings.partial / SETTINGS, kept)
    if main_process() and not pruned.exists():
        method, sparsity = settings.methods[0], settings.sparsities[0]
        with show.stage(f"pruning, layer by layer ({method}, {said(sparsity)})") as progress:
            from_files.prune_files(
                source,
                pruned,
                text.train[: settings.calibration_tokens],
                method=method,
                sparsity=sparsity,
                device=flow.device(settings.device),
                work=settings.partial / "layers",
                progress=progress,
                **settings.pruning,
            )
    while not pruned.exists():
        time.sleep(0.5)
    facts = json.loads((pruned / from_files.FACTS).read_text(encoding="utf-8"))
    told = {"source": text.source, "evaluation_source": text.evaluation_source}
    facts["settings"] = kept | facts["settings"] | told
    return pruned, OneShotReport.of_files(facts, file_bytes(source))


# Where the model fits into memory three times
# -------------------------------------------------------------------------------------------------


def load_both(settings: Settings, show: Quiet, source: Path, pruned: Path) -> tuple:
    """The dense and the pruned model on their device."""
    from effattn.surgery.checkpoint import load_model

    place = flow.device(settings.device)
    with show.stage("loading both models"):
        return tuple(
            load_model(folder, bos=settings.bos)[0].to(place) for folder in (source, pruned)
        )


def measure(
    settings: Settings, show: Quiet, parent, student, text: Streams, length: int, report
) -> None:
    """Sizes and quality before and after, and those of the other methods and sparsities."""
    from effattn.evaluate.loss import compare, measure_parent
    from effattn.prune.unstructured.plan import said
    from effattn.prune.unstructured.report import counts

    found = report.data
    dtype = str(student.dtype).removeprefix("torch.")
    found["model"] = {"class": type(student).__name__, "dtype": dtype}
    found["sizes"]["before"] |= counts(parent)
    found["sizes"]["after"] |= counts(student)
    with show.stage("measuring the dense model") as progress:
        found["quality"] = measure_parent(parent, text, length, progress)
    with show.stage("measuring the pruned model") as progress:
        quality = compare(parent, student, text.evaluation, length, progress=progress)
    found["quality"]["pruned"] = quality
    seconds = sum(layer["seconds"] for layer in report.layers)
    first, *others = ((way, share) for share in settings.sparsities for way in settings.methods)
    report.add_run(first[0], said(first[1]), seconds, report.layers, quality)
    for method, sparsity in others:
        if (method, sparsity) != first:
            prune_another(method, sparsity, settings, show, parent, text, length, report)


def prune_another(
    method: str, sparsity, settings: Settings, show: Quiet, parent, text: Streams, length, report
) -> None:
    """Another method or sparsity on a copy of the dense model, measured."""
    from effattn.evaluate.loss import compare
    from effattn.prune.unstructured.one_shot import oneshot
    from effattn.prune.unstructured.plan import said

    with show.stage(f"{method}, {said(sparsity)}") as progress:
        start, other = time.perf_counter(), copy.deepcopy(parent)
        layers = oneshot(
            other,
            text.train[: settings.calibration_tokens],
            method=method,
            sparsity=sparsity,
            progress=progress,
            **settings.pruning,
        ).layers
        seconds = time.perf_counter() - start
        quality = compare(parent, other, text.evaluation, length)
    report.add_run(method, said(sparsity), seconds, layers, quality)


def distil(
    settings: Settings, show: Quiet, student, parent, text: Streams, length: int, report
) -> None:
    """KL to the dense model, on the layers' weights that are not zero; measured again."""
    from effattn.evaluate.loss import compare
    from effattn.hf import anatomy
    from effattn.prune.unstructured.report import counts
    from effattn.prune.unstructured.zeros import keep_zeros
    from effattn.training.uptrain import default_lr, uptrain

    parts = anatomy.of(student)
    said = f"distilling on {settings.distill_tokens:,} tokens, zeros kept"
    with show.stage(said) as progress, keep_zeros(student):
        report.data["distillation"] = uptrain(
            student,
            parent,
            text.train,
            train_tokens=settings.distill_tokens,
            folder=settings.partial / "distill",
            evaluation=text.evaluation[:8_192],
            length=length,
            batch=settings.batch,
            lr=settings.lr or LR * default_lr(parts),
            ce_weight=settings.ce_weight,
            layer_weight=settings.layer_weight,
            seed=settings.seed,
            progress=progress,
            trainable=[p for layer in parts for p in layer.block.parameters()],
            overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
        )
    if main_process():
        report.data["sizes"]["after"] |= counts(student)
        with show.stage("measuring the distilled model") as progress:
            report.data["quality"]["distilled"] = compare(
                parent, student, text.evaluation, length, progress=progress
            )


# The end
# -------------------------------------------------------------------------------------------------


def save(
    settings: Settings, show: Quiet, student, tokenizer, pruned: Path, text: Streams, report
) -> None:
    """What was distilled, or else the pruned files as they are; or the model packed. student: None
    where no model is in memory to compare with; the files were checked layer by layer then."""
    from effattn.hf import verify
    from effattn.hf.weight_files import file_bytes
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import link_or_copy
    from effattn.prune.packed import save_packed
    from effattn.prune.unstructured.from_files import FACTS
    from effattn.surgery.checkpoint import load

    plain = settings.pack == NOT_PACKED
    with flow.saving(settings, show, report, plain) as folder:
        ids = text.evaluation[:64]
        if not plain:
            student = load(pruned) if student is None else student
            report.data |= save_packed(student, settings.pack, folder, tokenizer, ids)
            report.data["sizes"]["after"]["weight_bytes"] = weight_bytes(student)
        elif settings.distill_tokens:
            report.data["verification"] = flow.save_plain(folder, student, tokenizer, ids)
        else:
            for file in pruned.iterdir():
                if file.name != FACTS:  # the report has them
                    link_or_copy(file, folder / file.name)
            if student is not None:
                report.data["verification"] = verify.verify_plain(folder, student, ids)
        report.data["sizes"]["after"]["file_bytes"] = file_bytes(folder)


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
