"""The report of a fit: the plan, what it harms beside uniform plans of the same bytes, and whether
it is faster.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from effattn.fitting import report_plots as plots
from effattn.fitting.budget import SAID
from effattn.reports.common import harness_tables
from effattn.reports.document import Document
from effattn.reports.page import Passage, Section, markdown_text, page
from effattn.reports.tables import Table, data_size, number, pairs

PLAN, PARENT = "the plan", "parent"
PLANS = "Plans"
LAYERS = "What each layer became"
HARM = "Harm by layer"
SEARCH = "Plans that were measured"
CURVE = "The whole curve"
AMOUNT = "Bytes, predicted and counted"
ROUNDED = 10  # times what another order of the same sums does: harm up to there is rounding


@dataclass
class FitReport(Document):
    """Wraps a dict of kind "fit": settings, model, budget {given, limits, context, batch},
    parent (totals), candidates, plan {layers, lines, predicted, counted, kl, additive, expected,
    gap, rounding, factors}, tried, plans, frontier, recovery, verification, environment."""

    data: dict
    built: nn.Module | None = field(default=None, repr=False)  # until it is saved
    kind = "fit"
    named = "a report of a fit"
    terminal = (PLANS, LAYERS, AMOUNT)

    @property
    def plan(self) -> dict:
        """The plan; {} of a curve alone."""
        return self.part("plan")

    @property
    def title(self) -> str:
        given = self.data["budget"]["given"]
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
        return f"{self.data['settings']['model']} within {told}"

    @property
    def headline(self) -> str:
        if not self.plan:
            return f"{len(self.data['frontier'])} budgets searched; nothing was saved."
        parent, predicted = self.data["parent"]["bytes"], self.plan["predicted"]["bytes"]
        said = (
            f"{data_size(predicted)} of {data_size(parent)} ({predicted / parent:.0%}) for "
            f"weights, cache and a step: KL {number(self.plan['kl'])} nats a token"
        )
        said = f"{said}{self.compared()}."
        return " ".join(filter(None, (said, self.recovered(), self.speed())))

    def compared(self) -> str:
        """How the plan's harm compares to the best uniform plan's: what rounding does is none."""
        best, rounding = self._best_uniform(), self.plan.get("rounding") or 0.0
        if self.plan["kl"] <= ROUNDED * rounding:
            same = best is not None and best["kl"] <= ROUNDED * rounding
            also = f"; so is that of {best['name']}" if same else ""
            return f", which is rounding ({number(rounding)} for another order of its sums){also}"
        if best is None or best["kl"] <= 0:
            return ""
        return (
            f", {self.plan['kl'] / best['kl']:.2f} of what {best['name']} has, the best uniform "
            "plan within the budget"
        )

    def recovered(self) -> str:
        """What distillation brought, or why there was none; "" where it was not asked for."""
        told = self.part("recovery") or {}
        if told.get("reason"):
            return f"{told['reason'][0].upper()}{told['reason'][1:]}."
        curve = told.get("curve")
        if not curve:
            return ""
        first, last = (number(point["perplexity"]) for point in (curve[0], curve[-1]))
        return (
            f"Distilled on {told['tokens']:,} tokens: perplexity {first} to {last}, the parent's "
            f"{number(told['parent']['perplexity'])}."
        )

    def speed(self) -> str:
        """Whether it decodes faster, and why."""
        rows = {row["name"]: row for row in self.data["plans"]}
        before, after = (rows.get(name, {}).get("ms") for name in (PARENT, PLAN))
        if not before or not after:
            return "Its speed was not measured."
        ratio, predicted = before / after, self.plan["predicted"]
        moved = self.data["parent"]
        bytes_of = {
            name: one["weight_bytes"] + one["cache_bytes"]
            for name, one in (("before", moved), ("after", predicted))
        }
        sizes = (data_size(bytes_of[name]) for name in ("after", "before"))
        read = f"a step reads {' instead of '.join(sizes)}"
        if ratio > 1.03:
            return f"It decodes {ratio:.2f}x as fast here: {read}."
        why = "unpacking what is packed costs more here than reading less saves"
        if not any("cache" in line or "weights" in line for line in self.plan["lines"]):
            why = "a step here is bound by something else than bytes"
        pace = "as fast as before" if ratio > 0.97 else f"{ratio:.2f}x as fast, which is slower"
        return f"It decodes {pace} here, although {read}: {why}."

    def _best_uniform(self) -> dict | None:
        uniform = [row for row in self.data["tried"] if row["name"]]
        return min(uniform, key=lambda row: row["kl"], default=None)

    # Tables
    # ---------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        found = []
        if self.plan:
            found += [self._plans(), self._layers(), self._bytes()]
        if self.data["frontier"]:
            found.append(self._curve())
        if self.plan:
            found.append(self._tried())
        return [*found, self._harm(), *self._about()]

    def _plans(self) -> Table:
        header = ("Plan", "Bytes", "KL (nats/token)", "Perplexity", "Same top token")
        header += ("Passkey", "Recall", "Step (ms)", "Tokens/s")
        rows = [
            (
                row["name"],
                data_size(row["bytes"]),
                number(row["kl"]),
                number(row["perplexity"]),
                f"{row['agreement']:.1%}",
                _share(row.get("passkey")),
                _share(row.get("recall")),
                number(row.get("ms")),
                number(row.get("tokens_per_s")),
            )
            for row in self.data["plans"]
        ]
        note = (
            "On held-out text that nothing was chosen on; packed caches are read as decoding reads "
            "them. Uniform plans: one axis, one value in all layers, the least harmful within the "
            "budget."
        )
        timed = [row["timed_at"] for row in self.data["plans"] if row.get("timed_at")]
        if timed:
            note += f" Steps were timed at {timed[0]:,} tokens, the models taking turns."
        return Table(PLANS, header, rows, note)

    def _layers(self) -> Table:
        rows = [
            (str(index), words or "as it was", number(harm))
            for index, (words, harm) in enumerate(
                zip(self.plan["layers"], self.plan["harm"], strict=True)
            )
        ]
        return Table(LAYERS, ("Layer", "Became", "Harm alone (nats/token)"), rows)

    def _bytes(self) -> Table:
        parent, predicted = self.data["parent"], self.plan["predicted"]
        counted = self.plan.get("counted") or {}
        names = ("weight_bytes", "cache_bytes", "bytes", "kv_bytes_per_token", "parameters")
        limits = self.data["budget"]["limits"]
        rows = [
            (
                SAID.get(name, "bytes of the cache"),
                number(parent[name]),
                number(limits.get(name)) if name in limits else "none",
                number(predicted[name]),
                number(counted.get(name)) if name in counted else "not counted",
            )
            for name in names
        ]
        budget = self.data["budget"]
        note = f"Context {budget['context']:,}, batch {budget['batch']}."
        if counted.get("tokens"):
            note += (
                f" The cache was counted at {counted['tokens']:,} tokens: "
                f"{counted['cache_at']:,} bytes, predicted {counted['predicted_at']:,}."
            )
        return Table(AMOUNT, ("What", "Parent", "Limit", "Predicted", "Counted"), rows, note)

    def _curve(self) -> Table:
        rows = [
            (
                f"{row['limit']:,.0f}",
                f"{row['taken']:,.0f}",
                number(row["kl"]),
                number(row["perplexity"]),
                row["uniform"] or "none fits",
                number(row["best_uniform"]),
            )
            for row in self.data["frontier"]
        ]
        header = ("Limit", "Taken", "KL (nats/token)", "Perplexity", "Best uniform", "Its KL")
        return Table(CURVE, header, rows, "On the text that plans are chosen on.")

    def _tried(self) -> Table:
        rows = [
            (
                row["name"] or f"solved for, round {number(row['round'])}",
                number(row["bytes"]),
                number(row["additive"]),
                number(row["expected"]),
                number(row["kl"]),
            )
            for row in self.data["tried"]
        ]
        factors = ", ".join(f"{axis} {value:g}" for axis, value in self.plan["factors"].items())
        expected, kl = self.plan["expected"], self.plan["kl"]
        off = abs(kl / expected - 1) if expected > 0 else 0.0
        note = (
            f"Factors in the end: {factors}. The plan was expected to harm {number(expected)} and "
            f"harms {number(kl)}: off by {off:.0%}. The solver's gap: {self.plan['gap']:.1%}."
        )
        header = ("Plan", "Bytes", "Sum of its parts", "Expected", "Measured")
        return Table(SEARCH, header, rows, note, folded=True)

    def _harm(self) -> Table:
        rows = [
            (
                f"{row['layer']}: {row['field'].replace('_', ' ')} {row['value']}",
                number(row["kl"]),
                number(row["perplexity"]),
                f"{row['agreement']:.1%}",
            )
            for row in self.data["candidates"]
        ]
        note = "Each candidate alone in its layer, re-fitted; the whole model's output."
        header = ("Candidate", "KL (nats/token)", "Perplexity", "Same top token")
        return Table(HARM, header, rows, note, folded=True)

    def _about(self) -> list[Table]:
        facts = {key: self._said(value) for key, value in self.data["settings"].items()}
        found = [*harness_tables(self.data), pairs("Settings", facts)]
        for title, name in (("Recovery", "recovery"), ("Proof", "verification")):
            if own := self.part(name):
                plain = {k: v for k, v in own.items() if not isinstance(v, list | dict)}
                found.append(pairs(title, plain))
        return [*found, pairs("Environment", self.data["environment"])]

    @staticmethod
    def _said(value) -> object:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value

    # The page
    # ---------------------------------------------------------------------------------------------

    def plots(self) -> dict[str, list]:
        found: dict[str, list] = {HARM: plots.harm(self.data)}
        if self.plan:
            found[PLANS] = plots.pareto(self.data, PLAN)
            found[LAYERS] = [plots.strip(self.plan["choices"], self.data["own"])]
        elif self.data["frontier"]:
            found[CURVE] = plots.pareto(self.data, PLAN)
        return found

    def to_markdown(self) -> str:
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        blocks += [passage.markdown() for passage in self._passages()]
        return "\n\n".join([*blocks, *(table.markdown() for table in self.tables())]) + "\n"

    def to_html(self) -> str:
        figures = self.plots()
        sections = [
            Section(table.title, "", figures.get(table.title, []), [table])
            for table in self.tables()
        ]
        for section in sections:
            if section.title == LAYERS:
                section.passages = self._passages()
        return page(self.title, self.headline, sections)

    def _passages(self) -> list[Passage]:
        lines = self.plan.get("lines") or []
        # comments, so that the whole can be copied and run
        said = "# These calls make it of the parent; `tokens`: the text that was searched on.\n"
        if (self.part("recovery") or {}).get("tokens"):
            said += "# What was distilled afterwards is in the checkpoint alone.\n"
        return [Passage("The plan in words", said, "\n".join(lines))] if lines else []


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0%}"
