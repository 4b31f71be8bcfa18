"""The report of a conversion to latents: that of a head conversion, with the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effattn.heads.report import ConversionReport
from effattn.hf.anatomy import Anatomy
from effattn.profiling.environment import environment
from effattn.reports.tables import Table, number


@dataclass
class LatentReport(ConversionReport):
    """Wraps a dict of kind "convert_latent", whose entries are those of a head conversion; its
    layers have `rank` and `lost`, the share of weighed energy that the latent leaves out."""

    kind = "convert_latent"
    plain = False

    @property
    def ranks(self) -> list[int]:
        """Numbers that each layer remembers of a token."""
        return [row["rank"] for row in self.data.get("layers") or []]

    @property
    def change(self) -> str:
        ranks = self.ranks
        if not ranks:
            return "latent keys and values"
        low, high = min(ranks), max(ranks)
        size = f"{low}" if low == high else f"{low} to {high}"
        return f"latent keys and values of {size} numbers a token and layer"

    def tables(self) -> list[Table]:
        """Those of a head conversion, and the ranks behind the first."""
        first, *rest = super().tables()
        rows = [
            [number(row["layer"]), number(row["rank"]), number(row["lost"])]
            for row in self.data.get("layers") or []
        ]
        note = "Lost: the share of the weighed energy of keys and values that a latent leaves out."
        return [first, Table("Ranks", ("Layer", "Rank", "Lost"), rows, note, folded=True), *rest]


def report_of(
    parts: Anatomy,
    settings: dict,
    before: dict,
    after: dict,
    rows: list,
    kind: type[LatentReport] = LatentReport,
) -> LatentReport:
    """settings: what was asked. before, after: of `effattn.heads.gqa.describe_size`. rows: of
    `effattn.heads.latent.convert.convert_weights`."""
    model: dict[str, Any] = {
        "model_type": parts.family,
        "layers": len(parts.layers),
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "head_dim": parts.head_dim,
        "hidden": parts.embeddings.weight.shape[1],
        "parameters_before": before["parameters"],
        "parameters_after": after["parameters"],
        "dtype": str(parts.embeddings.weight.dtype).removeprefix("torch."),
    }
    name = getattr(parts.config, "_name_or_path", "") or type(parts.model).__name__
    return kind(
        {
            "kind": kind.kind,
            "settings": {"model": name, **settings},
            "model": model,
            "quality": None,
            "uptraining": None,
            "layers": rows,
            "kv_bytes_per_token": {"before": before["kv_bytes"], "after": after["kv_bytes"]},
            "decode": [],
            "verification": None,
            "environment": environment(),
        }
    )
