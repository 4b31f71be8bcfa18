"""The report of a measurement: one JSON-able dict, shown as JSON, Markdown, HTML, and on the
terminal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from effattn.measuring import report_plots as plots
from effattn.measuring import report_tables as tables
from effattn.measuring.report_rows import main_numbers
from effattn.measuring.rows import MEASURED
from effattn.reports.files import finite, write_all_atomic, write_text_atomic
from effattn.reports.page import Section, page
from effattn.reports.plots import short_count
from effattn.reports.tables import data_size, markdown_text

KIND, VERSION = "measure", 1
AS_FAST = 1.02  # ratios of times below are "as fast": no reader cares, however small the spread


@dataclass
class Report:
    """Wraps `data`: kind, version, settings, model, rows (one for each context, batch and variant;
    `effattn.measuring. rows` says what is in them), peaks, environment. ValueError for other kinds
    and versions."""

    data: dict

    def __post_init__(self):
        check_kind(self.data)

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Reads a JSON report, or report.json in a folder. ValueError for what is none."""
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: is no JSON ({error})") from None
        try:
            return cls(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @property
    def settings(self) -> dict:
        """What was asked for."""
        return self.data["settings"]

    @property
    def rows(self) -> list[dict]:
        """A row for each variant, context and batch."""
        return self.data["rows"]

    @property
    def variants(self) -> list[str]:
        """Names, in order; the first one is what the others are compared with."""
        return [variant["name"] for variant in self.settings["variants"]]

    def row(self, variant: str, context: int, batch: int) -> dict | None:
        """The row if it was measured."""
        for one in self.rows:
            if (one["variant"], one["context"], one["batch"], one["status"]) == (
                variant,
                context,
                batch,
                MEASURED,
            ):
                return one
        return None

    def ratio(self, row: dict, phase: str, key: str = "ms_p50") -> float | None:
        """The first variant's value over this row's, in the same context and batch: above 1 is
        faster, or smaller.
        """
        first = self.row(self.variants[0], row["context"], row["batch"])
        if first is None or row["status"] != MEASURED or not row[phase][key]:
            return None
        return first[phase][key] / row[phase][key]

    @property
    def title(self) -> str:
        """The model, its dtype and the device, in one line."""
        model = self.data["model"]
        return (
            f"{self.settings['model']}: time and memory ({model['dtype']}, "
            f"{self.data['environment']['device']})"
        )

    @property
    def headline(self) -> str:
        """The finding in a sentence: what decodes fastest at the longest context, beside the first
        variant.
        """
        done = [row for row in self.rows if row["status"] == MEASURED]
        if not done:
            return "Nothing fits: " + "; ".join(_needs(row) for row in self.rows[:3]) + "."
        first = self.variants[0]
        paired = [
            row
            for row in done
            if row["variant"] != first and self.row(first, row["context"], row["batch"])
        ]
        lost = [row for row in self.rows if row["status"] != MEASURED]
        if not paired:
            last = max(
                done, key=lambda row: (row["context"], -row["batch"], row["decode"]["tokens_per_s"])
            )
            text = _alone(last)
        else:
            last = max(
                paired,
                key=lambda row: (row["context"], -row["batch"], row["decode"]["tokens_per_s"]),
            )
            text = self._beside(last, self.row(first, last["context"], last["batch"]))
        # the first one there
        worst = max(lost, key=lambda row: (row["context"], -row["batch"]), default=None)
        return text + (f"; {_needs(worst)}" if worst else "") + "."

    def _beside(self, row: dict, first: dict) -> str:
        name, base = row["variant"], first["variant"]
        fewer = first["decode"]["kv_read_bytes"] / max(row["decode"]["kv_read_bytes"], 1)
        size = 1 if fewer > AS_FAST else -1 if fewer < 1 / AS_FAST else 0
        speed, sooner = (
            faster(row["decode"], first["decode"]),
            faster(row["prefill"], first["prefill"]),
        )
        kv = (f"reads {times(1 / fewer)} more", "reads as many", f"reads {times(fewer)} fewer")[
            size + 1
        ]
        as_fast = (
            "is as fast as"
            if close(row["decode"], first["decode"])
            else "is, within the spread, as fast as"
        )
        as_soon = (
            "comes as soon"
            if close(row["prefill"], first["prefill"])
            else "comes, within the spread, as soon"
        )
        decode = {
            1: f"is {times(speed)} faster than",
            -1: f"is {times(1 / speed)} slower than",
            0: as_fast,
        }
        prefill = {
            1: f"comes {times(sooner)} sooner",
            -1: f"comes {times(1 / sooner)} later",
            0: as_soon,
        }
        link = "and" if size in (0, sign(speed)) else "but"
        return (
            f"Decode at {_where(row)}: {name} {kv} KV bytes {link} {decode[sign(speed)]} {base} "
            f"({_time(row['decode'])} against {_time(first['decode'])} a token); its first token "
            f"{prefill[sign(sooner)]} ({_time(row['prefill'])} against {_time(first['prefill'])})"
        )

    def summary(self) -> str:
        """The result as one line of JSON, for scripts: the finding, and the main numbers of every
        row.
        """
        shown = [main_numbers(self, row) for row in self.rows]
        return json.dumps(
            finite({"kind": KIND, "version": VERSION, "finding": self.headline, "rows": shown})
        )

    def table(self):
        """What a person wants on the terminal: the finding and the main table."""
        from rich.console import Group
        from rich.text import Text

        shown = [Text(self.title, style="bold"), Text(self.headline)]
        for one in (tables.main_table(self), tables.operation_table(self)):
            shown += ["", one.rich()]
        return Group(*shown, *(Text(note) for note in tables.notes(self)))

    def __rich__(self):
        return self.table()

    def to_json(self, path: Path | str | None = None) -> str:
        """Returns the text; with a path, writes it there too."""
        return _written(json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n", path)

    def to_markdown(self, path: Path | str | None = None) -> str:
        """Returns the text; with a path, writes it there too."""
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        blocks += [f"- {markdown_text(note)}" for note in tables.notes(self)]
        blocks += [table.markdown() for table in tables.every_table(self) if not table.folded]
        return _written("\n\n".join(blocks) + "\n", path)

    def to_html(self, path: Path | str | None = None) -> str:
        """Returns a self-contained page; with a path, writes it there too."""
        sections = [
            Section(
                "Time and memory",
                " ".join(tables.notes(self)),
                plots.against_context(self),
                [tables.main_table(self), tables.spread_table(self)],
            ),
            Section(
                "How far from the limit",
                plots.ROOFLINE_NOTE,
                plots.roofline(self),
                [tables.limit_table(self)],
            ),
            Section(
                "Where bytes and time go",
                plots.SHARES_NOTE,
                plots.shares(self),
                [tables.operation_table(self), tables.layer_table(self)],
            ),
            Section("Memory", tables.MEMORY_NOTE, plots.memory(self), [tables.memory_table(self)]),
            Section("Settings", "", [], tables.settings_tables(self)),
        ]
        return _written(page(self.title, self.headline, sections), path)

    def save(self, folder: Path | str) -> None:
        """Writes report.md, report.html and, last, report.json into `folder`: all of them or
        none.
        """
        files = {
            "report.md": self.to_markdown(),
            "report.html": self.to_html(),
            "report.json": self.to_json(),
        }
        write_all_atomic(folder, files)


def check_kind(data) -> None:
    """ValueError unless `data` is a measurement of this version."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind != KIND:
        raise ValueError(f"kind: got {kind!r}, a measurement has {KIND!r}")
    version = data.get("version")
    if version != VERSION:
        age = "a newer" if isinstance(version, int) and version > VERSION else "an older"
        raise ValueError(
            f"version: got {version!r}, from {age} effattn; this one reads {VERSION}: measure again"
        )
    lacks = [
        key for key in ("settings", "model", "rows", "peaks", "environment") if not data.get(key)
    ]
    if lacks:
        raise ValueError(f"the measurement lacks {', '.join(lacks)}: the file is damaged")


def faster(ours: dict, theirs: dict) -> float:
    """How many times faster, by medians; exactly 1 where the spreads overlap or nobody would
    notice.
    """
    ratio = theirs["ms_p50"] / ours["ms_p50"]
    overlap = ours["ms_p20"] <= theirs["ms_p80"] and theirs["ms_p20"] <= ours["ms_p80"]
    return 1.0 if overlap or close(ours, theirs) else ratio


def close(ours: dict, theirs: dict) -> bool:
    """Whether the medians differ by less than anybody would notice."""
    return 1 / AS_FAST < theirs["ms_p50"] / ours["ms_p50"] < AS_FAST


def sign(ratio: float) -> int:
    """1 above 1, -1 below, 0 at it."""
    return (ratio > 1) - (ratio < 1)


def _alone(row: dict) -> str:
    share = row["decode"]["bandwidth_share"]
    reached = "" if share is None else f", {100 * share:.0f} % of the read bandwidth measured here"
    return (
        f"Decode at {_where(row)}: {row['variant']} makes {row['decode']['tokens_per_s']:,.1f} "
        f"tokens/s over {data_size(row['kv_bytes_held'])} of KV cache "
        f"({row['decode']['bytes_per_s'] / 1e9:.1f} GB/s{reached}); its first token comes after "
        f"{_time(row['prefill'])}"
    )


def _needs(row: dict) -> str:
    return f"{row['variant']} at {_where(row)} does not fit: needs {data_size(row['needs_bytes'])}"


def _where(row: dict) -> str:
    return short_count(row["context"]) + (f" x {row['batch']}" if row["batch"] > 1 else "")


def times(ratio: float) -> str:
    """A ratio in words: "12x", "1.5x", "1.05x"."""
    return (
        f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 1.095 else f"{ratio:.2f}x"
    )


def _time(phase: dict) -> str:
    """The median of a phase in three digits: milliseconds, from 1,000 on seconds."""
    value, unit = (
        (phase["ms_p50"], "ms") if phase["ms_p50"] < 999.5 else (phase["ms_p50"] / 1000, "s")
    )
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _written(text: str, path: Path | str | None) -> str:
    if path is not None:
        write_text_atomic(path, text)
    return text
