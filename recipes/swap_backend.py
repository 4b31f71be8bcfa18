r"""Swap a checkpoint's attention pattern, and see what that does: perplexity by context, streaming,
generated text.

    python recipes/swap_backend.py --model embedded --pattern "sliding(window=256, sinks=4)"
    python recipes/swap_backend.py --model M \
        --pattern '{"0-1": "dense", "2-": "sliding(window=512)"}' --output DIR

`--help` lists every option; the same command is `effattn swap`. From Python:

    from effattn.recipes.swap_backend import Settings, run
    report = run(Settings(patterns=["sliding(window=256, sinks=4)"]))

Try every pattern on a few tokens, measure the unchanged model, then each pattern after a swap,
which is undone again. Two baselines make the numbers readable: the same windows without sinks, and
the unchanged model in fresh windows, which says how hard the text is at every place. With an output
the first pattern is swapped in and saved: the folder has its name only when the checkpoint, loaded
again, gives the same logits. What an unfinished run has measured is kept in
`.<output>.partial.json` beside it; the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option, real, several, tokens, whole
from effattn.resuming import Parts, kept_parts, partial_file, what_is_kept
from effattn.stages import Quiet

if TYPE_CHECKING:
    import torch

    from effattn.hf.anatomy import Anatomy
    from effattn.swapping.patterns import Pattern
    from effattn.swapping.report import SwapReport

BUCKETS = 40  # of a stream, about


@dataclass
class Settings(options.Saving):
    """Swap the attention pattern: perplexity by context, a long stream, and generated text, before
    and after.
    """

    patterns: Sequence[str | dict] = several(  # from Python also dicts from layers to specs
        ("sliding(window=256, sinks=4)",),
        "a spec (default: sliding(window=256, sinks=4)), or JSON from layers to specs; repeat to "
        "compare, the first one is saved",
        name="--pattern",
    )
    model: str = options.model_name()
    output: Path | None = option(None, "new folder for the swapped checkpoint and its report")
    text: Sequence[Path] = options.text_files("to measure on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    bos: bool | None = options.begins_with_bos()
    contexts: Sequence[int] = options.contexts(
        (128, 256, 512, 1024, 2048, 4096),
        "contexts to measure perplexity at, or none",
        least=2,  # one to predict from
        unit="tokens",
    )
    evaluation_tokens: int = tokens(4096, "to score at every context", least=1)
    stream_tokens: int = tokens(20_000, "of the long stream", least=2)
    dense_stream_tokens: int = tokens(
        4096, "after which the unchanged model's stream stops", least=2
    )
    chunk: int = whole(128, "tokens of the stream that go in at a time", least=1)
    prompt_tokens: int = tokens(400, "of held-out text to generate after", least=1)
    generate_tokens: int = tokens(300, "to generate; 0: none")
    temperature: float = real(0.8, "of the generated text; 0 is greedy", least=0)
    seed: int = options.random_seed("the generated text")
    device: str = options.device_name()

    COMMAND: ClassVar = "swap"

    @property
    def partial(self) -> Path | None:
        """The file of finished measurements, beside the output."""
        return None if self.output is None else partial_file(self.output)

    def stopped(self) -> str:
        """How many measurements are kept, and where."""
        if not kept_parts(self.partial):
            return "stopped; nothing was written"
        return what_is_kept(self.partial)


@dataclass(frozen=True)
class Run:
    """One of the models side by side. role: "before" (its own attention), "pattern", or "baseline"
    (a pattern without its sinks). pattern: what is swapped in."""

    label: str
    role: str
    pattern: Pattern | None


@dataclass(frozen=True)
class Text:
    """What everything is measured on. tokens (N,) and prompt (prompt_tokens,) int64; edges: token
    counts between which the stream's perplexity is told; bucket: tokens of a point of its curve;
    trained: the model's trained length, if it says so."""

    tokens: torch.Tensor
    source: str
    prompt: torch.Tensor
    edges: list[int]
    bucket: int
    trained: int | None


def run(settings: Settings, show: Quiet | None = None) -> SwapReport:
    """Measures; returns the report, which with an output also lies there as report.{json,md,html}.

    Raises ValueError (bad settings or input), RuntimeError (the saved checkpoint computes something
    else) and OSError (disk), each before anything appears under the output's name."""
    from effattn.swapping.report import SwapReport

    with flow.output_of(settings, SwapReport, show) as finished:
        if finished:
            return SwapReport.load(settings.output)
        return side_by_side(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def side_by_side(settings: Settings, show: Quiet) -> SwapReport:
    """The comparison, step by step."""
    from effattn.hf.beginning import bos_of
    from effattn.profiling.environment import environment
    from effattn.swapping import measure
    from effattn.swapping.report import SwapReport

    patterns = check(settings)
    model, tokenizer, planned = load(settings, show, patterns)
    text = read(settings, show, model, tokenizer, planned)

    made_with = flow.made_with(model, "torch", "transformers")
    kept = Parts(settings.partial, settings.kept(), made_with, "swap")
    runs = [measured(settings, show, kept, one, model, tokenizer, text) for one in planned]
    window = min(text.trained or measure.MOST_REFERENCE, measure.MOST_REFERENCE)
    said, stream = f"the reference: fresh windows of {window:,}", text.tokens
    given = (model, stream[: settings.stream_tokens + 1], window, text.edges, text.bucket)
    reference = flow.part(show, kept, said, "reference", measure.reference, *given)

    report = SwapReport(
        {
            "kind": "swap_backend",
            "settings": asked_for(settings, patterns, text.source)
            | {"bos": bos_of(model) is not None},
            "model": measure.model_facts(model),
            "runs": runs,
            "reference": reference,
            "prompt": {
                "tokens": settings.prompt_tokens,
                "text": measure.decode(tokenizer, text.prompt),
            },
            "verification": None,
            "environment": environment(),
        }
    )
    if settings.output is not None:
        save(settings, show, report, model, tokenizer, patterns[0], text.tokens)
    kept.discard()
    return report


def check(settings: Settings) -> list[Pattern]:
    """Everything that can be known to be wrong before a model is loaded; returns the patterns,
    parsed, each once. ValueError."""
    from effattn.outputs import check_new_folder
    from effattn.swapping.patterns import parse_pattern
    from effattn.textdata import check_source

    if settings.output is not None:
        check_new_folder("output", settings.output)
    flow.device(settings.device)
    check_source(settings.text, settings.dataset)
    patterns = list(map(parse_pattern, settings.patterns))
    if not patterns:
        raise ValueError("pattern: got none, valid is for example 'sliding(window=256, sinks=4)'")
    return [one for index, one in enumerate(patterns) if one not in patterns[:index]]


def load(settings: Settings, show: Quiet, patterns: list[Pattern]) -> tuple:
    """The model on its device, its tokenizer, and the runs, in their order."""
    from effattn.hf import anatomy
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import restore

    with show.stage("loading the model"):
        model, tokenizer = load_model(settings.model, bos=settings.bos)
        # "before" is the model's own attention, also of a swapped checkpoint
        restore(model).to(flow.device(settings.device))
        parts = anatomy.of(model)
        check_positions(settings, parts)
        if settings.output is not None:
            check_room("output", settings.output, weight_bytes(model))
        return model, tokenizer, plan(parts, patterns)


def plan(parts: Anatomy, patterns: list[Pattern]) -> list[Run]:
    """The runs: before, the user's patterns, and the baselines that make them readable. ValueError
    for layers that the model does not have."""
    from effattn.specs import parse_layers
    from effattn.swapping.patterns import label_of, without_sinks

    full = all(layer.window is None for layer in parts.layers)
    runs = [Run("dense (before)" if full else "its own attention (before)", "before", None)]
    runs += [Run(label_of(one), "pattern", one) for one in patterns]
    for one in map(without_sinks, patterns):
        if one is not None and all(one != planned.pattern for planned in runs):
            runs.append(Run(label_of(one), "baseline", one))
    for planned in runs:
        if isinstance(planned.pattern, dict):
            parse_layers(planned.pattern, len(parts.layers))
    return runs


def check_positions(settings: Settings, parts: Anatomy) -> None:
    """A table of learned positions ends; rotary ones do not. ValueError."""
    trained = parts.trained_length
    if parts.layers[0].family.rotary or trained is None:
        return
    asked = {
        "contexts": max(settings.contexts, default=0),
        "stream_tokens": settings.stream_tokens,
        "prompt_tokens and generate_tokens": settings.prompt_tokens + settings.generate_tokens,
    }
    for name, count in asked.items():
        if count > trained:
            raise ValueError(
                f"{name}: got {count:,}, {type(parts.model).__name__} has {trained:,} learned "
                "positions and cannot go further"
            )


def read(settings: Settings, show: Quiet, model, tokenizer, planned: list[Run]) -> Text:
    """The held-out text. Every pattern is tried on a few tokens of it: what a model or backend
    cannot do is said before anything is measured. ValueError for too little text."""
    from effattn.evaluate.streaming import stream_losses
    from effattn.hf import anatomy
    from effattn.surgery.swapping import restore, swap
    from effattn.swapping import measure
    from effattn.textdata import measured_on

    streamed, prompted = settings.stream_tokens, settings.prompt_tokens
    wanted = {
        "stream_tokens": streamed + 1,
        "contexts and evaluation_tokens": measure.context_tokens(
            settings.contexts, settings.evaluation_tokens
        ),
        "prompt_tokens": prompted,
    }
    with show.stage("reading text"):
        most = max(wanted.values())
        found, source = measured_on(
            tokenizer, most, settings.text, settings.dataset, settings.column
        )
        for name, count in wanted.items():
            if count > len(found):
                raise ValueError(
                    f"{name}: {count:,} tokens are needed, the held-out text has {len(found):,}; "
                    "ask for less, or give more text"
                )
        for one in planned:
            if one.pattern is not None:
                swap(model, one.pattern)
                try:
                    stream_losses(model, found[:32], chunk=16)
                finally:
                    restore(model)

    trained = anatomy.of(model).trained_length
    stops = (trained or 0, settings.dense_stream_tokens)
    edges = sorted({0, *(count for count in stops if count < streamed), streamed})
    middle = (len(found) - prompted) // 2  # text in full flow, not a file's first lines
    prompt = found[middle : middle + prompted]
    return Text(found, source, prompt, edges, -(-streamed // BUCKETS), trained)


def measured(
    settings: Settings, show: Quiet, kept: Parts, one: Run, model, tokenizer, text: Text
) -> dict:
    """A run's part of the report: the three measurements after its swap, which is undone."""
    from effattn.surgery.describing import describe
    from effattn.surgery.swapping import restore, swap
    from effattn.swapping import measure

    if one.pattern is not None:
        swap(model, one.pattern)
    found = {"label": one.label, "role": one.role, "pattern": one.pattern}
    found["layers"] = [layer["pattern"] for layer in describe(model).layers]

    said, name = f"perplexity by context: {one.label}", f"{one.label}/contexts"
    given = (model, text.tokens, settings.contexts, settings.evaluation_tokens)
    found["contexts"] = flow.part(show, kept, said, name, measure.by_context, *given)

    # Its own attention is slower with every token, and is lost soon after the trained length.
    length = settings.stream_tokens
    if one.role == "before":
        length = min(settings.dense_stream_tokens, length)
    said, name = f"streaming {length:,} tokens: {one.label}", f"{one.label}/stream"
    given = (model, text.tokens[: length + 1], settings.chunk, text.edges, text.bucket)
    found["stream"] = flow.part(show, kept, said, name, measure.stream, *given)

    if settings.generate_tokens and one.role != "baseline":
        given = (
            model,
            tokenizer,
            text.prompt,
            settings.generate_tokens,
            settings.temperature,
            settings.seed,
            text.trained,
        )
        with show.stage(f"generating {settings.generate_tokens:,} tokens: {one.label}"):
            found["text"] = kept.once(f"{one.label}/text", lambda: measure.generate(*given))
    restore(model)
    return found


def save(
    settings: Settings,
    show: Quiet,
    report: SwapReport,
    model,
    tokenizer,
    pattern: Pattern,
    tokens: torch.Tensor,
) -> None:
    """Writes the checkpoint with `pattern`, and proves that it gives the same logits on some of
    `tokens` when it is loaded again. RuntimeError otherwise."""
    from effattn.surgery import checkpoint
    from effattn.surgery.describing import describe
    from effattn.surgery.swapping import swap

    with flow.saving(settings, show, report) as folder:
        swap(model, pattern)
        checkpoint.save(model, folder, tokenizer)
        again, found = checkpoint.load_again(folder, model, tokens[: 2 * settings.chunk])
        report.data["verification"] = {
            **found,
            "patterns_after_loading": [layer["pattern"] for layer in describe(again).layers],
        }


def asked_for(settings: Settings, patterns: list[Pattern], source: str) -> dict[str, object]:
    """What the report says of the settings."""
    return {
        "model": str(settings.model),
        "patterns": patterns,
        "text": source,
        "contexts": list(settings.contexts),
        "evaluation_tokens": settings.evaluation_tokens,
        "stream_tokens": settings.stream_tokens,
        "dense_stream_tokens": settings.dense_stream_tokens,
        "chunk": settings.chunk,
        "prompt_tokens": settings.prompt_tokens,
        "generate_tokens": settings.generate_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
