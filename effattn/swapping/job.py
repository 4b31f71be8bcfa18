"""The whole job behind `recipes/swap_backend.py` and `effattn swap`.

Load, check that the model takes every pattern, measure the unchanged model, then each pattern after
a swap, undo it, and, with an output folder, save the swapped checkpoint, load it again, compare,
and only then give it its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.hf import anatomy
from effattn.hf.placement import device_of
from effattn.hf.weights import weight_bytes
from effattn.outputs import atomic_folder, check_new_folder, check_room
from effattn.profiling.environment import environment
from effattn.recipes.jobs import Quiet, device, holds_output
from effattn.specs import parse_layers
from effattn.surgery.checkpoint import load_again, load_model, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import restore, swap
from effattn.swapping import measure
from effattn.swapping.patterns import Pattern, label_of, parse_pattern, without_sinks
from effattn.swapping.report import SwapReport
from effattn.textdata import encode, read_dataset, read_files

BUCKETS = 40  # of a stream, about


@dataclass
class Job(Checked):
    """The settings of one run. `patterns`: specs, or dicts (also as JSON text) from layers to
    specs.
    """

    model: str = embedded.NAME
    patterns: Sequence[Pattern] = ("sliding(window=256, sinks=4)",)
    output: Path | None = None
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    # one to predict from
    contexts: Sequence[int] = whole((128, 256, 512, 1024, 2048, 4096), least=2, unit="tokens")
    evaluation_tokens: int = whole(4096, least=1)
    stream_tokens: int = whole(20_000, least=2)
    dense_stream_tokens: int = whole(4096, least=2)
    chunk: int = whole(128, least=1)
    prompt_tokens: int = whole(400, least=1)
    generate_tokens: int = whole(300, least=0)
    temperature: float = real(0.8, least=0)
    seed: int = random_seed()
    device: str = "auto"


@holds_output(SwapReport)
def run(job: Job, show: Quiet | None = None) -> SwapReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), RuntimeError (the saved checkpoint computes something
    else) and OSError (disk), each before anything appears under the output's name."""
    show = show or Quiet()
    patterns = check_job(job)
    with show.stage("loading the model"):
        model, tokenizer = load_model(job.model)
        # "before" is the model's own attention, also of a swapped checkpoint
        restore(model).to(device(job.device))
        parts = anatomy.of(model)
        trained = parts.trained_length
        _check_positions(job, parts, trained)
        if job.output is not None:
            check_room("output", job.output, weight_bytes(model))
        plan = _plan(parts, patterns)
    with show.stage("reading text"):
        tokens, source = _held_out(job, tokenizer)
        for _, _, pattern, _ in plan:
            _try(model, pattern, tokens[:32])
    limit = min(job.dense_stream_tokens, job.stream_tokens)
    edges = sorted(
        {0, *(n for n in (trained or 0, limit) if n < job.stream_tokens), job.stream_tokens}
    )
    bucket = -(-job.stream_tokens // BUCKETS)
    window = min(trained or measure.MOST_REFERENCE, measure.MOST_REFERENCE)
    middle = (len(tokens) - job.prompt_tokens) // 2  # text in full flow, not a file's first lines
    prompt = tokens[middle : middle + job.prompt_tokens]
    runs = []
    for label, role, pattern, shown in plan:
        length = limit if role == "before" else job.stream_tokens
        if pattern is not None:
            swap(model, pattern)
        found = {"label": label, "role": role, "pattern": shown}
        found["layers"] = [layer["pattern"] for layer in describe(model).layers]
        with show.stage(f"perplexity by context: {label}") as progress:
            found["contexts"] = measure.by_context(
                model, tokens, job.contexts, job.evaluation_tokens, progress
            )
        with show.stage(f"streaming {length:,} tokens: {label}") as progress:
            found["stream"] = measure.stream(
                model, tokens[: length + 1], job.chunk, edges, bucket, progress
            )
        if job.generate_tokens and role != "baseline":
            with show.stage(f"generating {job.generate_tokens:,} tokens: {label}"):
                found["text"] = measure.generate(
                    model,
                    tokenizer,
                    prompt,
                    job.generate_tokens,
                    job.temperature,
                    job.seed,
                    trained,
                )
        restore(model)
        runs.append(found)
    with show.stage(f"the reference: fresh windows of {window:,}") as progress:
        reference = measure.reference(
            model, tokens[: job.stream_tokens + 1], window, edges, bucket, progress
        )
    report = SwapReport(
        {
            "kind": "swap_backend",
            "settings": _settings(job, patterns, source),
            "model": _model_facts(model, parts, trained),
            "runs": runs,
            "reference": reference,
            "prompt": {"tokens": job.prompt_tokens, "text": measure.decode(tokenizer, prompt)},
            "verification": None,
            "environment": environment(),
        }
    )
    if job.output is not None:
        with show.stage("saving, and loading again"), atomic_folder(job.output) as folder:
            swap(model, patterns[0])
            save(model, folder, tokenizer)
            report.data["verification"] = _verify(folder, model, tokens[: 2 * job.chunk])
            report.save(folder)
    return report


def check_job(job: Job) -> list[Pattern]:
    """Everything that can be known to be wrong before a model is loaded; returns the patterns,
    parsed. ValueError.
    """
    if job.output is not None:
        check_new_folder("output", job.output)
    device(job.device)
    if job.text and job.dataset:
        raise ValueError(
            "text and dataset: got both, valid is one of them (or neither: the embedded corpus)"
        )
    patterns = list(map(parse_pattern, job.patterns))
    if not patterns:
        raise ValueError("pattern: got none, valid is for example 'sliding(window=256, sinks=4)'")
    return [one for index, one in enumerate(patterns) if one not in patterns[:index]]


def _plan(
    parts: anatomy.Anatomy, patterns: list[Pattern]
) -> list[tuple[str, str, Pattern | None, Pattern | None]]:
    """(label, role, what to swap in, what the report calls it): before, the user's patterns, and
    the baselines that make them readable."""
    full = all(layer.window is None for layer in parts.layers)
    plan = [("dense (before)" if full else "its own attention (before)", "before", None, None)]
    plan += [(label_of(one), "pattern", one, one) for one in patterns]
    for one in map(without_sinks, patterns):
        if one is not None and all(one != planned[2] for planned in plan):
            plan.append((label_of(one), "baseline", one, one))
    for _, _, pattern, _ in plan:
        if isinstance(pattern, dict):
            parse_layers(pattern, len(parts.layers))
    return plan


def _try(model, pattern: Pattern | None, tokens: torch.Tensor) -> None:
    """Swaps, runs a few tokens and undoes it: what a model or backend cannot do is said before
    anything is measured.
    """
    if pattern is None:
        return
    swap(model, pattern)
    try:
        measure.stream_losses(model, tokens, chunk=16)
    finally:
        restore(model)


def _check_positions(job: Job, parts: anatomy.Anatomy, trained: int | None) -> None:
    """A table of learned positions ends; rotary ones do not."""
    asked = {
        "contexts": max(job.contexts, default=0),
        "stream_tokens": job.stream_tokens,
        "prompt_tokens and generate_tokens": job.prompt_tokens + job.generate_tokens,
    }
    if parts.layers[0].family.rotary or trained is None:
        return
    for name, count in asked.items():
        if count > trained:
            raise ValueError(
                f"{name}: got {count:,}, {type(parts.model).__name__} has {trained:,} learned "
                "positions and cannot go "
                "further"
            )


def _held_out(job: Job, tokenizer) -> tuple[torch.Tensor, str]:
    """The text to measure on, and where it comes from. ValueError saying what is too long for it,
    and its length.
    """
    wanted = {
        "stream_tokens": job.stream_tokens + 1,
        "contexts and evaluation_tokens": measure.context_tokens(
            job.contexts, job.evaluation_tokens
        ),
        "prompt_tokens": job.prompt_tokens,
    }
    if job.text or job.dataset:
        documents = read_files(job.text) if job.text else read_dataset(job.dataset, job.column)
        source = ", ".join(map(str, job.text)) if job.text else f"dataset {job.dataset}"
    else:
        documents = (text for _, text in embedded.corpus.documents("validation"))
        source = "embedded corpus (Python standard library, validation files)"
    tokens = encode(documents, tokenizer, max(wanted.values()))
    for name, count in wanted.items():
        if count > len(tokens):
            raise ValueError(
                f"{name}: {count:,} tokens are needed, the held-out text has {len(tokens):,}; ask "
                "for less, or give "
                "more text"
            )
    return tokens, source


def _settings(job: Job, patterns: list[Pattern], source: str) -> dict:
    names = (
        "evaluation_tokens",
        "stream_tokens",
        "dense_stream_tokens",
        "chunk",
        "prompt_tokens",
        "generate_tokens",
        "temperature",
        "seed",
    )
    return {
        "model": str(job.model),
        "patterns": patterns,
        "text": source,
        "contexts": list(job.contexts),
        **{name: getattr(job, name) for name in names},
    }


def _model_facts(model, parts: anatomy.Anatomy, trained: int | None) -> dict:
    told = describe(model)
    return {
        "class": told.model,
        "dtype": told.dtype,
        "device": str(device_of(parts.layers[0].k.module)),
        "layers": len(parts.layers),
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "parameters": told.parameters["total"],
        "trained_length": trained,
        "kv_bytes_per_token": told.kv_bytes_per_token,
    }


def _verify(folder: Path, model, tokens: torch.Tensor) -> dict:
    """What loading the checkpoint again shows. Raises RuntimeError when it gives other logits."""
    again, found = load_again(folder, model, tokens)
    return {
        **found,
        "patterns_after_loading": [layer["pattern"] for layer in describe(again).layers],
    }
