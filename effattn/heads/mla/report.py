"""The report of a conversion to multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effattn.heads.latent.report import LatentReport, report_of
from effattn.hf.anatomy import Anatomy

__all__ = ["MlaReport", "report_of_mla"]


@dataclass
class MlaReport(LatentReport):
    """Wraps a dict of kind "convert_mla", whose entries are those of a conversion to latents."""

    kind = "convert_mla"
    plain = True

    @property
    def change(self) -> str:
        rank, rope_dim = self.settings.get("rank"), self.settings.get("rope_dim")
        return f"multi-head latent attention, {rank} numbers a token and layer and {rope_dim} keys"


def report_of_mla(
    parts: Anatomy, new: nn.Module, settings: dict, before: dict, rows: list[dict]
) -> MlaReport:
    """settings: what was asked. parts, before: of the old model, and of
    `effattn.heads.gqa.describe_size`. rows: a layer's facts."""
    numbers = settings["rank"] + settings["rope_dim"]
    after = {
        "parameters": sum(p.numel() for p in new.parameters()),
        "kv_bytes": len(rows) * numbers * new.dtype.itemsize,
    }
    return report_of(parts, settings, before, after, rows, MlaReport)
