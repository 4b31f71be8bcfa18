"""The whole job behind `recipes/quantize_kv.py` and `effattn quantize-kv`.

Load, measure every format token by token, measure each layer alone, choose a plan under the budget
and measure that, retrieval, bytes, speed; with an output, save a checkpoint with its cache, load it
again, compare, and only then give the folder its name. Every finished part is kept beside the
output: the same command goes on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import effattn.evaluate
from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import Unsupported, check_choice
from effattn.evaluate.passkey_retrieval import STYLES
from effattn.evaluate.retrieval import DEPTHS
from effattn.hf import anatomy
from effattn.hf.weights import packing, weight_bytes
from effattn.measuring.progress import partial_beside
from effattn.outputs import atomic_folder, check_new_folder
from effattn.profiling.environment import environment
from effattn.quant.formats import BITS, Format
from effattn.quant.sensitivity import budget, lanes
from effattn.quant.sensitivity.lanes import FULL, PLAN, Lane
from effattn.quant.sensitivity.parts import Parts
from effattn.quant.sensitivity.report import QuantizeReport
from effattn.quant.sensitivity.tokenwise import tokenwise, windows
from effattn.quant.weights import KINDS, quantize_weights
from effattn.recipes.jobs import Quiet, device, holds_output
from effattn.specs import parse_spec
from effattn.surgery.checkpoint import load_again, load_model, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, swap
from effattn.textdata import streams

MOST_RETRIEVAL = 4096  # tokens of a retrieval prompt, by default at most


@dataclass
class Job(Checked):
    """The settings of one run. A run is resumed only with the same ones.

    formats: cache specs; without any, `bits` with their default options. budget: bytes a token of
    all layers together that a plan may take; without one no plan is made. weights: "nf4" or "int8"
    to quantize those too, before anything is measured. retrieval_length: tokens of a prompt (None:
    three quarters of what the model was made for)."""

    model: str = embedded.NAME
    bits: Sequence[int] = (8, 4, 2)
    formats: Sequence[str] = ()
    budget: float | None = real(None, above=0)
    output: Path | None = None
    weights: str | None = None
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    evaluation_tokens: int = whole(8192, least=1)
    sensitivity_tokens: int = whole(2048, least=1)
    length: int = whole(512, least=1)
    batch: int = whole(16, least=1)
    retrieval_length: int | None = whole(None, least=1)
    retrieval_trials: int = whole(8, least=0)
    retrieval_depths: Sequence[float] = real(DEPTHS, least=0, most=1)
    retrieval_style: str | None = None
    decode_contexts: Sequence[int] = whole((512, 4096), least=1)
    decode_batches: Sequence[int] = whole((1, 4), least=1)
    decode_steps: int = whole(32, least=1)
    decode_seconds: float = real(10.0, above=0)
    seed: int = random_seed()
    device: str = "auto"

    @property
    def partial(self) -> Path | None:
        """Where finished parts are kept while it runs; None when nothing is written at all."""
        return None if self.output is None else partial_beside(Path(self.output))

    @property
    def settings(self) -> dict:
        """What a run must have in common with the one that it goes on from."""
        own = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("output", "device", "bits")
        }
        own |= {
            "model": str(self.model),
            "formats": self.specs,
            "text": [str(path) for path in self.text],
        }
        return json.loads(json.dumps(own, default=str))

    @property
    def specs(self) -> list[str]:
        """The formats to measure, each once."""
        return list(dict.fromkeys(self.formats or [BITS[bits] for bits in self.bits]))


@holds_output(QuantizeReport)
def run(job: Job, show: Quiet | None = None) -> QuantizeReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    The checkpoint in the output has the plan's cache; without a budget the only format's; of
    several formats without a budget none is saved. Raises ValueError (bad settings or input, an
    impossible budget), RuntimeError (the checkpoint computes something else) and OSError (disk),
    each before anything appears under the output's name."""
    show = show or Quiet()
    check_job(job)
    with show.stage("loading the model"):
        model, tokenizer = load_model(job.model)
        model.to(device(job.device))
        if active(model) is not None:
            raise Unsupported(
                f"model: {job.model} is swapped already; valid is a checkpoint with its own "
                "attention"
            )
        if job.weights is not None:
            quantize_weights(model, job.weights)
        parts = anatomy.of(model)
        made = [lane.of(model) for lane in (Lane(FULL), *(Lane(spec, spec) for spec in job.specs))]
        # raises where a format does not fit
        sizes = {lane.name: _sizes(lane, parts) for lane in made}
        if job.budget is not None:
            budget.check_budget(job.budget, sum(map(min, zip(*sizes.values(), strict=True))))
        style = job.retrieval_style or ("code" if str(job.model) == embedded.NAME else "text")
        at = job.retrieval_length or min(3 * _made_for(parts) // 4, MOST_RETRIEVAL)
    with show.stage("reading text"):
        data = streams(
            tokenizer,
            train=1,
            evaluation=job.evaluation_tokens + 1,
            text=job.text,
            dataset=job.dataset,
            column=job.column,
        )
        windows(data.evaluation, job.length)
        for lane in made:  # what a model cannot do is said before anything is measured
            lanes.prefilled(lane.model, data.evaluation[None, :8].to(model.device))
    kept = Parts(job.partial, job.settings, _machine(model))
    full = made[0].model
    rows = [_measured(job, kept, show, full, lane, parts, data.evaluation) for lane in made]
    alone = _sensitivity(job, kept, show, full, parts, data.evaluation)
    plan, front = None, _frontier(sizes, alone, len(parts.layers))
    if job.budget is not None:
        chosen = budget.best(front, job.budget)
        plan = {
            "budget": job.budget,
            "specs": list(chosen.specs),
            "cache": budget.as_swap(chosen.specs),
            "bytes_per_token": chosen.bytes,
            "kl": chosen.kl,
        }
        made.append(Lane(PLAN, plan["cache"]).of(model))
        rows.append(_measured(job, kept, show, full, made[-1], parts, data.evaluation))
    retrieval = (
        _retrieval(job, kept, show, made, tokenizer, at, style) if job.retrieval_trials else []
    )
    decode = []
    for context in job.decode_contexts:
        with show.stage(f"timing decode steps after {context:,} tokens") as progress:
            decode += kept.once(
                f"decode/{context}",
                lambda context=context, progress=progress: lanes.decode_speed(
                    made,
                    context,
                    job.decode_batches,
                    seconds=job.decode_seconds,
                    steps=job.decode_steps,
                    seed=job.seed,
                    progress=progress,
                ),
            )
    told = describe(model)
    report = QuantizeReport(
        {
            "kind": "quantize_kv",
            "settings": job.settings
            | {"source": data.source, "retrieval_length": at, "retrieval_style": style},
            "model": {
                "class": told.model,
                "dtype": told.dtype,
                "device": str(model.device),
                "layers": len(parts.layers),
                "heads": parts.heads,
                "kv_heads": parts.kv_heads,
                "head_dim": parts.head_dim,
                "parameters": told.parameters["total"],
                "weights": packing(parts.layers[0].q.module) or told.dtype,
                "weight_bytes": weight_bytes(model),
                "kv_bytes_per_token": told.kv_bytes_per_token,
                "trained_length": _made_for(parts),
            },
            "formats": rows,
            "sensitivity": alone,
            "plan": plan,
            "frontier": [{"bytes_per_token": one.bytes, "kl": one.kl} for one in front],
            "retrieval": retrieval,
            "decode": decode,
            "saved": None,
            "verification": None,
            "environment": environment(),
        }
    )
    if job.output is not None:
        with show.stage("saving, and loading again"), atomic_folder(job.output) as folder:
            report.data["saved"] = (
                plan["cache"] if plan else job.specs[0] if len(job.specs) == 1 else None
            )
            if report.data["saved"] is not None:
                swap(model, cache=report.data["saved"])
                save(model, folder, tokenizer)
                report.data["verification"] = _verify(
                    folder, model, data.evaluation[: min(256, job.length)]
                )
            report.save(folder)
    kept.discard()
    return report


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    device(job.device)
    for bits in job.bits:
        check_choice("bits", str(bits), list(map(str, BITS)))
    if not job.specs:
        raise ValueError("formats: got none, valid is for example 'int4(group=64, residual=128)'")
    for spec in job.specs:
        if parse_spec(spec)[0] == FULL:
            raise ValueError("formats: got 'full', which is measured beside the others in any case")
        Format.parse(spec)
    if job.weights is not None:
        check_choice("weights", job.weights, KINDS)
    if job.retrieval_style is not None:
        check_choice("retrieval_style", job.retrieval_style, STYLES)
    if job.text and job.dataset:
        raise ValueError(
            "text and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )
    for name in ("evaluation_tokens", "sensitivity_tokens"):
        if getattr(job, name) < job.length:
            raise ValueError(
                f"{name}: got {getattr(job, name)}, valid is at least length ({job.length}): one "
                "window"
            )
    if job.sensitivity_tokens > job.evaluation_tokens:
        raise ValueError(
            f"sensitivity_tokens: got {job.sensitivity_tokens}, valid is at most evaluation_tokens "
            f"({job.evaluation_tokens}): the same text"
        )
    if job.output is not None:
        check_new_folder("output", job.output)


# The parts
# -------------------------------------------------------------------------------------------------


def _measured(
    job: Job, kept: Parts, show: Quiet, full, lane: Lane, parts, tokens: torch.Tensor
) -> dict:
    """One lane's row: its cache, bytes, and quality token by token."""
    with show.stage(f"token by token: {lane.name}") as progress:
        quality = kept.once(
            f"quality/{lane.name}/{lane.cache}",
            lambda: tokenwise(
                full, lane.model, tokens, job.length, batch=job.batch, progress=progress
            ),
        )
    formats = lane.formats(parts)
    counts = [
        job.length,
        job.length + 2 * max((one.flush for one in formats if one is not None), default=128),
    ]
    held = kept.once(
        f"bytes/{lane.name}/{lane.cache}", lambda: lanes.allocated(lane, counts, job.seed)
    )
    return {
        "name": lane.name,
        "cache": lane.cache,
        "quality": quality,
        "adapted": lanes.adapted(parts, lane.cache) if isinstance(lane.cache, str) else "",
        "bytes_per_token": sum(_sizes(lane, parts)),
        "held": held,
        "memory": [
            {"context": n, "bytes": lanes.predicted_bytes(parts, formats, n)}
            for n in (4096, 32768, 131072)
        ],
    }


def _sensitivity(
    job: Job, kept: Parts, show: Quiet, full, parts, tokens: torch.Tensor
) -> list[dict]:
    """Each format in each layer alone: {layer, spec, kl, perplexity, agreement}."""
    rows, tokens = [], tokens[: job.sensitivity_tokens + 1]
    for layer in parts.layers:
        for spec in job.specs:
            with show.stage(f"layer {layer.index} alone: {spec}") as progress:
                lane = Lane(spec, {str(layer.index): spec}).of(full)
                found = kept.once(
                    f"layer/{layer.index}/{spec}",
                    lambda lane=lane, progress=progress: tokenwise(
                        full, lane.model, tokens, job.length, batch=job.batch, progress=progress
                    ),
                )
            rows.append(
                {"layer": layer.index, "spec": spec}
                | {key: found[key] for key in ("kl", "perplexity", "agreement")}
            )
    return rows


def _retrieval(
    job: Job, kept: Parts, show: Quiet, made: list[Lane], tokenizer, length: int, style: str
) -> list[dict]:
    """Both tasks for every lane: the dicts of `effattn.evaluate`, with the lane's name and how many
    tokens of a prompt are packed at its end. A task whose prompt does not fit, or that the
    tokenizer has no words for, is a row that says why."""
    parts = anatomy.of(made[0].model)
    tasks = {
        "passkey": lambda model, progress: effattn.evaluate.passkey(
            model,
            tokenizer,
            length,
            job.retrieval_depths,
            trials=job.retrieval_trials,
            style=style,
            seed=job.seed,
            progress=progress,
        ),
        "associative recall": lambda model, progress: effattn.evaluate.associative_recall(
            model,
            tokenizer,
            length,
            job.retrieval_depths,
            trials=job.retrieval_trials,
            seed=job.seed,
            progress=progress,
        ),
    }
    rows = []
    for task, ask in tasks.items():
        for lane in made:
            with show.stage(f"{task}: {lane.name}") as progress:
                found = kept.once(
                    f"{task}/{lane.name}/{lane.cache}",
                    lambda ask=ask, lane=lane, progress=progress: _asked(ask, lane.model, progress),
                )
            packed = max(
                (one.held(length)[1] for one in lane.formats(parts) if one is not None), default=0
            )
            rows.append({"lane": lane.name, "task": task, "packed": packed} | found)
    return rows


def _asked(ask, model, progress) -> dict:
    try:
        return ask(model, progress)
    except ValueError as error:
        return {"rows": [], "reason": str(error)}


def _frontier(sizes: dict[str, list[float]], alone: list[dict], layers: int) -> list[budget.Plan]:
    """The plans that no other beats; full precision, which harms nothing, is a choice in every
    layer.
    """
    harm = {(row["layer"], row["spec"]): row["kl"] for row in alone}
    choices = [
        [
            budget.Choice(spec, size[index], max(0.0, harm.get((index, spec), 0.0)))
            for spec, size in sizes.items()
        ]
        for index in range(layers)
    ]
    return budget.frontier(choices)


def _sizes(lane: Lane, parts: anatomy.Anatomy) -> list[float]:
    """Bytes of a packed token in each layer."""
    pairs = zip(parts.layers, lane.formats(parts), strict=True)
    return [lanes.bytes_per_token(layer, format) for layer, format in pairs]


def _made_for(parts: anatomy.Anatomy) -> int:
    return getattr(parts.config, "max_position_embeddings", None) or 2048


def _machine(model) -> dict:
    """What else must be the same for parts of two runs to stand in one report."""
    here = environment()
    return {"on": model.device.type} | {
        key: here[key] for key in ("device", "threads", "torch", "transformers")
    }


@torch.no_grad()
def _verify(folder: Path, model, tokens: torch.Tensor) -> dict:
    """What loading the checkpoint again shows: its logits without a cache and, in steps, with the
    quantized one. RuntimeError when they differ."""
    again, found = load_again(folder, model, tokens)
    ids = tokens[None].to(model.device)
    ours, theirs = (
        torch.cat(
            [
                one(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in ids.split(16, dim=1)
            ],
            dim=1,
        )
        for one, cache in ((one, lanes.new_cache(one)) for one in (model, again))
    )
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * float(ours.abs().max()):
        raise RuntimeError(
            f"the saved checkpoint decodes otherwise (largest logit difference {difference:.3g})"
        )
    caches = [layer["cache"] for layer in describe(again).layers]
    return found | {"max_logit_difference_decoding": difference, "caches_after_loading": caches}
