"""Tables and sentences that several kinds of reports have: each is written here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

from effattn.reports.tables import UNKNOWN, Table, data_size, number, pairs

DECODING = "Decoding"
# What says how good a model is, in the order in which every table has them.
QUALITY_NAMES = ("perplexity", "cross_entropy", "kl")
QUALITY_HEADER = ("Perplexity", "Cross-entropy (nats/token)", "KL to the parent (nats/token)")


HARNESS = "lm-evaluation-harness"
EXCESS = "Excess (nats/token)"  # of cross-entropy, over the parent's
TURNS = "Context in tokens; greedy single-token steps, the models taking turns."


class Quality(TypedDict):
    """A model on held-out text. Of the parent itself there is no KL."""

    perplexity: float
    cross_entropy: float  # nats a token
    kl: NotRequired[float]  # KL(parent || model), nats a token


class MeasuredOn(TypedDict):
    """The text that qualities were measured on."""

    tokens: int
    context: int  # tokens of a window
    source: str
    bos: NotRequired[bool]  # whether each begins with it; reports of earlier versions do not say


class Timed(TypedDict, total=False):
    """Decoding steps of one model at one context; `effattn.profiling.decode` measures them."""

    tokens_per_s: float  # of the whole batch
    ms_p20: float  # a step
    ms_p50: float
    ms_p80: float
    kv_bytes: int
    does_not_fit: int  # bytes that it would need; then there is nothing else


class DecodeRow(TypedDict):
    """Two models at one context."""

    context: int  # tokens in the cache
    batch: NotRequired[int]
    before: Timed
    after: Timed


def speed_ratio(row: DecodeRow) -> float | None:
    """Decoding speed after over before, of one context; None unless both were timed."""
    before, after = ((row.get(when) or {}).get("tokens_per_s") for when in ("before", "after"))
    return after / before if before and after else None


def speed(timed: Timed) -> str:
    """Tokens/s of one side of a row, or why there are none."""
    if timed.get("does_not_fit"):
        return f"does not fit (needs {data_size(timed['does_not_fit'])})"
    return f"{timed['tokens_per_s']:,.1f}" if timed.get("tokens_per_s") else UNKNOWN


def decode_table(rows: Sequence[DecodeRow], note: str, detailed: bool = False) -> Table:
    """Decoding speeds and cache sizes by context; detailed: with the batch and the ratio."""

    def side(when: str, write: Callable[[Timed], str]) -> Callable[[DecodeRow], str]:
        return lambda row: write(row.get(when) or {})

    def ratio(row: DecodeRow) -> str:
        found = speed_ratio(row)
        return f"{found:.2f}x" if found else UNKNOWN

    columns = {
        "Context": lambda row: number(row["context"]),
        "Batch": lambda row: number(row.get("batch")),
        "Before (tokens/s)": side("before", speed),
        "After (tokens/s)": side("after", speed),
        "Speed": ratio,
        "KV before": side("before", lambda timed: data_size(timed.get("kv_bytes"))),
        "KV after": side("after", lambda timed: data_size(timed.get("kv_bytes"))),
    }
    shown = [name for name in columns if detailed or name not in ("Batch", "Speed")]
    return Table(DECODING, shown, [[columns[name](row) for name in shown] for row in rows], note)


def curve_table(title: str, first: str, curve: Sequence[dict], note: str = "") -> Table:
    """Qualities while training. curve: a `Quality` with its "tokens" each; first: the header of
    those."""
    names = ("tokens", *QUALITY_NAMES)
    rows = [[number(point.get(name)) for name in names] for point in curve]
    return Table(title, (first, *QUALITY_HEADER), rows, note, folded=True)


def measured_on(quality: MeasuredOn) -> str:
    """What the qualities of a report were measured on, in a sentence."""
    return (
        f"On {quality['tokens']:,} held-out tokens ({quality['source']}) in windows of "
        f"{quality['context']:,}{begun_with(quality)}."
    )


def begun_with(told: Mapping) -> str:
    """What is said behind windows that begin with BOS, by a report's part that has "bos"."""
    return ", each begun with BOS" if told.get("bos") else ""


def listed(settings: dict) -> dict:
    """Settings with lists as text, without those that are the trainer's own business."""
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if key != "overrides"
    }


def harness_tables(data: dict) -> list[Table]:
    """What both models reached in lm-evaluation-harness, where that was asked for; else none.
    data: a report's, with "lm_eval": "before" and "after" {task: `harness_scores`}."""
    found = data.get("lm_eval")
    if not found:
        return []
    before, after = found["before"], found["after"]
    rows = [
        [
            task,
            metric,
            number(told["samples"]),
            _with_error(told, metric),
            _with_error(after.get(task), metric),
            _change(told["metrics"][metric], (after.get(task) or told)["metrics"].get(metric)),
        ]
        for task, told in before.items()
        for metric in told["metrics"]
    ]
    header = ("Task", "Metric", "Examples", "Before", "After", "Change")
    first = found["limit"]
    note = f"lm_eval {found['version']}, no few-shot examples but a task's own; "
    note += "every example" if first is None else f"the first {first:,} examples of each task"
    return [Table(HARNESS, header, rows, f"{note}; ± is the standard error.")]


def _with_error(told: dict | None, metric: str) -> str:
    value = None if told is None else told["metrics"].get(metric)
    error = None if told is None else told["errors"].get(metric)
    return number(value) + (f" ± {number(error)}" if error is not None else "")


def _change(before: float | None, after: float | None) -> str:
    return UNKNOWN if before is None or after is None else f"{after - before:+.4f}"


def about(data: dict) -> list[Table]:
    """The last tables of most reports: what both models reached in lm-evaluation-harness, if that
    was asked for; what was asked for, of what model, on what machine."""
    return [
        *harness_tables(data),
        pairs("Settings", listed(data["settings"])),
        pairs("Model", data["model"]),
        pairs("Environment", data["environment"]),
    ]
