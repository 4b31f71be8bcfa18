"""The report of a re-hosting: what the model became, and that it computes the same."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.profiling.environment import environment
from effattn.reports.common import about
from effattn.reports.document import Document
from effattn.reports.tables import Table, number, pairs

KIND = "rehost"
SAME = "The same logits"


@dataclass
class RehostReport(Document):
    """Wraps `data`, a dict of kind "rehost".

    settings; model ("before" and "after": class and model_type; parameters; dtype); logits
    (max_difference and max of the parent's, kl in nats a token, on "tokens"); verification, of
    the fresh process; environment."""

    data: dict
    kind = KIND
    named = "a re-hosting's report"
    terminal = (SAME, "Verification")

    @classmethod
    def of(cls, old, new, settings: dict, logits: dict) -> RehostReport:
        """Of both models. logits: of `measured`."""
        sides = {"before": old, "after": new}
        model: dict = {
            side: {"class": type(one).__name__, "model_type": one.config.model_type}
            for side, one in sides.items()
        }
        for side, one in sides.items():
            model[side]["parameters"] = sum(p.numel() for p in one.parameters())
        model["dtype"] = str(new.dtype).removeprefix("torch.")
        return cls(
            {
                "kind": KIND,
                "settings": settings,
                "model": model,
                "logits": logits,
                "verification": None,
                "environment": environment(),
            }
        )

    @property
    def title(self) -> str:
        model = self.data["model"]
        name = self.data["settings"]["model"]
        return f"{name}: {model['before']['class']} as {model['after']['class']}"

    @property
    def headline(self) -> str:
        found, model = self.data["logits"], self.data["model"]
        return (
            f"{model['before']['class']} is {model['after']['class']} now: over "
            f"{number(found['tokens'])} tokens, logits differ by at most "
            f"{number(found['max_difference'])} of {number(found['max'])} ({model['dtype']}), and "
            f"by {number(found['kl'])} nats a token."
        )

    def tables(self) -> list[Table]:
        model, found = self.data["model"], self.data["logits"]
        rows = [
            [name, str(model["before"][key]), str(model["after"][key])]
            for name, key in (("Class", "class"), ("model_type", "model_type"))
        ]
        counts = (number(model[side]["parameters"]) for side in ("before", "after"))
        rows.append(["Parameters", *counts])
        rows.append(["Largest difference of logits", "", number(found["max_difference"])])
        rows.append(["KL to the parent (nats/token)", "", number(found["kl"])])
        first = Table(SAME, ("", "Before", "After"), rows)
        tables = [first]
        if self.data.get("verification"):
            tables.append(pairs("Verification", self.data["verification"]))
        return [*tables, *about(self.data)]
