r"""Convert a checkpoint's attention from MHA to GQA or MQA.

    python recipes/convert_gqa.py --model embedded --kv-heads 2 --output runs/gqa2
    accelerate launch recipes/convert_gqa.py --model M --kv-heads 8 --uptrain-tokens 50M \
        --output DIR

`--help` lists every option; the same command is `effattn convert-gqa`. From Python:

    from effattn.recipes.convert_gqa import Settings, run
    report = run(Settings(model="embedded", kv_heads=2, output=Path("runs/gqa2")))

Measure the parent, merge its key/value heads by what they do on some text, measure, distil on
demand (uptraining), measure, time decoding, and save: the output has its name only when a fresh
process has shown that plain transformers computes the same with it. `.<output>.partial` beside it
holds what an unfinished run has measured, and the checkpoints of its uptraining; the same command
goes on from there. A model that does not fit into memory is converted from file to file, one layer
in memory, and not measured (`--measure`).

Under torchrun or `accelerate launch` every process converts, all train together, and rank 0
measures and writes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, layerwise, options
from effattn.recipes.options import option, real, tokens, whole
from effattn.resuming import Parts
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.heads.report import ConversionReport
    from effattn.hf.anatomy import Anatomy
    from effattn.textdata import Streams


@dataclass
class Settings(options.Settings):
    """Give a checkpoint fewer key/value heads: MHA to GQA or MQA, loadable by plain
    transformers.
    """

    kv_heads: int = whole(help="key/value heads to keep; 1 is MQA", least=1)
    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    method: str = option("optimal", "optimal, aligned, mean, first or random")
    refit: bool = option(True, "solve the output projections again by least squares")
    grouping: str = option("contiguous", "contiguous, or similarity")
    text: Sequence[Path] = options.text_files("to calibrate on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = tokens(50_000, "to take second moments of", least=1)
    evaluation_tokens: int = tokens(32_768, "held out, to measure on", least=2)
    uptrain_tokens: int = tokens(0, "to distil on after converting; 0: none")
    length: int = whole(512, "window length in tokens", least=8, unit="tokens")
    batch: int = whole(2, "uptraining windows a step and process", least=1)
    lr: float | None = real(None, "peak learning rate (default: by width and depth)", above=0)
    ce_weight: float = real(0.05, "weight of cross-entropy beside the KL", least=0)
    layer_weight: float = real(
        30.0, "weight of the distance to the parent's layer outputs", least=0
    )
    trainable: str = option("attention", "what uptraining trains: attention, or all")
    seed: int = options.random_seed("data order and random heads")
    device: str = options.device_name()
    decode_contexts: Sequence[int] = options.decode_contexts((512, 4096, 16384))
    measure: str = layerwise.measure_option()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    APART: ClassVar = ("decode_contexts", "measure")

    @property
    def partial(self) -> Path:
        return flow.partial_folder(self.output)


def run(settings: Settings, show: Quiet | None = None) -> ConversionReport:
    """Converts; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, RuntimeError (the saved
    checkpoint is another model) and OSError (disk), each before anything appears under the
    output's name."""
    from effattn.heads.report import ConversionReport

    with flow.output_of(settings) as finished:
        if finished:
            return ConversionReport.load(settings.output)
        check(settings)
        if layerwise.fits(settings, "uptrain_tokens"):
            return convert(settings, show or Quiet())
        named = ("kv_heads", "method", "refit", "grouping", "length", "seed")
        heads = layerwise.spec("gqa", settings, *named)
        return layerwise.convert(settings, show or Quiet(), heads)


# The steps
# -------------------------------------------------------------------------------------------------


def convert(settings: Settings, show: Quiet) -> ConversionReport:
    """The conversion, step by step."""
    from effattn.evaluate.loss import compare, measure_parent
    from effattn.heads import gqa

    main = main_process()
    parent, tokenizer, parts = load(settings, show)
    text, length = read(settings, show, tokenizer, parts)
    kept = begin(settings, parent, "convert-gqa")

    quality: dict = {}
    if main:
        said = "measuring the parent"
        quality = flow.part(show, kept, said, "parent", measure_parent, parent, text, length)

    # What a group of old heads computes is approximated by one new head, layer by layer.
    student = copy.deepcopy(parent)
    with show.stage(f"converting {parts.kv_heads} -> {settings.kv_heads} KV heads") as progress:
        report = gqa.convert_gqa(
            student,
            settings.kv_heads,
            text.train[: settings.calibration_tokens],
            method=settings.method,
            refit=settings.refit,
            grouping=settings.grouping,
            length=length,
            seed=settings.seed,
            progress=progress,
        )
    compared = (compare, parent, student, text.evaluation, length)
    if main:
        said = "measuring the conversion"
        quality["converted"] = flow.part(show, kept, said, "converted", *compared)
    report.data["quality"] = quality or None  # and what is measured from here on
    report.data["settings"] |= asked_for(settings, text) | flow.fed(text, parent)

    # The parent teaches what the conversion has lost.
    if settings.uptrain_tokens:
        report.data["uptraining"] = distil(settings, show, student, parent, text, length)
        if main:
            said = "measuring the uptrained model"
            quality["uptrained"] = flow.part(show, kept, said, "uptrained", *compared)

    if main and settings.decode_contexts:
        report.data["decode"] = decode_speed(settings, show, kept, parent, student)
    if main:
        with flow.saving(settings, show, plain=True) as folder:
            ids = text.evaluation[: min(64, length)]
            report.data["verification"] = flow.save_plain(folder, student, tokenizer, ids)
            report.save(folder)
        flow.discard(settings.partial)
    return report


def begin(settings: options.Settings, parent, flow_name: str) -> Parts | None:
    """What an earlier run has measured, and where this one keeps it; None in all processes but the
    main one."""
    flow.check_unfinished(settings, begin=True)
    if not main_process():
        return None
    made_with = flow.made_with(parent, "torch", "transformers")
    return Parts(settings.partial / "parts.json", settings.kept(), made_with, flow_name)


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.heads.gqa import METHODS
    from effattn.heads.grouping import GROUPINGS
    from effattn.outputs import check_new_folder
    from effattn.training.uptrain import TRAINABLE

    check_choice("method", settings.method, METHODS)
    check_choice("grouping", settings.grouping, GROUPINGS)
    check_choice("trainable", settings.trainable, TRAINABLE)
    layerwise.check(settings, "uptrain_tokens")
    flow.device(settings.device)
    check_new_folder("output", settings.output)
    flow.check_unfinished(settings, begin=False)


def load(settings: Settings, show: Quiet) -> tuple:
    """The parent on its device, its tokenizer, and its anatomy."""
    from effattn.heads.gqa import check_kv_heads
    from effattn.hf import anatomy
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        parent, tokenizer = load_model(settings.model, bos=settings.bos)
        parent.to(flow.device(settings.device))
        parts = anatomy.of(parent)
        parts.require_gqa()
        check_kv_heads(settings.kv_heads, parts.kv_heads)
        parts.check_kv_heads(settings.kv_heads)
        # no more than half of the weights is keys and values
        check_room("output", settings.output, weight_bytes(parent) // 2)
    return parent, tokenizer, parts


def read(settings: Settings, show: Quiet, tokenizer, parts: Anatomy) -> tuple[Streams, int]:
    """The text to calibrate, train and measure on, and the tokens of a window of it."""
    from effattn.heads.gqa import check_calibration
    from effattn.textdata import streams

    with show.stage("reading text"):
        text = streams(
            tokenizer,
            train=max(settings.calibration_tokens, settings.uptrain_tokens),
            evaluation=settings.evaluation_tokens,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        calibration = text.train[: settings.calibration_tokens]
        length = check_calibration(calibration, parts, settings.length)
        text.check_passes("uptrain_tokens", settings.uptrain_tokens)
    return text, length


def distil(
    settings: Settings, show: Quiet, student, parent, text: Streams, length: int
) -> dict[str, object]:
    """Trains `student` towards `parent`, from the last checkpoint of an unfinished run if there is
    one."""
    from effattn import embedded
    from effattn.training.uptrain import uptrain

    with show.stage(f"uptraining on {settings.uptrain_tokens:,} tokens") as progress:
        result = uptrain(
            student,
            parent,
            text.train,
            train_tokens=settings.uptrain_tokens,
            folder=settings.partial / "uptrain",
            evaluation=text.evaluation[:8_192],
            length=length,
            batch=settings.batch,
            lr=settings.lr,
            ce_weight=settings.ce_weight,
            layer_weight=settings.layer_weight,
            trainable=settings.trainable,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
        )
    pretraining = embedded.card()["train_tokens"] if settings.model == embedded.NAME else None
    result["share_of_pretraining"] = result["tokens"] / pretraining if pretraining else None
    return result


def decode_speed(settings: Settings, show: Quiet, kept: Parts, parent, student) -> list[dict]:
    """Both models' decoding steps at each context."""
    from effattn.profiling.decode import decode_by_context

    contexts, models = settings.decode_contexts, {"before": parent, "after": student}
    name = f"decode/{','.join(map(str, contexts))}"  # other contexts may go on from this run
    timed = (decode_by_context, models, contexts)
    return flow.part(show, kept, "timing decode steps", name, *timed)


def asked_for(settings: Settings, text: Streams) -> dict[str, object]:
    """What the report says of the settings beside those of the conversion itself."""
    return {
        "model": settings.model,
        "calibration_source": text.source,
        "uptrain_tokens": settings.uptrain_tokens,
        "uptrain_batch": settings.batch,
        "ce_weight": settings.ce_weight,
        "layer_weight": settings.layer_weight,
        "trainable": settings.trainable,
    }


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
