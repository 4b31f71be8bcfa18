"""The report of an export: what was written, what the engine made of it, and what runs where."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.exporting.capabilities import ENGINES, table
from effattn.reports.document import Document
from effattn.reports.tables import Table, data_size, number, pairs, percent

KIND = "export"
CHECK, SPEED, PARTS = "In the engine", "Tokens a second", "What runs where"


@dataclass
class ExportReport(Document):
    """Wraps a dict of kind "export".

    settings (model, to, format, before), files (name -> bytes), weight_bytes (of the checkpoint),
    notes (what was done to fit the target), check (what the engine computes against ours; None
    where it was not run), speeds (a row for each context), environment."""

    data: dict
    kind = KIND
    named = "an export's report"
    terminal = ("Written", CHECK, SPEED)

    @property
    def title(self) -> str:
        settings = self.data["settings"]
        return f"{settings['model']}: exported for {ENGINES[settings['to']]}"

    @property
    def headline(self) -> str:
        size = sum(self.data["files"].values())
        said = f"{data_size(size)} in {len(self.data['files'])} files"
        check = self.data["check"]
        if check is None:
            return f"{said}; not run in {ENGINES[self.data['settings']['to']]} here."
        if "kl" in check:
            tokens = f"{check['equal_tokens']} of {check['tokens']} greedy tokens equal"
            return f"{said}; {check['engine']}: {tokens}, KL {number(check['kl'])} nats a token."
        far = number(check.get("max_logit_difference"))
        return f"{said}; {check['engine']}: logits differ by {far} at most."

    def tables(self) -> list[Table]:
        """What was written, what the engine makes of it, how fast, and what runs where."""
        # names of files are as they are, which `pairs` would not leave them
        written = [(name, data_size(size)) for name, size in self.data["files"].items()]
        written.append(("weights before", data_size(self.data["weight_bytes"])))
        written += [(f"note {place}", note) for place, note in enumerate(self.data["notes"], 1)]
        found = [Table("Written", ("Name", "Value"), written, facts=True)]
        if self.data["check"] is not None:
            found.append(pairs(CHECK, self.data["check"]))
        if self.data["speeds"]:
            rows = [
                [
                    number(row["context"]),
                    number(row["before"]),
                    number(row["after"]) + percent(row["before"], row["after"]),
                ]
                for row in self.data["speeds"]
            ]
            note = "Decoding, one sequence, on this machine's processors; both in one run."
            found.append(Table(SPEED, ("Context", "Before", "After"), rows, note))
        return [*found, Table(PARTS, ("Part", *ENGINES.values()), table(), facts=True)]
