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

from effattn.recipes import converting, flow, layerwise, options
from effattn.recipes.options import option, real, whole
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.heads.report import ConversionReport
    from effattn.hf.anatomy import Anatomy


@dataclass
class Settings(options.Saving):
    """Give a checkpoint fewer key/value heads: MHA to GQA or MQA, loadable by plain
    transformers.
    """

    kv_heads: int = whole(help="key/value heads to keep; 1 is MQA", least=1)
    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    method: str = option("optimal", "optimal, aligned, mean, first or random")
    refit: bool = converting.refits()
    refit_ffn: bool = option(False, "those of the FFNs as well, to what leaves each layer")
    grouping: str = option("contiguous", "contiguous, or similarity")
    text: Sequence[Path] = converting.text_files()
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = converting.calibration_tokens()
    evaluation_tokens: int = converting.evaluation_tokens()
    uptrain_tokens: int = converting.uptrain_tokens()
    length: int = converting.window_length()
    batch: int = converting.uptrain_batch()
    lr: float | None = real(None, "peak learning rate (default: by width and depth)", above=0)
    ce_weight: float = converting.ce_weight()
    layer_weight: float = converting.layer_weight()
    trainable: str = converting.trainable()
    seed: int = options.random_seed("data order and random heads")
    device: str = options.device_name()
    decode_contexts: Sequence[int] = converting.decode_contexts()
    measure: str = layerwise.measure_option()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "convert-gqa"
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

    with flow.output_of(settings, ConversionReport, show) as finished:
        if finished:
            return ConversionReport.load(settings.output)
        check(settings)
        if layerwise.fits(settings, "uptrain_tokens"):
            return convert(settings, show or Quiet())
        named = ("kv_heads", "method", "refit", "refit_ffn", "grouping", "length", "seed")
        heads = layerwise.spec("gqa", settings, *named)
        return layerwise.convert(settings, show or Quiet(), heads)


# The steps
# -------------------------------------------------------------------------------------------------


def convert(settings: Settings, show: Quiet) -> ConversionReport:
    """The conversion, step by step."""
    from effattn.heads import gqa
    from effattn.heads.gqa import check_ffn, check_kv_heads

    def fits(parts: Anatomy) -> None:
        parts.require_gqa()
        check_kv_heads(settings.kv_heads, parts.kv_heads)
        parts.check_kv_heads(settings.kv_heads)
        if settings.refit_ffn:
            check_ffn(parts, settings.refit)

    parent, tokenizer, parts = converting.load(settings, show, fits)
    going = converting.begin(settings, show, parent, tokenizer, parts, "convert-gqa")

    # What a group of old heads computes is approximated by one new head, layer by layer.
    student = copy.deepcopy(parent)
    with show.stage(f"converting {parts.kv_heads} -> {settings.kv_heads} KV heads") as progress:
        report = gqa.convert_gqa(
            student,
            settings.kv_heads,
            going.calibration,
            method=settings.method,
            refit=settings.refit,
            refit_ffn=settings.refit_ffn,
            grouping=settings.grouping,
            length=going.length,
            seed=settings.seed,
            progress=progress,
        )
    # The parent teaches what the conversion has lost, if that was asked for.
    converting.measure(going, student, report)

    if main_process():
        with flow.saving(settings, show, report, plain=True) as folder:
            ids = going.text.evaluation[: min(64, going.length)]
            report.data["verification"] = flow.save_plain(folder, student, tokenizer, ids)
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.heads.gqa import METHODS
    from effattn.heads.grouping import GROUPINGS

    check_choice("method", settings.method, METHODS)
    check_choice("grouping", settings.grouping, GROUPINGS)
    if settings.refit_ffn and not settings.refit:
        raise ValueError("refit_ffn: got True with refit=False; valid is False, or refit=True")
    layerwise.check(settings, "uptrain_tokens")
    converting.check(settings)


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
