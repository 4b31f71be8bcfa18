r"""Replace a checkpoint's softmax attention by an approximate backend, or its projections by
structured ones, and bring the quality back by attention transfer and distillation.

    python recipes/linearize.py --pattern "linear(feature_map='hedgehog')" \
        --keep-every 4 --output runs/linear
    python recipes/linearize.py --pattern none --projections "monarch(blocks=16, ratio=0.5)" \
        --output runs/monarch
    accelerate launch recipes/linearize.py --model M --distil-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn linearize`. From Python:

    from effattn.recipes.linearize import Settings, run
    report = run(Settings(pattern="performer(features=256)", output=Path("runs/performer")))

Measure the parent, swap, measure, train each new layer to give what the old one gives (attention
transfer), measure, distil the whole model, measure, save, load again and compare logits; only then
the output has its name. `.<output>.partial` beside it holds the checkpoints of both trainings; the
same command goes on from there.

Under torchrun or `accelerate launch` every process swaps, all train together, and rank 0 measures
and writes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option, or_none, real, tokens, whole
from effattn.resuming import as_json
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.linearizing.report import LinearizeReport
    from effattn.textdata import Streams

STATE_CONTEXTS = (1024, 8192, 65536)  # tokens that the report says the bytes of a state at
DEFAULT = "runs/linearize"  # where a run without an output trains
LR = 2 / 3  # of what suits uptraining with twice the windows a step


@dataclass
class Settings(options.Saving):
    """Replace softmax attention by an approximate backend, and bring the quality back: transfer,
    then distillation.
    """

    pattern: str | None = or_none(
        "linear(feature_map='hedgehog')",
        'an approximate backend, JSON from layers to specs, or "none"',
    )
    projections: str | None = option(None, "monarch(...) instead of, or beside, a pattern")
    model: str = options.model_name()
    output: Path | None = option(None, "new folder for the checkpoint and its report")
    keep_every: int = whole(0, "keep every n-th layer exact, as --keep says; 0: none", least=0)
    keep: str = option("sliding(window=256, sinks=4)", "what those layers get")
    learn_windows: float = real(
        0.0,
        "what a token of a window costs the kept layers, which learn one for each K/V head; 0: as "
        "--keep says",
        least=0,
    )
    fit_decay: bool = option(True, "choose a decay for every head of a `linear` without one")
    text: Sequence[Path] = options.text_files("to train on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    transfer_tokens: int = tokens(150_000, "of attention transfer; 0: none")
    distil_tokens: int = tokens(450_000, "of distillation; 0: none")
    evaluation_tokens: int = tokens(32_768, "held out, to measure on", least=16)
    length: int = whole(512, "window length in tokens", least=8)
    batch: int = whole(1, "windows a step and process", least=1)
    transfer_lr: float = real(3e-3, "peak learning rate of the transfer", above=0)
    lr: float | None = real(
        None, "peak learning rate of the distillation (default: by size)", above=0
    )
    transfer_trainable: str = option("attention", "what transfer trains: attention, or maps")
    trainable: str = option("attention", "what distillation trains: attention, or all")
    lora: int = whole(0, "rank of LoRA adapters to distil instead (needs peft); 0: none", least=0)
    ce_weight: float = real(0.05, least=0)  # from Python alone, as is the next
    layer_weight: float = real(30.0, least=0)
    seed: int = options.random_seed("the data's order")
    device: str = options.device_name()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "linearize"

    @property
    def partial(self) -> Path:
        """Where both trainings keep their checkpoints until the end."""
        return flow.partial_folder(self.output or DEFAULT)

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all."""
        return bool(self.transfer_tokens or self.distil_tokens)


def run(settings: Settings, show: Quiet | None = None) -> LinearizeReport:
    """Linearizes; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, RuntimeError (the saved
    checkpoint is another model) and OSError (disk), each before anything appears under the
    output's name."""
    from effattn.linearizing.report import LinearizeReport

    with flow.output_of(settings, LinearizeReport, show, DEFAULT) as finished:
        if finished:
            return LinearizeReport.load(settings.output)
        return linearize(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def linearize(settings: Settings, show: Quiet) -> LinearizeReport:
    """All of it, the output's folder being held."""
    from effattn.evaluate.loss import compare, measure_parent
    from effattn.surgery.checkpoint import load_again, save

    main = main_process()
    check(settings)
    parent, tokenizer, specs = load(settings, show)
    text, length = read(settings, show, tokenizer)
    student, specs, layers = swap(settings, show, parent, specs, text)
    if settings.trains:
        flow.check_unfinished(settings, begin=True)

    report = begun(settings, parent, student, text)
    if main:
        with show.stage("measuring the parent") as progress:
            report.data["quality"] = measure_parent(parent, text, length, progress)
        with show.stage("error against exact attention, by budget") as progress:
            report.data["approximation"] = errors_by_budget(settings, parent, specs, text, progress)

    def measured(stage: str) -> None:
        if main:
            with show.stage(f"measuring after {stage}") as progress:
                report.data["stages"][stage] = compare(
                    parent, student, text.evaluation, length, progress=progress
                )

    measured("swap")
    # Each new layer alone learns what the old one made of the same inputs.
    if settings.transfer_tokens:
        report.data["transfer"] = transfer_attention(
            settings, show, student, parent, layers, text, length
        )
        measured("transfer")
    # Then the whole model learns the parent's predictions, errors of other layers included.
    if settings.distil_tokens:
        report.data["distillation"] = distil(settings, show, student, parent, text, length)
        measured("distillation")

    if main and settings.output is not None:
        with flow.saving(settings, show, report) as folder:
            student.config.use_cache = True
            save(student, folder, tokenizer)
            ids = text.evaluation[: min(64, length)]
            _, report.data["verification"] = load_again(folder, student, ids)
    if main:
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.linearizing import plan
    from effattn.outputs import check_new_folder
    from effattn.training import transfer, uptrain
    from effattn.training.lora import check_peft

    check_choice("transfer_trainable", settings.transfer_trainable, transfer.TRAINABLE)
    check_choice("trainable", settings.trainable, uptrain.TRAINABLE)
    flow.device(settings.device)
    if settings.output is not None:
        check_new_folder("output", settings.output)
    if settings.pattern is None and settings.projections is None:
        raise ValueError(
            "pattern: got none and no projections either; valid is for example "
            "'performer(features=256)'"
        )
    if settings.learn_windows:
        plan.check_keep(settings.keep_every, settings.keep)
    if settings.lora and settings.distil_tokens:
        check_peft()
    if settings.trains:
        flow.check_unfinished(settings, begin=False)


def load(settings: Settings, show: Quiet) -> tuple:
    """The parent on its device, its tokenizer, and what each layer becomes: {layer: spec}."""
    from effattn.hf import anatomy
    from effattn.hf.adapters import require_own_weights
    from effattn.hf.weights import weight_bytes
    from effattn.linearizing import plan
    from effattn.outputs import check_room
    from effattn.surgery.attaching import require_own_attention
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        parent, tokenizer = load_model(settings.model, bos=settings.bos)
        parent.to(flow.device(settings.device))
        require_own_attention(parent, settings.model)
        require_own_weights(parent)
        parts = anatomy.of(parent)
        if settings.output is not None:
            # structured projections may be smaller
            check_room("output", settings.output, weight_bytes(parent) // 2)
        specs = plan.layer_specs(parts, settings.pattern, settings.keep_every, settings.keep)
        if settings.trains and specs:
            plan.check_trains(parent, specs)
    return parent, tokenizer, specs


def read(settings: Settings, show: Quiet, tokenizer) -> tuple[Streams, int]:
    """The text to fit, train and measure on, and the tokens of a window of it."""
    from effattn.linearizing import plan
    from effattn.textdata import streams

    trained = {name: getattr(settings, name) for name in ("transfer_tokens", "distil_tokens")}
    with show.stage("reading text"):
        text = streams(
            tokenizer,
            train=max(*trained.values(), plan.WINDOWS * plan.LENGTH),
            evaluation=settings.evaluation_tokens,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        for name, count in trained.items():
            text.check_passes(name, count, ", or ask for less")
    return text, min(settings.length, len(text.evaluation))


def swap(settings: Settings, show: Quiet, parent, specs: dict[int, str], text: Streams) -> tuple:
    """The swapped copy of the parent, its specs with what was fitted on text, and the layers that
    have something to learn. ValueError where none has."""
    from effattn.linearizing import plan
    from effattn.swapping.patterns import label_of
    from effattn.training.transfer import learnable

    student = copy.deepcopy(parent)
    if settings.learn_windows:
        with show.stage("learning windows by head"):
            keeping = settings.keep_every, settings.keep, settings.learn_windows
            specs = plan.learned(student, specs, *keeping, text.train)
    with show.stage("swapping"):
        specs = plan.apply(
            student, specs, settings.projections, text.train, fit_decay=settings.fit_decay
        )
        layers = plan.learning_layers(student, specs, settings.projections)
        if not layers:
            raise ValueError(
                f"pattern: {label_of(settings.pattern)} is exact in every layer, there is nothing "
                "to recover; valid is an approximate backend, or use `effattn swap`"
            )
        if settings.transfer_tokens:
            learnable(student, layers, settings.transfer_trainable)
    return student, specs, layers


def errors_by_budget(
    settings: Settings, parent, specs: dict[int, str], text: Streams, progress
) -> dict:
    """How far from exact attention the swapped-in methods are on this model, with less and more to
    spend: the data of `effattn.measure_approximation`."""
    from effattn.linearizing import plan
    from effattn.linearizing.approximation import METHODS, measure_approximation
    from effattn.specs import parse_spec

    used = {parse_spec(specs[layer])[0] for layer in plan.approximate(specs)}
    if settings.projections:
        used.add(parse_spec(settings.projections)[0])
    length = min(plan.LENGTH, len(text.train) // 4)
    return measure_approximation(
        parent,
        text.train[: 4 * length],
        methods=[name for name in METHODS if name in used],
        length=length,
        seed=settings.seed,
        progress=progress,
    ).data


def transfer_attention(
    settings: Settings, show: Quiet, student, parent, layers: list[int], text: Streams, length: int
) -> dict[str, object]:
    """Trains the swapped layers of `student`, each towards the parent's on the same inputs."""
    from effattn.training.transfer import transfer

    tokens = settings.transfer_tokens
    with show.stage(f"attention transfer on {tokens:,} tokens") as progress:
        return transfer(
            student,
            parent,
            text.train,
            layers=layers,
            train_tokens=tokens,
            folder=settings.partial / "transfer",
            length=length,
            batch=settings.batch,
            lr=settings.transfer_lr,
            trainable=settings.transfer_trainable,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
        )


def distil(
    settings: Settings, show: Quiet, student, parent, text: Streams, length: int
) -> dict[str, object]:
    """Trains `student` towards the predictions of `parent`: its own weights, or with `lora`
    adapters that are merged into them afterwards."""
    from effattn.hf import anatomy
    from effattn.training.lora import adapters
    from effattn.training.uptrain import default_lr, uptrain

    lr = settings.lr or LR * default_lr(anatomy.of(student))

    def train(trainable) -> dict:
        return uptrain(
            student,
            parent,
            text.train,
            train_tokens=settings.distil_tokens,
            folder=settings.partial / "distil",
            evaluation=text.evaluation[:8_192],
            length=length,
            batch=settings.batch,
            lr=lr,
            ce_weight=settings.ce_weight,
            layer_weight=settings.layer_weight,
            trainable=trainable,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
        )

    with show.stage(f"distilling on {settings.distil_tokens:,} tokens") as progress:
        if not settings.lora:
            return train(settings.trainable)
        with adapters(student, settings.lora) as parameters:
            return train(parameters)


def begun(settings: Settings, parent, student, text: Streams) -> LinearizeReport:
    """The report, with what is known before anything is measured."""
    from effattn import embedded
    from effattn.linearizing import plan
    from effattn.linearizing.report import LinearizeReport
    from effattn.profiling.environment import environment
    from effattn.surgery.describing import describe

    told, is_embedded = describe(student), settings.model == embedded.NAME
    asked = {"model": settings.model, "output": settings.output} | settings.told()
    return LinearizeReport(
        {
            "kind": "linearize",
            "settings": as_json(asked) | {"source": text.source} | flow.fed(text, parent),
            "model": {
                "class": told.model,
                "parameters_before": describe(parent).parameters["total"],
                "parameters_after": told.parameters["total"],
                "dtype": told.dtype,
            },
            "layers": [
                {"layer": row["index"]} | {axis: row[axis] for axis in ("pattern", "projections")}
                for row in told.layers
            ],
            "quality": {},
            "stages": {},
            "transfer": None,
            "distillation": None,
            "approximation": None,
            "pretraining_tokens": embedded.card()["train_tokens"] if is_embedded else None,
            "state_bytes": plan.state_bytes(student, STATE_CONTEXTS),
            "verification": None,
            "environment": environment(),
        }
    )


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
