r"""Shear a checkpoint to an exact smaller shape, as Sheared LLaMA does: learn L0 masks and weights
together, cut, and train on with plain transformers.

    python recipes/shear.py --heads 4 --ffn 352 --output runs/half --compare
    python recipes/shear.py --model M --layers 24 --hidden 2048 \
        --domain web.txt --domain code/ --output DIR
    accelerate launch recipes/shear.py --model M --heads 4 --mask-tokens 400M \
        --continue-tokens 50000M --output DIR

`--help` lists every option; the same command is `effattn shear`. From Python:

    from effattn.recipes.shear import Settings, run
    report = run(Settings(heads=4, ffn=352, output=Path("runs/half")))

Learn which parts to keep, cut them out, learn the parent's predictions, train on the text; measure
after each. The output has its name only when a fresh process has shown that plain transformers
computes the same with it. `.<output>.partial` beside it keeps the checkpoints of every training;
the same command goes on from there. Baselines follow if asked for, with the same code, data and
number of tokens: the same shape from scratch, and one-shot structured pruning trained on.

Under torchrun or `accelerate launch` all processes train together; rank 0 measures and writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option, or_none, real, several, tokens, whole
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    import torch

    from effattn.prune.shearing.batch_loading import Domains
    from effattn.prune.shearing.data import DomainText
    from effattn.prune.shearing.report import ShearReport
    from effattn.prune.shearing.target import Target

DEFAULT = "runs/shear"  # where a run without an output trains


@dataclass
class Settings(options.Saving):
    """Shear a model to an exact smaller shape: learned L0 masks, cut, and trained on (Sheared
    LLaMA).
    """

    model: str = options.model_name()
    output: Path | None = option(None, "new folder for the checkpoint and its report")
    hidden: int | None = whole(None, "hidden dimensions to keep", least=1)
    heads: int | None = whole(
        None, "key/value heads a layer to keep, with their query heads", least=1
    )
    ffn: int | None = whole(None, "FFN dimensions a layer to keep", least=1)
    layers: int | None = whole(None, "layers to keep", least=1)
    domains: Sequence[Path] = several(
        (), "a UTF-8 text file or a folder of them; repeat for more domains", name="--domain"
    )
    dataset: str | None = option(None, "a `datasets` name, NAME:CONFIG or folder, as one domain")
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    mask_tokens: int = tokens(60_000, "to learn masks on", least=1)
    recover_tokens: int = tokens(
        1_140_000, "to learn the parent's predictions on after cutting; 0: none"
    )
    continue_tokens: int = tokens(0, "of text to train on then; 0: none")
    evaluation_tokens: int = tokens(32_768, "held out, to measure on", least=16)
    length: int = whole(512, "window length in tokens", least=8)
    batch: int = whole(4, "windows a step and process", least=1)
    lr: float | None = real(
        None, "peak learning rate while masks are learned (default: by width)", above=0
    )
    recover_lr: float | None = real(
        None, "the same while the parent's predictions are learned (default: by width)", above=0
    )
    continue_lr: float | None = real(None, "the same for training on (default: by width)", above=0)
    mask_lr: float | None = real(None, "of the masks' log alphas (default: by steps)", above=0)
    multiplier_lr: float | None = real(
        None, "of the Lagrange multipliers (default: by steps)", above=0
    )
    warm_start: str | None = or_none("obs", "criterion that ranks the gates at the start, or none")
    start: float = real(2.5, "log alpha of gates that no criterion ranks")
    ramp: float = real(
        0.2, "share of the mask stage until the whole target is asked for", least=0, most=1
    )
    distill: bool = option(True, "masks learn the parent's predictions instead of the text")
    compensate: bool = option(True, "least squares for o_proj and down_proj after cutting")
    loading: str = option("clamped", "domain weights: clamped (paper), signed (its code), fixed")
    baselines: Sequence[str] = several(
        (),
        "also train this on as many tokens: scratch, structured (one-shot pruning) or taught (the "
        "same, by the parent); repeat for more",
        name="--baseline",
        read=lambda _, given: tuple(dict.fromkeys(given)),
    )
    compare: InitVar[bool] = option(False, "all baselines that the stages have")
    scratch_lr: float | None = real(
        None, "of the baseline from scratch (default: by width)", above=0
    )
    decode_contexts: Sequence[int] = options.decode_contexts((512, 4096))
    seed: int = options.random_seed("data order and gates")
    device: str = options.device_name()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "shear"

    def __post_init__(self, compare: bool) -> None:
        super().__post_init__()
        if compare:
            from effattn.prune.shearing.report_data import BASELINES

            every = (name for name in BASELINES if self.recover_tokens or name != "taught")
            self.baselines = tuple(every)

    @property
    def target(self) -> Target:
        """The shape that was asked for."""
        from effattn.prune.shearing.target import Target

        return Target(self.hidden, self.heads, self.ffn, self.layers)

    @property
    def all_tokens(self) -> int:
        """Of all stages: what a baseline gets in one."""
        return self.mask_tokens + self.recover_tokens + self.continue_tokens

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return flow.partial_folder(self.output or DEFAULT)


def run(settings: Settings, show: Quiet | None = None) -> ShearReport:
    """Shears; returns the report, which with an output also lies there as report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (model, or shape), FloatingPointError,
    RuntimeError (the saved checkpoint is another model) and OSError (disk), each before anything
    appears under the output's name."""
    from effattn.prune.shearing.report import ShearReport

    with flow.output_of(settings, ShearReport, show, DEFAULT) as finished:
        if finished:
            return ShearReport.load(settings.output)
        return shear(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def shear(settings: Settings, show: Quiet) -> ShearReport:
    """The shearing, step by step."""
    import torch

    from effattn.evaluate.loss import compare, measure_parent
    from effattn.prune.shearing.measures import speeds
    from effattn.prune.shearing.report import ShearReport
    from effattn.prune.shearing.sheared import continue_training

    main = main_process()
    check(settings)
    parent, tokenizer = load(settings, show)
    text, domains = read(settings, show, parent, tokenizer)
    flow.check_unfinished(settings, begin=True)
    length = min(settings.length, len(text.evaluation) - 1)
    quality: dict = {}
    if main:
        with show.stage("measuring the parent") as progress:
            quality = measure_parent(parent, text, length, progress)

    # Masks over the axes that get smaller are learned with the weights, then folded and cut.
    small, masks = learn(settings, show, parent, domains)
    stages = {"masks": masks}
    # The parent's losses by domain steer what is read from here on.
    references = torch.tensor(masks["references"], dtype=torch.float64)

    def measured(model) -> dict | None:
        if not main:
            return None
        with show.stage("measuring") as progress:
            return compare(parent, model, text.evaluation, length, progress=progress)

    def trained(model, name: str, said: str, budget: int, lr: float | None, teacher=None) -> dict:
        with show.stage(f"{said}, {budget:,} tokens") as progress:
            return continue_training(
                model,
                domains,
                references,
                tokens=budget,
                folder=settings.partial / name,
                lr=lr,
                teacher=teacher,
                progress=progress,
                **in_common(settings, parent),
            )

    quality["cut"] = measured(small)
    # What is left learns what the parent says of every token, and then the text alone.
    if budget := settings.recover_tokens:
        said = "learning the parent's predictions"
        stages["recovered"] = trained(small, "recovered", said, budget, settings.recover_lr, parent)
        quality["recovered"] = measured(small)
    if budget := settings.continue_tokens:
        stages["continued"] = trained(
            small, "continued", "training on", budget, settings.continue_lr
        )
        quality["continued"] = measured(small)
    baselines = compete(settings, show, parent, small, text, trained, measured)

    report = ShearReport.of(
        parent,
        small,
        length,
        stages,
        quality=quality,
        baselines=baselines,
        **facts(settings, text, parent),
    )
    if main:
        with show.stage("timing") as progress:
            report.data["speed"] = speeds(parent, small, length, settings.decode_contexts, progress)
        if settings.output is not None:
            save(settings, show, small, tokenizer, text.evaluation[: min(64, length)], report)
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.outputs import check_new_folder
    from effattn.prune.shearing.batch_loading import RULES
    from effattn.prune.shearing.report_data import BASELINES
    from effattn.prune.structural.criteria import CRITERIA

    check_choice("loading", settings.loading, RULES)
    flow.device(settings.device)
    for name in settings.baselines:
        check_choice("baselines", name, BASELINES)
    if "taught" in settings.baselines and not settings.recover_tokens:
        raise ValueError(
            "baselines: got taught with recover_tokens = 0, valid are 'scratch' and 'structured'"
        )
    if settings.output is not None:
        check_new_folder("output", settings.output)
    if settings.warm_start is not None:
        check_choice("warm_start", settings.warm_start, CRITERIA)
    step = settings.batch * settings.length
    if settings.mask_tokens < step:
        raise ValueError(f"mask_tokens: got {settings.mask_tokens:,}, one step takes {step:,}")
    flow.check_unfinished(settings, begin=False)


def load(settings: Settings, show: Quiet) -> tuple:
    """The parent on its device, and its tokenizer. A shape that is not for it is refused."""
    from effattn.errors import Unsupported
    from effattn.hf import anatomy
    from effattn.hf.placement import check_finite
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import active

    with show.stage("loading the model"):
        parent, tokenizer = load_model(settings.model, bos=settings.bos)
        parent.to(flow.device(settings.device))
        check_finite(parent)
        if active(parent) is not None:
            raise ValueError(
                f"model: {settings.model} is swapped; valid is a checkpoint with its own "
                "attention, shear first"
            )
        smaller = settings.target.of(anatomy.of(parent))
        if set(settings.baselines) - {"scratch"} and "hidden" in smaller:
            raise Unsupported(
                "baselines: one-shot structured pruning cuts heads, ffn and layers, not hidden; "
                "valid with hidden is scratch"
            )
    return parent, tokenizer


def read(settings: Settings, show: Quiet, parent, tokenizer) -> tuple[DomainText, Domains]:
    """The text by domain, held-out text of all of them, and windows of the first."""
    from effattn.hf.beginning import bos_of, end_of
    from effattn.prune.shearing.batch_loading import Domains
    from effattn.prune.shearing.data import domain_text

    with show.stage("reading text"):
        text = domain_text(
            tokenizer,
            train=settings.all_tokens,
            evaluation=settings.evaluation_tokens,
            domains=settings.domains,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        ends = {"bos": bos_of(parent), "end": end_of(parent)}
        return text, Domains(text.train, settings.length, proportions=text.proportions, **ends)


# Training
# -------------------------------------------------------------------------------------------------


def in_common(settings: Settings, parent) -> dict[str, object]:
    """What every training is given."""
    return {
        "batch": settings.batch,
        "loading": settings.loading,
        "seed": settings.seed,
        "overrides": {"use_cpu": parent.device.type == "cpu"} | settings.overrides,
    }


def learn(settings: Settings, show: Quiet, parent, domains: Domains) -> tuple:
    """The small model, cut from a copy of the parent, and what the training of its masks says."""
    from effattn.prune.shearing.mask_stage import learn_masks

    with show.stage(f"learning masks on {settings.mask_tokens:,} tokens") as progress:
        return learn_masks(
            copy.deepcopy(parent),
            settings.target,
            domains,
            tokens=settings.mask_tokens,
            folder=settings.partial / "masks",
            lr=settings.lr,
            mask_lr=settings.mask_lr,
            multiplier_lr=settings.multiplier_lr,
            warm_start=settings.warm_start,
            start=settings.start,
            ramp=settings.ramp,
            distill=settings.distill,
            compensate=settings.compensate,
            progress=progress,
            **in_common(settings, parent),
        )


def compete(
    settings: Settings,
    show: Quiet,
    parent,
    small,
    text: DomainText,
    trained: Callable[..., dict],
    measured: Callable[..., dict | None],
) -> dict[str, dict]:
    """ "scratch": the same shape from random weights; "structured": cut at once by the criterion
    that ranks the masks at the start, Taylor's if none does, and compensated. Both then get all
    tokens of the stages as continued training. "taught": the second, but the tokens of the first
    two stages teach it the parent's predictions. Each is {"cut", "continued", "training",
    "parameters", "criterion"}, the last by axis."""
    from effattn.prune.shearing.baselines import cut_at_once, from_scratch, joined
    from effattn.prune.shearing.ranking import ranked_by
    from effattn.prune.shearing.rates import scratch_lr

    wanted = {axis: size for axis, size in asdict(settings.target).items() if size is not None}
    criterion = ranked_by(settings.warm_start or "taylor", wanted)
    lr = settings.scratch_lr or scratch_lr(small.get_input_embeddings().weight.shape[1])
    taught = settings.mask_tokens + settings.recover_tokens
    # name -> its trainings: (kind, tokens, peak learning rate, teacher)
    plans = {
        "scratch": [("text", settings.all_tokens, lr, None)],
        "structured": [("text", settings.all_tokens, settings.continue_lr, None)],
        "taught": [
            ("teacher", taught, settings.recover_lr, parent),
            ("text", settings.continue_tokens, settings.continue_lr, None),
        ],
    }
    found: dict[str, dict] = {}
    for name in [name for name in plans if name in settings.baselines]:
        said, random = f"baseline: {name}", name == "scratch"
        with show.stage(said) as progress:
            if random:
                model = from_scratch(small, settings.seed)
            else:
                how = (criterion, text.train, settings.length, progress)
                model = cut_at_once(parent, wanted, *how)
        row = {"cut": measured(model)}
        for kind, budget, rate, teacher in plans[name]:
            if budget:
                told = trained(model, f"{name}_{kind}", said, budget, rate, teacher)
                row["training"] = joined(row.get("training"), told)
        row["criterion"] = None if random else criterion
        found[name] = row | {"continued": measured(model), "parameters": model.num_parameters()}
    return found


# The end
# -------------------------------------------------------------------------------------------------


def facts(settings: Settings, text: DomainText, parent) -> dict[str, object]:
    """What the report says beside what was done and measured."""
    from effattn import embedded
    from effattn.hf.source import resolve
    from effattn.hf.weight_files import file_bytes
    from effattn.resuming import as_json

    return {
        "settings": as_json(settings.told()) | {"source": text.source} | flow.fed(text, parent),
        "file_bytes": file_bytes(resolve(settings.model)),
        "pretraining_tokens": embedded.card()["train_tokens"]
        if settings.model == embedded.NAME
        else None,
    }


def save(settings: Settings, show: Quiet, small, tokenizer, ids: torch.Tensor, report) -> None:
    """Writes the small model and, last, the report. ids: (T,) int64 to compare logits on."""
    from effattn.hf.weight_files import file_bytes

    with flow.saving(settings, show, report, plain=True) as folder:
        report.data["verification"] = flow.save_plain(folder, small, tokenizer, ids)
        report.data["size"]["after"]["file_bytes"] = file_bytes(folder)


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
