"""The whole job behind `recipes/shear.py` and `effattn shear`.

Load, measure the parent, learn masks, cut, recover, train on, measure after each, save, prove in a
fresh process that plain transformers loads the result, and only then the folder gets its name.
`.<output>.partial` beside it keeps the checkpoints of every training; the same command goes on from
there. Baselines follow if asked for, with the same code, data and number of tokens: the same shape
from scratch, and one-shot structured pruning trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import Unsupported, check_choice
from effattn.evaluate.loss import compare, measure_parent
from effattn.hf import anatomy as hf
from effattn.hf.placement import check_finite
from effattn.hf.source import resolve
from effattn.hf.verify import verify_plain
from effattn.outputs import atomic_folder, check_new_folder
from effattn.profiling.cost import model_cost
from effattn.profiling.decode import decode_speed
from effattn.profiling.environment import environment
from effattn.profiling.timing import Clock, alternate, percentiles
from effattn.prune.shearing import rates
from effattn.prune.shearing.batch_loading import RULES, Domains
from effattn.prune.shearing.data import DomainText, domain_text
from effattn.prune.shearing.mask_stage import MASK_TOKENS, WARM_START, learn_masks
from effattn.prune.shearing.masks import START
from effattn.prune.shearing.ranking import WINDOWS, ranked_by
from effattn.prune.shearing.rates import RAMP
from effattn.prune.shearing.report import BASELINES, ShearReport
from effattn.prune.shearing.sheared import CONTINUE_TOKENS, RECOVER_TOKENS, continue_training
from effattn.prune.shearing.target import Target
from effattn.prune.structural.criteria import CRITERIA
from effattn.recipes.jobs import (
    Quiet,
    check_partial,
    device,
    discard,
    holds_output,
    main_process,
    partial_folder,
)
from effattn.surgery.checkpoint import load_model
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active

DEFAULT = "runs/shear"  # where a run without an output trains
SPEED_SECONDS = 2.0  # how long each model's reading speed is measured


@dataclass
class Job(Checked):
    """The settings of one run. A run is resumed only with the same ones."""

    model: str = embedded.NAME
    output: Path | None = None
    hidden: int | None = whole(None, least=1)
    heads: int | None = whole(None, least=1)
    ffn: int | None = whole(None, least=1)
    layers: int | None = whole(None, least=1)
    domains: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    mask_tokens: int = whole(MASK_TOKENS, least=1)
    recover_tokens: int = whole(RECOVER_TOKENS, least=0)
    continue_tokens: int = whole(CONTINUE_TOKENS, least=0)
    evaluation_tokens: int = whole(32_768, least=16)
    length: int = whole(512, least=8)
    batch: int = whole(4, least=1)
    lr: float | None = real(None, above=0)
    recover_lr: float | None = real(None, above=0)
    continue_lr: float | None = real(None, above=0)
    mask_lr: float | None = real(None, above=0)
    multiplier_lr: float | None = real(None, above=0)
    warm_start: str | None = WARM_START
    start: float = real(START)
    ramp: float = real(RAMP, least=0, most=1)
    distill: bool = True
    compensate: bool = True
    loading: str = "clamped"
    baselines: Sequence[str] = ()  # of `BASELINES`
    scratch_lr: float | None = real(None, above=0)
    decode_contexts: Sequence[int] = whole((512, 4096), least=1)
    seed: int = random_seed()
    device: str = "auto"
    overrides: dict = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """The shape that was asked for."""
        return Target(self.hidden, self.heads, self.ffn, self.layers)

    @property
    def tokens(self) -> int:
        """Of all stages: what a baseline gets in one."""
        return self.mask_tokens + self.recover_tokens + self.continue_tokens

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return partial_folder(self.output or DEFAULT)


@holds_output(ShearReport, DEFAULT)
def run(job: Job, show: Quiet | None = None) -> ShearReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, OSError (disk), each before
    anything appears under the output's name. Under torchrun or `accelerate launch` every process
    calls it; rank 0 measures and writes."""
    show, main = show or Quiet(), main_process()
    check_job(job)
    with show.stage("loading the model"):
        parent, tokenizer = load_model(job.model)
        parent.to(device(job.device))
        check_finite(parent)
        if active(parent) is not None:
            raise ValueError(
                f"model: {job.model} is swapped; valid is a checkpoint with its own attention, "
                "shear first"
            )
        smaller = job.target.of(hf.of(parent))
        if set(job.baselines) - {"scratch"} and "hidden" in smaller:
            raise Unsupported(
                "baselines: one-shot structured pruning cuts heads, ffn and layers, not hidden; "
                "valid "
                "with hidden is scratch"
            )
    with show.stage("reading text"):
        data = domain_text(
            tokenizer,
            train=job.tokens,
            evaluation=job.evaluation_tokens,
            domains=job.domains,
            dataset=job.dataset,
            column=job.column,
        )
        domains = Domains(data.train, job.length, proportions=data.proportions)
    check_partial(job, main)
    length = min(job.length, len(data.evaluation) - 1)
    quality, facts = {}, {}
    if main:
        with show.stage("measuring the parent") as progress:
            quality = measure_parent(parent, data, length, progress)

    def measured(model) -> dict | None:
        if not main:
            return None
        with show.stage("measuring") as progress:
            return compare(parent, model, data.evaluation, length, progress=progress)

    overrides = {"use_cpu": parent.device.type == "cpu"} | job.overrides
    shared = dict(batch=job.batch, loading=job.loading, seed=job.seed, overrides=overrides)
    with show.stage(f"learning masks on {job.mask_tokens:,} tokens") as progress:
        small, facts["masks"] = learn_masks(
            copy.deepcopy(parent),
            job.target,
            domains,
            tokens=job.mask_tokens,
            folder=job.partial / "masks",
            lr=job.lr,
            mask_lr=job.mask_lr,
            multiplier_lr=job.multiplier_lr,
            warm_start=job.warm_start,
            start=job.start,
            ramp=job.ramp,
            distill=job.distill,
            compensate=job.compensate,
            progress=progress,
            **shared,
        )
    quality["cut"] = measured(small)
    references = torch.tensor(facts["masks"]["references"], dtype=torch.float64)
    for name, said, tokens, lr, teacher in (
        (
            "recovered",
            "learning the parent's predictions",
            job.recover_tokens,
            job.recover_lr,
            parent,
        ),
        ("continued", "training on", job.continue_tokens, job.continue_lr, None),
    ):
        if tokens:
            with show.stage(f"{said}, {tokens:,} tokens") as progress:
                facts[name] = continue_training(
                    small,
                    domains,
                    references,
                    tokens=tokens,
                    folder=job.partial / name,
                    lr=lr,
                    teacher=teacher,
                    progress=progress,
                    **shared,
                )
            quality[name] = measured(small)
    baselines = _baselines(job, parent, small, data, domains, references, shared, measured, show)
    report = ShearReport(
        {
            "kind": "shear",
            "settings": json.loads(json.dumps(asdict(job), default=str)) | {"source": data.source},
            "target": {
                axis: [size, smaller.get(axis, size)] for axis, size in _sizes(parent).items()
            },
            "model": {
                "class": type(parent).__name__,
                "dtype": str(parent.dtype).removeprefix("torch."),
            },
            "size": {"before": _size(parent, length), "after": _size(small, length)},
            "quality": quality,
            **facts,
            "baselines": baselines,
            "speed": [],
            "verification": None,
            "pretraining_tokens": embedded.card()["train_tokens"]
            if job.model == embedded.NAME
            else None,
            "environment": environment(),
        }
    )
    if main:
        report.data["size"]["before"]["file_bytes"] = _file_bytes(Path(resolve(job.model)))
        with show.stage("timing") as progress:
            report.data["speed"] = _speed(parent, small, job, length, progress)
    if main and job.output is not None:
        with (
            show.stage("saving, and loading again without effattn"),
            atomic_folder(job.output) as folder,
        ):
            small.config.use_cache = True
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            report.data["size"]["after"]["file_bytes"] = _file_bytes(folder)
            report.data["verification"] = verify_plain(
                folder, small, data.evaluation[: min(64, length)]
            )
            report.save(folder)
    if main:
        discard(job.partial)
    return report


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    check_choice("loading", job.loading, RULES)
    device(job.device)
    for name in job.baselines:
        check_choice("baselines", name, BASELINES)
    if "taught" in job.baselines and not job.recover_tokens:
        raise ValueError(
            "baselines: got taught with recover_tokens = 0, valid are 'scratch' and 'structured'"
        )
    if job.output is not None:
        check_new_folder("output", job.output)
    if job.warm_start is not None:
        check_choice("warm_start", job.warm_start, CRITERIA)
    if job.mask_tokens < job.batch * job.length:
        raise ValueError(
            f"mask_tokens: got {job.mask_tokens:,}, one step takes {job.batch * job.length:,}"
        )


def _baselines(
    job: Job, parent, small, data: DomainText, domains, references, shared, measured, show
) -> dict:
    """ "scratch": the same shape from random weights; "structured": cut at once by the criterion
    that ranks the masks at the start, Taylor's if none does, and compensated. Both then get all
    tokens of the stages as continued training. "taught": the second, but the tokens of the first
    two stages teach it the parent's predictions. Each is {"cut", "continued", "training",
    "parameters", "criterion"}, the last by axis."""
    from effattn.prune import structured

    wanted = {axis: size for axis, size in asdict(job.target).items() if size is not None}
    criterion = ranked_by(job.warm_start or "taylor", wanted)

    def random():
        torch.manual_seed(job.seed)
        made = AutoModelForCausalLM.from_config(copy.deepcopy(small.config), dtype=small.dtype)
        return made.to(small.device).eval()

    def one_shot():
        windows = -(-WINDOWS // len(data.train))
        calibration = torch.cat([tokens[: windows * job.length] for tokens in data.train.values()])
        return structured(parent, calibration, criterion=criterion, length=job.length, **wanted)[0]

    found, scratch_lr = (
        {},
        job.scratch_lr or rates.scratch_lr(small.get_input_embeddings().weight.shape[1]),
    )
    taught = ("teacher", job.mask_tokens + job.recover_tokens, job.recover_lr, parent)
    runs = {
        "scratch": (random, [("text", job.tokens, scratch_lr, None)]),
        "structured": (one_shot, [("text", job.tokens, job.continue_lr, None)]),
        "taught": (one_shot, [taught, ("text", job.continue_tokens, job.continue_lr, None)]),
    }
    for name, (make, stages) in runs.items():
        if name not in job.baselines:
            continue
        with show.stage(f"baseline: {name}"):
            model = make()
        row = {"cut": measured(model)}
        for kind, tokens, lr, teacher in stages:
            if tokens:
                with show.stage(f"baseline: {name}, {tokens:,} tokens") as progress:
                    facts = continue_training(
                        model,
                        domains,
                        references,
                        tokens=tokens,
                        folder=job.partial / f"{name}_{kind}",
                        lr=lr,
                        teacher=teacher,
                        progress=progress,
                        **shared,
                    )
                row["training"] = _joined(row.get("training"), facts)
        row["criterion"] = None if make is random else criterion
        found[name] = row | {"continued": measured(model), "parameters": model.num_parameters()}
    return found


def _joined(before: dict | None, facts: dict) -> dict:
    """Two stages' facts as one: tokens of both, and the record of one after the other."""
    if before is None:
        return facts
    later = [point | {"tokens": before["tokens"] + point["tokens"]} for point in facts["record"]]
    return facts | {
        "tokens": before["tokens"] + facts["tokens"],
        "record": before["record"] + later,
    }


def _sizes(model) -> dict[str, int]:
    from effattn.prune.shearing.masks import shapes

    return {axis: shape[-1] for axis, shape in shapes(hf.of(model)).items()}


def _size(model, length: int) -> dict:
    """What a model is made of, in numbers. FLOPs are those of a forward pass over a window with all
    its logits.
    """
    told = describe(model)
    flops = model_cost(model, 1, length, logits=length).total.flops / length
    layers = sum(told.parameters[part] for part in ("attention", "ffn", "norms"))
    return {
        "parameters": told.parameters["total"],
        "layer_parameters": layers,
        "file_bytes": None,
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "flops_per_token": flops,
    }


def _file_bytes(folder: Path) -> int | None:
    """Bytes of the weights in a checkpoint's folder; None for what lies elsewhere (a hub name)."""
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(file.stat().st_size for file in files) or None


@torch.no_grad()
def _speed(parent, small, job: Job, length: int, progress) -> list[dict]:
    """Tokens/s of both, in turns: reading a window, and decoding at each context."""
    models = {"before": parent, "after": small}
    ids = torch.zeros(1, length, dtype=torch.int64, device=parent.device)
    calls = {
        name: lambda model=model: model(input_ids=ids, use_cache=False)
        for name, model in models.items()
    }
    times = alternate(calls, Clock(parent.device), seconds=SPEED_SECONDS)
    rows = [
        {"what": f"reading {length} tokens"}
        | {name: length / percentiles(seconds)["p50"] for name, seconds in times.items()}
    ]
    if job.decode_contexts:
        by_context: dict[int, dict] = {}
        for row in decode_speed(models, list(job.decode_contexts), progress=progress):
            entry = by_context.setdefault(
                row["context"], {"what": f"decoding at {row['context']:,} tokens"}
            )
            entry[row["model"]] = row.get("tokens_per_s")
        rows += by_context.values()
    return rows
