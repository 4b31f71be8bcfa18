"""The tables, plots and passages of a swap report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup

from effattn.evaluate.loss import perplexity_of
from effattn.reports.figures import MARKERS
from effattn.reports.page import Passage
from effattn.reports.plots import AFTER, BEFORE, NEUTRAL, PALETTE, Series, line_plot
from effattn.reports.tables import Table, data_size, pairs
from effattn.swapping.patterns import without_sinks

if TYPE_CHECKING:
    from effattn.swapping.report import SwapReport

CONTEXTS, STREAM = "Perplexity by context", "One long stream"
TERMINAL = (STREAM, CONTEXTS, "Checkpoint")
OTHERS = PALETTE[2:]
SAME = 0.02  # relative difference of two perplexities that the report calls little
SHOWN_PROMPT = 240  # characters of the prompt's end


def number(value: float | None) -> str:
    """A perplexity as a person reads it."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def past(found: dict, trained: int | None) -> dict:
    """Scores of the part of a stream that lies past the trained length (of all of it where it does
    not get there): {first, last, perplexity}. Spans are put together by their lengths."""
    spans = [span for span in found["spans"] if span["first"] >= (trained or 0)] or found["spans"]
    count = spans[-1]["last"] - spans[0]["first"]
    sums = [
        (span["last"] - span["first"])
        * (math.nan if span["cross_entropy"] is None else span["cross_entropy"])
        for span in spans
    ]
    return {
        "first": spans[0]["first"],
        "last": spans[-1]["last"],
        "perplexity": perplexity_of(sum(sums) / count),
    }


def _styles(report: SwapReport) -> list[tuple[dict, dict]]:
    """Every run with its look, the same in all plots. Baselines are broad and dashed below the
    others: they may lie exactly under a pattern."""
    styled, others, markers = [], iter(OTHERS * 9), iter(MARKERS[1:] * 9)
    for run in report.runs:
        look = {
            "label": run["label"],
            "color": AFTER if run is report.main else None,
            "marker": "o",
            "style": "-",
        }
        if run["role"] == "before":
            look["color"] = BEFORE
        elif run["role"] == "baseline":
            look |= {"color": next(others), "marker": "", "style": "--", "width": 3.2}
        else:
            look |= {"color": look["color"] or next(others), "marker": next(markers)}
        styled.append((run, look))
    return styled


def _mark(report: SwapReport, most: float) -> tuple[float, str] | None:
    """The trained length, where it lies inside a plot."""
    trained = report.trained
    return (trained, f"trained at {trained:,}") if trained and trained < most else None


def by_context(report: SwapReport) -> list[Markup]:
    """Perplexity against context, log-log."""
    lines = [
        Series(
            x=[row["context"] for row in run["contexts"]],
            y=[row["perplexity"] for row in run["contexts"]],
            **style,
        )
        for run, style in _styles(report)
        if run["contexts"]
    ]
    if not lines:
        return []
    mark = _mark(report, max(lines[0].x))
    labels = ("context (tokens)", "perplexity")
    return [
        line_plot(
            "Perplexity against context",
            lines,
            *labels,
            contexts=True,
            log_y=True,
            mark=mark,
            width=10.8,
            height=3.8,
        )
    ]


def along_stream(report: SwapReport) -> list[Markup]:
    """Perplexity and cache bytes along the stream."""
    lines, sizes = [], []
    for run, style in _styles(report):
        buckets, held = run["stream"]["buckets"], run["stream"]["cache_bytes"]
        lines.append(
            Series(
                x=[one["last"] for one in buckets],
                y=[one["perplexity"] for one in buckets],
                **style,
            )
        )
        x, y = zip(*held, strict=True)
        sizes.append(Series(x=x, y=[size / 2**20 for size in y], **{**style, "marker": ""}))
    fresh = report.data["reference"]
    x, y = zip(*((one["last"], one["perplexity"]) for one in fresh["buckets"]), strict=True)
    lines.append(Series(_reference(report), x, y, NEUTRAL, ":", ""))
    mark = _mark(report, max(x))
    return [
        line_plot(
            "Perplexity along the stream",
            lines,
            "tokens streamed",
            "perplexity",
            log_y=True,
            mark=mark,
            width=10.8,
            height=4.2,
        ),
        line_plot(
            "Cache along the stream",
            sizes,
            "tokens streamed",
            "cache held (MiB)",
            log_y=True,
            mark=mark,
            width=10.8,
            height=3.2,
        ),
    ]


def stream_note(report: SwapReport) -> str:
    """How the stream was measured, and why the lines do not all end at one place."""
    settings, fresh = report.settings, report.data["reference"]
    text = (
        f"One text, fed through the cache in chunks of {settings['chunk']:,}; every token is "
        "predicted from all that "
        "the cache still holds. Reference: the unchanged model without a cache, in windows of "
        f"{fresh['context']:,} "
        "that overlap by half; it shows how hard the text itself is at each place."
    )
    before = next(run for run in report.runs if run["role"] == "before")
    if before["stream"]["tokens"] < settings["stream_tokens"]:
        text += (
            f" {before['label']} was stopped at {before['stream']['tokens']:,} tokens "
            "(dense_stream_tokens): its "
        )
        text += "cache and its cost grow with every token."
    added = [run for run in report.runs if run["role"] == "baseline"]
    if added:
        text += f" Added for comparison: {', '.join(run['label'] for run in added)}."
    if added and without_sinks(report.main["pattern"]) == added[0]["pattern"]:
        ours, bare = (
            past(run["stream"], report.trained)["perplexity"] for run in (report.main, added[0])
        )
        if abs(bare / ours - 1) < SAME:
            text += (
                f" Here the sinks change little ({number(ours)} with them, {number(bare)} "
                "without): this model leans "
                "little on its first tokens."
            )
    return text


def context_note(report: SwapReport) -> str:
    """What the contexts' table is about."""
    count = f"{report.settings['evaluation_tokens']:,}"
    return (
        f"The same {count} held-out tokens at every context c, each predicted from c/2 to c "
        "tokens before it; no cache."
    )


def text_note(report: SwapReport) -> str:
    """How the texts were generated."""
    settings = report.settings
    heat = settings["temperature"]
    how = "greedy" if not heat else f"temperature {heat:g}, top-p 0.95, seed {settings['seed']}"
    return (
        f"A prompt of {settings['prompt_tokens']:,} held-out tokens (its end in grey), and the "
        f"{settings['generate_tokens']:,} tokens that model.generate adds ({how}; it may not end "
        "early)."
    )


def passages(report: SwapReport, given: int = SHOWN_PROMPT) -> list[Passage]:
    """The generated text of every run; `given` characters of the prompt before it."""
    prompt = report.data["prompt"]["text"]
    shown = ("…" if len(prompt) > given else "") + prompt[-given:] if given else ""
    border = f"past {report.trained:,} tokens, the trained length" if report.trained else ""
    found = [(run["label"], run["text"]) for run in report.runs if run.get("text")]
    return [Passage(label, shown, text["within"], border, text["past"]) for label, text in found]


def shortened(text: str, characters: int = 400, lines: int = 8) -> str:
    """The start of a text for the terminal, without empty lines; the reports have all of it."""
    kept = "\n".join([line for line in text.splitlines() if line.strip()][:lines])[:characters]
    return kept + (" …" if len(kept) < len(text.rstrip()) else "")


def _reference(report: SwapReport) -> str:
    return f"reference: windows of {report.data['reference']['context']:,}"


def _stream_table(report: SwapReport) -> Table:
    fresh = report.data["reference"]
    spans = [(span["first"], span["last"]) for span in fresh["spans"]]
    rows = []
    for name, found in [
        *((run["label"], run["stream"]) for run in report.runs),
        (_reference(report), fresh),
    ]:
        known = {
            (span["first"], span["last"]): number(span["perplexity"]) for span in found["spans"]
        }
        held = data_size(found["cache_bytes"][-1][1]) if "cache_bytes" in found else "no cache"
        rows.append([name, *(known.get(span, "stopped") for span in spans), held])
    header = ("Perplexity", *(f"to {last:,}" for _, last in spans), "Cache held")
    note = (
        "Each column is the perplexity from where the one before ends; the cache is the one at "
        "the end."
    )
    return Table(STREAM, header, rows, note)


def _context_table(report: SwapReport) -> Table:
    contexts = [row["context"] for row in report.runs[0]["contexts"]]
    rows = [
        [run["label"], *(number(row["perplexity"]) for row in run["contexts"])]
        for run in report.runs
    ]
    return Table(CONTEXTS, ("Context (tokens)", *(f"{context:,}" for context in contexts)), rows)


def _seconds_table(report: SwapReport) -> Table:
    """What was measured for how long; one run each, beside whatever else the machine did."""
    rows = []
    for run in report.runs:
        contexts = sum(row["seconds"] for row in run["contexts"])
        text = run.get("text") or {}
        cells = (
            f"{run['stream']['tokens']:,}",
            f"{run['stream']['seconds']:.1f}",
            f"{contexts:.1f}",
        )
        rows.append([run["label"], *cells, f"{text['seconds']:.1f}" if text else "none"])
    fresh = report.data["reference"]
    rows.append(
        [_reference(report), f"{fresh['tokens']:,}", f"{fresh['seconds']:.1f}", "none", "none"]
    )
    return Table(
        "Seconds",
        ("", "Tokens streamed", "Stream", "Contexts", "Generated text"),
        rows,
        folded=True,
    )


def _bucket_table(report: SwapReport) -> Table:
    fresh = report.data["reference"]
    columns = [*((run["label"], run["stream"]) for run in report.runs), ("reference", fresh)]
    rows = []
    for index, bucket in enumerate(fresh["buckets"]):
        key = (bucket["first"], bucket["last"])
        cells = []
        for _, found in columns:
            here = found["buckets"][index] if index < len(found["buckets"]) else None
            same = here is not None and (here["first"], here["last"]) == key
            cells.append(number(here["perplexity"]) if same else "-")
        rows.append([f"{key[0]:,} to {key[1]:,}", *cells])
    return Table(
        "Along the stream", ("Tokens", *(label for label, _ in columns)), rows, folded=True
    )


def tables(report: SwapReport) -> list[Table]:
    """Every table, the headline first."""
    found = [_stream_table(report)]
    found += [_context_table(report)] if report.runs[0]["contexts"] else []
    if proof := report.data.get("verification"):
        shown = {
            "Largest logit difference after loading again": proof["max_logit_difference"],
            "On tokens": proof["tokens"],
            "Patterns after loading": ", ".join(dict.fromkeys(proof["patterns_after_loading"])),
        }
        found.append(pairs("Checkpoint", shown))
    found += [_bucket_table(report), _seconds_table(report)]
    layers = [[run["label"], *run["layers"]] for run in report.runs]
    rows = [
        [f"{index}", *cells]
        for index, cells in enumerate(zip(*(one[1:] for one in layers), strict=True))
    ]
    listed = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in report.settings.items()
    }
    return [
        *found,
        pairs("Settings", listed),
        pairs("Model", report.data["model"]),
        Table("Patterns by layer", ("Layer", *(one[0] for one in layers)), rows, folded=True),
        pairs("Environment", report.data["environment"]),
    ]
