"""The tables, notes and passages of a swap report."""

from __future__ import annotations

from effattn.reports.common import HARNESS, about
from effattn.reports.page import Passage
from effattn.reports.tables import Table, data_size, pairs
from effattn.swapping.patterns import without_sinks
from effattn.swapping.report_data import SwapData, number, past

CONTEXTS, STREAM = "Perplexity by context", "One long stream"
TERMINAL = (STREAM, CONTEXTS, "Checkpoint", HARNESS)
SAME = 0.02  # relative difference of two perplexities that the report calls little
SHOWN_PROMPT = 240  # characters of the prompt's end


def tables(report: SwapData) -> list[Table]:
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
    *evaluated, settings, model, environment = about(report.data)
    header = ("Layer", *(one[0] for one in layers))
    by_layer = Table("Patterns by layer", header, rows, folded=True)
    return [*found, *evaluated, settings, model, by_layer, environment]


def _stream_table(report: SwapData) -> Table:
    fresh = report.reference
    spans = [(span["first"], span["last"]) for span in fresh["spans"]]
    rows = []
    for name, found in [
        *((run["label"], run["stream"]) for run in report.runs),
        (report.reference_label, fresh),
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


def _context_table(report: SwapData) -> Table:
    contexts = [row["context"] for row in report.runs[0]["contexts"]]
    rows = [
        [run["label"], *(number(row["perplexity"]) for row in run["contexts"])]
        for run in report.runs
    ]
    return Table(CONTEXTS, ("Context (tokens)", *(f"{context:,}" for context in contexts)), rows)


def _seconds_table(report: SwapData) -> Table:
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
    fresh = report.reference
    rows.append(
        [report.reference_label, f"{fresh['tokens']:,}", f"{fresh['seconds']:.1f}", "none", "none"]
    )
    return Table(
        "Seconds",
        ("", "Tokens streamed", "Stream", "Contexts", "Generated text"),
        rows,
        folded=True,
    )


def _bucket_table(report: SwapData) -> Table:
    fresh = report.reference
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


def stream_note(report: SwapData) -> str:
    """How the stream was measured, and why the lines do not all end at one place."""
    settings, fresh = report.settings, report.reference
    text = (
        f"One text, fed through the cache in chunks of {settings['chunk']:,}; every token is "
        "predicted from all that the cache still holds. Reference: the unchanged model without a "
        f"cache, in windows of {fresh['context']:,} that overlap by half; it shows how hard the "
        "text itself is at each place."
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
                "without): this model leans little on its first tokens."
            )
    return text


def context_note(report: SwapData) -> str:
    """What the contexts' table is about."""
    count = f"{report.settings['evaluation_tokens']:,}"
    return (
        f"The same {count} held-out tokens at every context c, each predicted from c/2 to c "
        "tokens before it; no cache."
    )


def text_note(report: SwapData) -> str:
    """How the texts were generated."""
    settings = report.settings
    heat = settings["temperature"]
    how = "greedy" if not heat else f"temperature {heat:g}, top-p 0.95, seed {settings['seed']}"
    return (
        f"A prompt of {settings['prompt_tokens']:,} held-out tokens (its end in grey), and the "
        f"{settings['generate_tokens']:,} tokens that model.generate adds ({how}; it may not end "
        "early)."
    )


def passages(report: SwapData, given: int = SHOWN_PROMPT) -> list[Passage]:
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
