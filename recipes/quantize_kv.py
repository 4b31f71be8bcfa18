r"""What quantizing the key/value cache costs a checkpoint, and which layer should get which bits.

    python recipes/quantize_kv.py --bits 8,4,2
    python recipes/quantize_kv.py --formats "int4(residual=64)" --formats "int2(residual=64)" \
        --output runs/cache
    python recipes/quantize_kv.py --model M --budget-bytes-per-token 40000 --output runs/planned

`--help` lists every option; the same command is `effattn quantize-kv`. From Python:

    from effattn.recipes.quantize_kv import Settings, run
    report = run(Settings(formats=("int4(residual=64)",), budget=40_000))

Measure every format token by token as decoding reads it, measure each layer alone, choose a plan
under the budget and measure that, then retrieval and speed. With an output, save a checkpoint with
its cache, load it again, compare, and only then give the folder its name. Every finished part is
kept in `.<output>.partial.json` beside it: the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.evaluate import DEPTHS
from effattn.recipes import flow, options
from effattn.recipes.console import console, console_of
from effattn.recipes.options import contexts, contexts_of, option, real, several, tokens, whole
from effattn.resuming import Parts, as_json, partial_file, what_is_kept
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.quant.sensitivity.lanes import Lane
    from effattn.quant.sensitivity.report import QuantizeReport
    from effattn.textdata import Streams

MOST_RETRIEVAL = 4096  # tokens of a retrieval prompt, by default at most


@dataclass
class Settings(options.Saving):
    """Quantize the key/value cache: quality token by token, bytes, speed, and which layer should
    get how many bits.
    """

    bits: Sequence[int] = option(
        (8, 4, 2),
        "formats by their bits, with default options",
        read=lambda name, text: tuple(contexts_of(text, name)),
        shown="8,4,2",
    )
    formats: Sequence[str] = several(
        (), 'a cache spec instead, such as "int4(group=64, residual=128)"; repeat for more'
    )
    model: str = options.model_name()
    budget: float | None = real(
        None,
        "make a per-layer plan of the formats (and full) that takes at most so many bytes a token, "
        "all layers together",
        above=0,
        name="--budget-bytes-per-token",
    )
    output: Path | None = option(
        None,
        "new folder for the report, and the checkpoint with the plan's cache (or the only "
        "format's); a killed run resumes",
    )
    weights: str | None = option(None, "quantize the weights too, first: nf4 or int8")
    text: Sequence[Path] = options.text_files("to measure on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    bos: bool | None = options.begins_with_bos()
    evaluation_tokens: int = tokens(8192, "to measure each format on, a step each", least=1)
    sensitivity_tokens: int = tokens(
        2048, "to measure each layer and format on, a pass each; 0: not measured", least=0
    )
    length: int = whole(512, "window length in tokens", least=1)
    batch: int = whole(16, "windows that are decoded side by side", least=1)
    retrieval_length: int | None = whole(
        None,
        "tokens of a retrieval prompt (default: three quarters of what the model was made for, at "
        f"most {MOST_RETRIEVAL})",
        least=1,
    )
    retrieval_trials: int = whole(8, "prompts a task and depth; 0: no retrieval", least=0)
    retrieval_depths: Sequence[float] = real(DEPTHS, least=0, most=1)  # from Python alone
    retrieval_style: str | None = option(
        None, "of the passkey: text, or code (default: code for the embedded model)"
    )
    decode_contexts: Sequence[int] = options.decode_contexts((512, 4096))
    decode_batches: Sequence[int] = contexts((1, 4), "sequences at once")
    decode_steps: int = whole(32, "steps to time, at most", least=1)
    decode_seconds: float = real(10.0, "about so long for each context and batch", above=0)
    seed: int = options.random_seed("prompts and random tokens")
    device: str = options.device_name()

    COMMAND: ClassVar = "quantize-kv"
    APART: ClassVar = ("bits",)  # which are formats
    WIDTH: ClassVar = 140

    @property
    def specs(self) -> list[str]:
        """The formats to measure, each once."""
        from effattn.quant.formats import BITS

        return list(dict.fromkeys(self.formats or [BITS[bits] for bits in self.bits]))

    @property
    def partial(self) -> Path | None:
        """None when nothing is written at all."""
        return None if self.output is None else partial_file(self.output)

    def kept(self) -> dict:
        """As texts, for the file of finished parts and for the report."""
        return as_json({"model": self.model} | super().kept() | {"formats": self.specs})

    @property
    def saves(self) -> bool:
        """Whether there is one cache to save."""
        one = self.budget is not None or len(self.specs) == 1
        return one and self.output is not None

    def stopped(self) -> str:
        """How many finished parts are kept, and where."""
        return what_is_kept(self.partial)


def run(settings: Settings, show: Quiet | None = None) -> QuantizeReport:
    """Measures; returns the report, which with an output also lies there as report.{json,md,html}.

    The checkpoint in the output has the plan's cache; without a budget the only format's; of
    several formats without a budget none is saved. Raises ValueError (bad settings or input, an
    impossible budget), RuntimeError (the checkpoint computes something else) and OSError (disk),
    each before anything appears under the output's name."""
    from effattn.quant.sensitivity.report import QuantizeReport

    with flow.output_of(settings, QuantizeReport, show) as finished:
        if finished:
            return QuantizeReport.load(settings.output)
        return quantize(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def quantize(settings: Settings, show: Quiet) -> QuantizeReport:
    """All of it, the output's folder being held."""
    from effattn.profiling.environment import environment
    from effattn.quant.sensitivity import budget
    from effattn.quant.sensitivity.lanes import PLAN, Lane
    from effattn.quant.sensitivity.report import QuantizeReport
    from effattn.quant.sensitivity.rows import model_facts

    check(settings)
    model, tokenizer, made = load(settings, show)
    text = read(settings, show, tokenizer, made)
    made_with = flow.made_with(model, "device", "threads", "torch", "transformers")
    kept = Parts(settings.partial, settings.kept(), made_with, "quantize-kv")
    facts = model_facts(model)

    # Each format in all layers, and in each layer alone.
    rows = [token_by_token(settings, show, kept, made[0], lane, text) for lane in made]
    alone = layer_by_layer(settings, show, kept, made[0], text)

    # A format for each layer: full precision, which harms nothing, is a choice everywhere. That
    # the harm of layers adds up is a model, so the chosen plan is measured as a whole, too.
    sizes = {lane.name: lane.layer_bytes() for lane in made}
    front = budget.plans(sizes, alone, facts["layers"]) if alone else []
    plan = None
    if settings.budget is not None:
        plan = budget.as_told(budget.best(front, settings.budget), settings.budget)
        made.append(Lane(PLAN, plan["cache"]).of(model))
        rows.append(token_by_token(settings, show, kept, made[0], made[-1], text))

    prompts = retrieval_prompts(settings, facts)
    answers = retrieval(settings, show, kept, made, tokenizer, prompts)
    speed = decode_speed(settings, show, kept, made)
    report = QuantizeReport(
        {
            "kind": "quantize_kv",
            "settings": settings.kept() | {"source": text.source} | flow.fed(text, model) | prompts,
            "model": facts,
            "formats": rows,
            "sensitivity": alone,
            "plan": plan,
            "frontier": [{"bytes_per_token": one.bytes, "kl": one.kl} for one in front],
            "retrieval": answers,
            "decode": speed,
            "saved": None,
            "verification": None,
            "environment": environment(),
        }
    )
    if settings.output is not None:
        save(settings, show, report, model, tokenizer, text)
    kept.discard()
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.evaluate.passkey_retrieval import STYLES
    from effattn.outputs import check_new_folder
    from effattn.quant.formats import BITS, Format
    from effattn.quant.sensitivity.lanes import FULL
    from effattn.quant.weights import KINDS
    from effattn.specs import parse_spec
    from effattn.textdata import check_source

    flow.device(settings.device)
    for bits in settings.bits:
        check_choice("bits", str(bits), list(map(str, BITS)))
    if not settings.specs:
        raise ValueError("formats: got none, valid is for example 'int4(group=64, residual=128)'")
    for spec in settings.specs:
        if parse_spec(spec)[0] == FULL:
            raise ValueError("formats: got 'full', which is measured beside the others in any case")
        Format.parse(spec)
    if settings.weights is not None:
        check_choice("weights", settings.weights, KINDS)
    if settings.retrieval_style is not None:
        check_choice("retrieval_style", settings.retrieval_style, STYLES)
    check_source(settings.text, settings.dataset)
    if settings.budget is not None and not settings.sensitivity_tokens:
        raise ValueError(
            "sensitivity_tokens: got 0, and a plan for budget_bytes_per_token is made of what each "
            f"layer loses alone; valid is at least length ({settings.length})"
        )
    measured = ("evaluation_tokens", "sensitivity_tokens")
    for name in measured if settings.sensitivity_tokens else measured[:1]:
        if getattr(settings, name) < settings.length:
            raise ValueError(
                f"{name}: got {getattr(settings, name)}, valid is at least length "
                f"({settings.length}): one window"
            )
    if settings.sensitivity_tokens > settings.evaluation_tokens:
        raise ValueError(
            f"sensitivity_tokens: got {settings.sensitivity_tokens}, valid is at most "
            f"evaluation_tokens ({settings.evaluation_tokens}): the same text"
        )
    if settings.output is not None:
        check_new_folder("output", settings.output)


def load(settings: Settings, show: Quiet) -> tuple:
    """The model on its device, its tokenizer, and its lanes: the full cache, then each format.
    ValueError where a format does not fit, and where no plan fits the budget."""
    from effattn.quant.sensitivity import budget
    from effattn.quant.sensitivity.lanes import FULL, Lane
    from effattn.quant.weights import quantize_weights
    from effattn.surgery.attaching import require_own_attention
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        model, tokenizer = load_model(settings.model, bos=settings.bos)
        model.to(flow.device(settings.device))
        require_own_attention(model, settings.model)
        if settings.weights is not None:
            quantize_weights(model, settings.weights)
        lanes = (Lane(FULL), *(Lane(spec, spec) for spec in settings.specs))
        made = [lane.of(model) for lane in lanes]
        sizes = [lane.layer_bytes() for lane in made]
        if settings.budget is not None:
            budget.check_budget(settings.budget, sum(map(min, zip(*sizes, strict=True))))
    return model, tokenizer, made


def read(settings: Settings, show: Quiet, tokenizer, made: Sequence[Lane]) -> Streams:
    """The text to measure on. What a model cannot do is said before anything is measured."""
    from effattn.quant.sensitivity.lanes import prefilled
    from effattn.quant.sensitivity.tokenwise import windows
    from effattn.textdata import streams

    with show.stage("reading text"):
        text = streams(
            tokenizer,
            train=1,
            evaluation=settings.evaluation_tokens + 1,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
        )
        windows(text.evaluation, settings.length)
        for lane in made:
            prefilled(lane.model, text.evaluation[None, :8].to(lane.model.device))
    return text


def token_by_token(
    settings: Settings, show: Quiet, kept: Parts, full: Lane, lane: Lane, text: Streams
) -> dict:
    """One lane's row: its cache, bytes, and quality beside the full one."""
    from effattn.quant.sensitivity import rows
    from effattn.quant.sensitivity.tokenwise import tokenwise

    said, key = f"token by token: {lane.name}", f"{lane.name}/{lane.cache}"
    how = (full.model, lane.model, text.evaluation, settings.length)
    quality = flow.part(show, kept, said, f"quality/{key}", tokenwise, *how, batch=settings.batch)
    held = kept.once(f"bytes/{key}", lambda: rows.held(lane, settings.length, settings.seed))
    return rows.format_row(lane, quality, held)


def layer_by_layer(
    settings: Settings, show: Quiet, kept: Parts, full: Lane, text: Streams
) -> list[dict]:
    """Each format in each layer alone: {layer, spec, kl, perplexity, agreement}; none of them where
    there are no tokens to measure on."""
    from effattn.hf import anatomy
    from effattn.quant.sensitivity.lanes import Lane
    from effattn.quant.sensitivity.tokenwise import tokenwise

    if not settings.sensitivity_tokens:
        return []
    tokens = text.evaluation[: settings.sensitivity_tokens + 1]
    layers = [layer.index for layer in anatomy.of(full.model)]
    pairs = [(layer, spec) for layer in layers for spec in settings.specs]

    def measure(layer: int, spec: str, progress) -> dict:
        lane = Lane(spec, {str(layer): spec}).of(full.model)
        how = (full.model, lane.model, tokens, settings.length)
        return tokenwise(*how, batch=settings.batch, progress=progress)

    said = f"each layer alone: {len(layers)} layers, {len(settings.specs)} formats"
    jobs = {f"layer/{layer}/{spec}": partial(measure, layer, spec) for layer, spec in pairs}
    found = flow.parts(show, kept, said, jobs)
    told = ("kl", "perplexity", "agreement")
    return [
        {"layer": layer, "spec": spec} | {key: one[key] for key in told}
        for (layer, spec), one in zip(pairs, found, strict=True)
    ]


def retrieval_prompts(settings: Settings, facts: dict) -> dict:
    """The tokens of a prompt, and the style of the passkey's."""
    from effattn import embedded

    length = min(3 * facts["trained_length"] // 4, MOST_RETRIEVAL)
    style = "code" if str(settings.model) == embedded.NAME else "text"
    return {
        "retrieval_length": settings.retrieval_length or length,
        "retrieval_style": settings.retrieval_style or style,
    }


def retrieval(
    settings: Settings, show: Quiet, kept: Parts, made: Sequence[Lane], tokenizer, prompts: dict
) -> list[dict]:
    """Both tasks for every lane: the dicts of `effattn.evaluate`, with the lane's name and how many
    tokens of a prompt are packed at its end."""
    from effattn.quant.sensitivity.retrieval import TASKS, ask, packed

    rows, length = [], prompts["retrieval_length"]
    how = {
        "trials": settings.retrieval_trials,
        "style": prompts["retrieval_style"],
        "seed": settings.seed,
    }
    for task in TASKS if settings.retrieval_trials else ():
        for lane in made:
            said, name = f"{task}: {lane.name}", f"{task}/{lane.name}/{lane.cache}"
            asked = (task, lane, tokenizer, length, settings.retrieval_depths)
            found = flow.part(show, kept, said, name, ask, *asked, **how)
            row = {"lane": lane.name, "task": task, "packed": packed(lane, length)}
            rows.append(row | found)
    return rows


def decode_speed(settings: Settings, show: Quiet, kept: Parts, made: Sequence[Lane]) -> list[dict]:
    """The lanes' decoding steps, side by side, at every context and batch."""
    from effattn.quant.sensitivity import lanes

    rows = []
    how = {
        "seconds": settings.decode_seconds,
        "steps": settings.decode_steps,
        "seed": settings.seed,
    }
    for context in settings.decode_contexts:
        said, name = f"timing decode steps after {context:,} tokens", f"decode/{context}"
        timed = (made, context, settings.decode_batches)
        rows += flow.part(show, kept, said, name, lanes.decode_speed, *timed, **how)
    return rows


def save(
    settings: Settings, show: Quiet, report: QuantizeReport, model, tokenizer, text: Streams
) -> None:
    """The checkpoint with its cache, proven by its logits, and the report beside it."""
    from effattn.quant.sensitivity.verify import verify
    from effattn.surgery import checkpoint
    from effattn.surgery.swapping import swap

    only = settings.specs[0] if len(settings.specs) == 1 else None
    cache = report.data["plan"]["cache"] if report.data["plan"] else only
    with flow.saving(settings, show, report) as folder:
        if cache is not None:
            swap(model, cache=cache)
            checkpoint.save(model, folder, tokenizer)
            tokens = text.evaluation[: min(256, settings.length)]
            report.data |= {"saved": cache, "verification": verify(folder, model, tokens)}


def tell(settings: Settings, report: QuantizeReport) -> None:
    """The report's tables, and where things lie: a checkpoint only where one was saved."""
    console_of(settings.WIDTH).print(report)
    if settings.output is not None:
        if report.data["saved"] is not None:
            console.print(f"\ncheckpoint  {settings.output}", soft_wrap=True, highlight=False)
        flow.tell_report(settings.output)
    flow.tell_hub(settings)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
