"""The report of the arena: accuracy by pattern, against time and memory."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.reports.common import about
from effattn.reports.document import Document
from effattn.reports.plots import AFTER, BEFORE, UPTRAINED, Series, line_plot
from effattn.reports.tables import Table, data_size, number

KIND = "lra"
MIB = 1 << 20
ACROSS = (("ms", 1.0, "ms of the processor a step"), ("peak_bytes", MIB, "MiB that a step holds"))


@dataclass
class ArenaReport(Document):
    """Wraps `data`, a dict of kind "lra": settings; model (sizes of the encoder); rows (task,
    pattern, pretraining in steps, and what `effattn.arena.training.train` returns); environment."""

    data: dict
    kind = KIND
    named = "an arena's report"

    @property
    def rows(self) -> list[dict]:
        """Every row, in the order in which they were made."""
        return self.data["rows"]

    @property
    def tasks(self) -> list[str]:
        """The tasks, each once."""
        return list(dict.fromkeys(row["task"] for row in self.rows))

    @property
    def terminal(self) -> tuple[str, ...]:  # type: ignore[override]
        """All that was learned."""
        return tuple(self.tasks)

    @property
    def title(self) -> str:
        patterns = {row["pattern"] for row in self.rows}
        return f"Long Range Arena, drawn here: {len(patterns)} patterns in a small encoder"

    @property
    def headline(self) -> str:
        said = []
        for task in self.tasks:
            rows = [row for row in self._of(task) if not row["pretraining"]]
            best = max(rows, key=lambda row: row["accuracy"])
            quick = min(rows, key=lambda row: row["ms"])
            said.append(
                f"{task}, {best['tokens']} tokens: {best['pattern']} is right in "
                f"{best['accuracy']:.1%} (guessing: {best['majority']:.1%}); {quick['pattern']} "
                f"takes the least time, and is right in {quick['accuracy']:.1%}"
            )
        return "; ".join(said) + "."

    def tables(self) -> list[Table]:
        return [*map(self._table, self.tasks), *about(self.data)]

    def plots(self) -> dict[str, list]:
        """Accuracy against a step's time, and against its memory."""
        return {
            task: [self._pareto(task, key, unit, label) for key, unit, label in ACROSS]
            for task in self.tasks
        }

    def _of(self, task: str) -> list[dict]:
        return [row for row in self.rows if row["task"] == task]

    def _table(self, task: str) -> Table:
        header = ("Pattern", "Pretraining (steps)", "Accuracy", "Loss (nats)", "ms a step")
        header += ("Memory of a step", "Parameters")
        rows = [
            [
                row["pattern"],
                number(row["pretraining"]),
                f"{row['accuracy']:.1%} ± {row['error']:.1%}",
                number(row["loss"]),
                number(row["ms"]),
                data_size(row["peak_bytes"]),
                number(row["parameters"]),
            ]
            for row in sorted(self._of(task), key=lambda row: -row["accuracy"])
        ]
        first = self._of(task)[0]
        steps = self.data["settings"]["steps"]
        note = (
            f"{first['tokens']} tokens an input, {steps:,} steps of "
            f"{self.data['settings']['batch']}; guessing is right in {first['majority']:.1%}. Time "
            "is the processor's."
        )
        return Table(task, header, rows, note)

    def _pareto(self, task: str, key: str, unit: float, label: str):
        """Every row as a point, and the line of those that no other is better than in both."""
        groups = (
            ("from scratch", BEFORE, "o", lambda row: not row["pretraining"]),
            ("pretrained on its inputs", UPTRAINED, "s", lambda row: row["pretraining"]),
        )
        series = []
        for name, color, marker, wanted in groups:
            rows = [row for row in self._of(task) if wanted(row) and row[key]]
            if rows:
                x = [row[key] / unit for row in rows]
                y = [row["accuracy"] for row in rows]
                series.append(Series(name, x, y, color, style="none", marker=marker))
        front = pareto([row for row in self._of(task) if row[key] and not row["pretraining"]], key)
        x, y = [row[key] / unit for row in front], [row["accuracy"] for row in front]
        names = ", ".join(row["pattern"].partition("(")[0] for row in front)
        series.append(Series(f"best from scratch: {names}", x, y, AFTER, marker=""))
        return line_plot(f"{task}: accuracy against {label}", series, label, "accuracy")


def pareto(rows: list[dict], key: str) -> list[dict]:
    """Those with a better accuracy than all that take less of `key`, which goes up."""
    front: list[dict] = []
    for row in sorted(rows, key=lambda row: (row[key], -row["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front
