"""The whole job behind `recipes/extend_context.py`: every rule on the same long texts, and what is
found far back.

Each rule reads the same tokens in windows of every length, so that a longer window differs in
nothing but what it can see; the same text repeated, so that copying from far back pays; and prompts
whose answer lies far back. Every finished part is kept beside the output: the same command goes on
from there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import Unsupported, check_choice
from effattn.evaluate.curve import scores, token_scores
from effattn.evaluate.passkey_retrieval import STYLES
from effattn.evaluate.retrieval import DEPTHS
from effattn.extending import copying, texts
from effattn.extending.article_report import ArticleReport
from effattn.extending.rules import Rule, chosen, rules
from effattn.hf import anatomy
from effattn.outputs import check_file, claim_all, sweep
from effattn.profiling.environment import environment
from effattn.recipes.jobs import Quiet, device
from effattn.reports.files import numbers
from effattn.surgery.checkpoint import load_model
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active

CURVE = 8  # buckets of a loss curve in each trained length
AUTO = "auto"


@dataclass
class Job(Checked):
    """The settings of one run. A run is resumed only with the same ones.

    rules: names of `effattn.extending.rules.rules`, or what comes before their dash; none: all.
    lengths: windows, each dividing the longest, the trained length among them (None: 1, 4 and 8
    times that). period: tokens after which the repeated text repeats (None: one and a half trained
    lengths, further back than any window here). retrieval: "recall", "passkey", "auto" (what the
    model does best within its trained length) or "none"; retrieval_length: tokens of a prompt
    (None: the middle one of the lengths)."""

    model: str = embedded.NAME
    rules: Sequence[str] = ()
    logn: bool = True
    lengths: Sequence[int] | None = whole(None, least=1, unit="tokens")
    sequences: int = whole(8, least=1)
    period: int | None = whole(None, least=1)
    retrieval: str = AUTO
    retrieval_length: int | None = whole(None, least=1)
    retrieval_trials: int = whole(4, least=1)
    retrieval_depths: Sequence[float] = real(DEPTHS, least=0, most=1)
    retrieval_style: str | None = None
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    output: Path | None = None
    json: Path | None = None
    seed: int = random_seed()
    device: str = "auto"

    @property
    def partial(self) -> Path | None:
        """Where finished parts are kept while it runs; None when nothing is written at all."""
        from effattn.measuring.progress import partial_beside

        target = self.output or self.json
        return None if target is None else partial_beside(Path(target))


def run(job: Job, show: Quiet | None = None) -> ArticleReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input) and OSError (disk), each before anything is measured.
    """
    check_job(job)
    with claim_all({"output": job.output, "json": job.json}):
        return _run(job, show or Quiet())


def _run(job: Job, show: Quiet) -> ArticleReport:
    from effattn.quant.sensitivity.parts import Parts

    with show.stage("loading the model"):
        model, tokenizer = load_model(job.model)
        model.to(device(job.device))
        trained = trained_length(model, job.model)
        lengths = check_lengths(job, trained)
        longest, period = lengths[-1], job.period or 3 * trained // 2
        wanted = chosen(rules(trained, longest), job.rules, job.logn)
        for rule in wanted:  # what the model cannot have is said before anything is measured
            with rule.on(model):
                pass
    with show.stage("reading text"):
        found, source = texts.documents(job.text, job.dataset, job.column)
        sequences = texts.long_sequences(found, tokenizer, job.sequences, longest)
        style = job.retrieval_style or ("code" if str(job.model) == embedded.NAME else "text")
    kept = Parts(job.partial, _settings(job, lengths, period), _machine(model), "extend-context")
    with show.stage("has the model learned to copy?") as progress:
        copy = kept.once("copy", lambda: copying.copy_check(model, sequences, trained, progress))
    within = {}
    if job.retrieval != "none":
        tasks = copying.TASKS if job.retrieval == AUTO else (job.retrieval,)
        for task in tasks:
            with show.stage(f"{task} within {trained} tokens") as progress:
                within[task] = kept.once(
                    f"within/{task}",
                    lambda task=task, progress=progress: copying.ask(
                        task,
                        model,
                        tokenizer,
                        3 * trained // 4,
                        job.retrieval_depths,
                        2 * job.retrieval_trials,
                        style,
                        job.seed,
                        progress,
                    ),
                )
    task, learned = copying.best_task(within) if within else (None, False)
    at = job.retrieval_length or lengths[len(lengths) // 2]
    rows = []
    for number, rule in enumerate(wanted):
        told = f"{rule.name} ({number + 1} of {len(wanted)})"
        with show.stage(f"texts: {told}") as progress:
            row = kept.once(
                f"texts/{rule.name}",
                lambda rule=rule, progress=progress: measured(
                    rule, model, sequences, lengths, period, trained, progress
                ),
            )
        answers = None
        if task is not None and not rule.logn:
            with show.stage(f"{task}: {told}") as progress, rule.on(model):
                answers = kept.once(
                    f"{task}/{rule.name}",
                    lambda progress=progress: copying.ask(
                        task,
                        model,
                        tokenizer,
                        at,
                        job.retrieval_depths,
                        job.retrieval_trials,
                        style,
                        job.seed,
                        progress,
                    ),
                )
        rows.append(row | {"retrieval": answers})
    told = describe(model)
    report = ArticleReport(
        numbers(
            {
                "kind": "extend_context",
                "settings": _settings(job, lengths, period)
                | {"source": source, "retrieval_length": at, "style": style},
                "model": {
                    "class": told.model,
                    "dtype": told.dtype,
                    "device": str(model.device),
                    "layers": len(told.layers),
                    "parameters": told.parameters["total"],
                    "trained_length": trained,
                },
                "copy": copy,
                "task": task,
                "task_learned": learned,
                "within": within,
                "rules": rows,
                "environment": environment(),
            }
        )
    )
    if job.output is not None:
        report.save(job.output)
    if job.json is not None:
        report.save_json(job.json)
    kept.discard()
    return report


def measured(
    rule: Rule, model, sequences, lengths, period: int, trained: int, progress=None
) -> dict:
    """One rule's row: {"name", "axes", "kind", "logn", "seconds", "natural", "repeated", "curves"}.

    natural: the same tokens in windows of every length. repeated: the first tokens of the repeated
    text at every length, and under "copies" those behind the first copy. Each a dict of a length,
    cross_entropy, perplexity and accuracy."""
    again, longest, start = texts.repeated(sequences, period), lengths[-1], time.perf_counter()
    steps, done = len(lengths) + (len(lengths) if rule.varies else 1), 0

    def read(tokens):
        nonlocal done
        found = token_scores(model, tokens, batch=max(1, longest // (tokens.shape[1] - 1)))
        done += 1
        if progress:
            progress(done, steps)
        return found

    natural, copies, curves = [], [], {}
    with rule.on(model):
        for length in lengths:
            nats, right = read(texts.windows(sequences, length))
            natural.append({"length": length, **scores(nats, right)})
        curves["natural"] = _curve(nats, right, trained)
        whole = {longest: read(again)}
        curves["repeated"] = _curve(*whole[longest], trained)
        for length in lengths:
            if rule.varies and length < longest:
                nats, right = read(again[:, : length + 1])
            else:  # what comes later changes nothing before
                nats, right = (one[:, :length] for one in whole[longest])
            behind = scores(nats[:, period:], right[:, period:]) if length > period else None
            copies.append({"length": length, **scores(nats, right), "copies": behind})
    return {
        "name": rule.name,
        "axes": rule.axes,
        "kind": rule.kind,
        "logn": rule.logn,
        "seconds": time.perf_counter() - start,
        "natural": natural,
        "repeated": copies,
        "curves": curves,
    }


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    device(job.device)
    check_choice("retrieval", job.retrieval, (*copying.TASKS, AUTO, "none"))
    if job.retrieval_style is not None:
        check_choice("retrieval_style", job.retrieval_style, STYLES)
    if job.text and job.dataset:
        raise ValueError(
            "text and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )
    for argument, file in (
        ("output", job.output and Path(job.output) / "report.json"),
        ("json", job.json),
    ):
        if file is not None:
            check_file(argument, file)
    if (
        job.output is not None
        and (Path(job.output) / "report.json").exists()
        and not job.partial.exists()
    ):
        sweep(job.output)  # the run that wrote it may have been killed at its very end
        raise ValueError(f"output: {job.output} holds a finished report; give a new folder")


def check_lengths(job: Job, trained: int) -> list[int]:
    """The lengths of the windows, ascending. ValueError for those that cannot be compared."""
    lengths = sorted(set(job.lengths or (trained, 4 * trained, 8 * trained)))
    longest = lengths[-1]
    for length in lengths:
        if length < 16 or longest % length:
            raise ValueError(
                f"lengths: got {length}, valid is 16 or more tokens, and what divides the longest "
                f"({longest}), so that the same tokens are read at every length"
            )
    if trained not in lengths or longest == trained:
        raise ValueError(
            f"lengths: got {lengths}, valid are the trained length ({trained}) and longer ones"
        )
    period = job.period or 3 * trained // 2
    if period >= longest:
        raise ValueError(f"period: got {period}, valid is less than the longest length ({longest})")
    return lengths


def trained_length(model, name: str) -> int:
    """The tokens that the model was trained with. Unsupported for models without plain rotary
    positions.
    """
    parts = anatomy.of(model)
    if active(model) is not None:
        raise Unsupported(
            f"model: {name} is swapped already; valid is a checkpoint with its own attention"
        )
    if not parts.causal or not any(layer.rotary_dims for layer in parts.layers):
        raise Unsupported(
            f"model: {type(model).__name__} has no rotary positions to change; valid is a causal "
            "model "
            "with them, such as 'embedded'"
        )
    return int(parts.config.max_position_embeddings)


def _curve(nats: torch.Tensor, right: torch.Tensor, trained: int) -> list[dict]:
    """Rows of `by_position`, `CURVE` in each trained length."""
    size = max(1, trained // CURVE)
    return [
        {
            "first": at,
            "last": min(at + size, nats.shape[1]),
            **scores(nats[:, at : at + size], right[:, at : at + size]),
        }
        for at in range(0, nats.shape[1], size)
    ]


def _settings(job: Job, lengths: list[int], period: int) -> dict:
    own = {
        key: value
        for key, value in asdict(job).items()
        if key not in ("output", "json", "device", "rules", "logn")
    }
    return own | {
        "model": str(job.model),
        "lengths": lengths,
        "period": period,
        "text": [str(one) for one in job.text],
    }


def _machine(model) -> dict:
    """What else must be the same for parts of two runs to stand in one report."""
    here = environment()
    return {"on": model.device.type} | {
        key: here[key] for key in ("device", "torch", "transformers")
    }
