"""The report of `effattn extend`: what the rules promise, and what the chosen one did.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from effattn.extending.planner import NEEDED
from effattn.reports.common import about, begun_with
from effattn.reports.document import Document
from effattn.reports.plots import AFTER, NEUTRAL, UPTRAINED, Series, line_plot
from effattn.reports.tables import Table, number, pairs

KIND = "extend"
PLAN, ROTATION, QUALITY, TUNING, SEARCH = (
    "What each rule promises",
    "The model's rotation",
    "Quality",
    "Tuning",
    "Search for factors",
)


@dataclass
class ExtendReport(Document):
    """Wraps `data`, a dict of kind "extend": settings, plan (`effattn.extending.planner.Plan` as a
    dict), rule (spec, plain), model, quality (per stage and length: cross_entropy in nats a token,
    perplexity, accuracy), tuning, verification, environment. Without an output only the plan is
    filled."""

    data: dict
    kind = KIND
    named = "a report of extend"
    terminal = (PLAN, ROTATION, SEARCH, QUALITY)

    @property
    def plan(self) -> dict:
        """The plan's part of the data."""
        return self.data["plan"]

    @property
    def title(self) -> str:
        return (
            f"{self.data['settings']['model']}: from {self.plan['trained']:,} to "
            f"{self.plan['target']:,} tokens"
        )

    @property
    def headline(self) -> str:
        """What is recommended or was done, whether it needs tuning, and what came of it."""
        spec = self.data["rule"]["spec"]
        if not self.data["quality"]:
            text = (
                f"{spec}: {self.plan['reason']}" if self._recommended else f"{spec}, as asked for"
            )
        else:
            first, last = self.data["quality"][0], self.data["quality"][-1]
            before, after = (one["lengths"][-1]["cross_entropy"] for one in (first, last))
            fresh = first["lengths"][0]["cross_entropy"]
            text = (
                f"{spec}: at {self.plan['target']:,} tokens the loss is {after:.3f} nats a token "
                f"{last['stage']}, {before:.3f} before; in windows of {self.plan['trained']:,} it "
                f"was {fresh:.3f}"
            )
        return f"{text}. {self.tuning_note}"

    @property
    def tuning_note(self) -> str:
        """Whether fine-tuning is needed, in one sentence."""
        spec = self.data["rule"]["spec"]
        if self.data["tuning"]:
            return f"It was tuned on {self.data['tuning']['tokens']:,} tokens."
        found = next((one for one in self.plan["candidates"] if one["spec"] == spec), None)
        if found is None:
            return "Nothing is known here about its need for fine-tuning."
        if found["tuning"] == NEEDED:
            return "This rule NEEDS fine-tuning: give --tune-tokens."
        return f"Fine-tuning: {found['tuning']}" + (
            " (--tune-tokens)." if found["tuning"] == "helps" else "."
        )

    @property
    def _recommended(self) -> bool:
        return self.data["rule"]["spec"] == self.plan["recommended"]["spec"]

    def tables(self) -> list[Table]:
        """Every table, the plan first."""
        data = self.data
        found = [self._rules(), self._rotation(), self._wavelengths(), *self._quality()]
        if data["rule"].get("search"):
            found.append(self._search(data["rule"]["search"]))
        if data["tuning"]:
            told = {name: it for name, it in data["tuning"].items() if name != "losses"}
            found.append(pairs(TUNING, told | told.pop("speed", {})))
        if data["verification"]:
            found.append(pairs("Checkpoint, loaded again", data["verification"]))
        return [*found, *about(data)]

    def _rules(self) -> Table:
        rows = []
        for one in self.plan["candidates"]:
            mark = " (recommended)" if one["spec"] == self.plan["recommended"]["spec"] else ""
            mark += (
                " (taken)"
                if one["spec"] == self.data["rule"]["spec"] and self.data["quality"]
                else ""
            )
            kind = "plain transformers" if one["plain"] else "effattn.load"
            rows.append(
                [
                    one["spec"] + mark,
                    one["tuning"],
                    "refused" if one["refused"] else kind,
                    one["refused"] or one["predicts"],
                ]
            )
        note = f"Recommended: {self.plan['recommended']['spec']}: {self.plan['reason']}."
        if where := layers_reached(self.plan):
            note += f" Rules go to layers {where}; the others keep the model's own positions."
        return Table(PLAN, ("Rule", "Fine-tuning", "Checkpoint", "What it promises"), rows, note)

    def _rotation(self) -> Table:
        plan, where = self.plan, layers_reached(self.plan)
        return pairs(
            ROTATION,
            {
                "trained_length": plan["trained"],
                "target": plan["target"],
                "factor": f"{plan['factor']:g}x",
                **({"layers that a rule goes to": where} if where else {}),
                "rule of the model": plan["own"],
                "base": plan["base"],
                "dimensions that turn": plan["dims"],
                "critical dimension (those that make a whole turn)": plan["turned"],
                "length by the law of RoPE extrapolation": f"{plan['length_law']:,.0f}",
                "longest wavelength (tokens)": f"{plan['wavelengths'][-1]:,.0f}",
            },
        )

    def _wavelengths(self) -> Table:
        plan = self.plan
        rows = [
            [
                str(2 * pair),
                f"{tokens:,.1f}",
                f"{plan['trained'] / tokens:,.2f}",
                f"{plan['target'] / tokens:,.2f}",
            ]
            for pair, tokens in enumerate(plan["wavelengths"])
        ]
        header = (
            "Dimension",
            "Wavelength (tokens)",
            "Turns within the trained length",
            "Turns within the target",
        )
        note = (
            "Where the third column is below 1, a longer sequence meets angles that were never "
            "trained."
        )
        return Table("Wavelengths", header, rows, note, folded=True)

    def _quality(self) -> list[Table]:
        if not self.data["quality"]:
            return []
        lengths = [cell["length"] for cell in self.data["quality"][0]["lengths"]]
        rows = [
            [
                row["stage"],
                *(
                    f"{number(cell['cross_entropy'])} ({100 * cell['accuracy']:.1f} %)"
                    for cell in row["lengths"]
                ),
            ]
            for row in self.data["quality"]
        ]
        settings = self.data["settings"]
        source = settings.get("evaluation_source", settings["source"])
        note = (
            "Cross-entropy in nats a token and, in brackets, next-token accuracy, on the same "
            f"held-out tokens ({source}) in windows of each length{begun_with(settings)}."
        )
        return [
            Table(QUALITY, ("Stage", *(f"{length:,} tokens" for length in lengths)), rows, note)
        ]

    def _search(self, found: dict) -> Table:
        """Where the search began, what it found, and both on prompts that it did not see."""
        rows = [[f"begun at {name}", number(nats), ""] for name, nats in found["starts"].items()]
        fresh = {name: number(nats) for name, nats in found["fresh"].items()}
        rows.append([f"found: {found['factors']}", number(found["nats"]), fresh["found"]])
        rows.append([f"yarn(length={self.plan['target']})", "", fresh["yarn"]])
        note = (
            f"Nats of an answer's token, {found['candidates']} candidates judged; factors that a "
            "search begins at have longrope's temperature, not their own. Other prompts: with what "
            "no candidate was judged by."
        )
        return Table(SEARCH, ("Factors", "Judged by", "Other prompts"), rows, note)

    def plots(self) -> dict[str, list[Markup]]:
        """Section -> its figures."""
        plan = self.plan
        dims = [2 * pair for pair in range(len(plan["wavelengths"]))]
        lines = [
            Series("wavelength", dims, plan["wavelengths"], AFTER),
            Series("trained length", dims, [plan["trained"]] * len(dims), NEUTRAL, "--", ""),
            Series("target", dims, [plan["target"]] * len(dims), UPTRAINED, ":", ""),
        ]
        found = {ROTATION: [line_plot("Wavelengths", lines, "dimension", "tokens", log_y=True)]}
        if self.data["tuning"] and len(self.data["tuning"]["losses"]) > 1:
            points = self.data["tuning"]["losses"]
            curve = Series(
                "training loss",
                [one["tokens"] for one in points],
                [one["loss"] for one in points],
                AFTER,
            )
            found[TUNING] = [line_plot("Tuning", [curve], "tokens", "nats a token")]
        return found


def layers_reached(plan: dict) -> str:
    """ "5, 11, 17 of 18": the layers that a plan's rules go to; "" where those are all."""
    reached, depth = plan.get("layers"), plan.get("depth")
    if reached is None or len(reached) == depth:
        return ""
    return f"{', '.join(map(str, reached))} of {depth}"
