"""`convert_weights` gives a live model latent keys and values; its cache is the swap's business
(`effattn.surgery.latents`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from effattn.calibration.tokens import check_calibration, tokens_needed
from effattn.calibration.walk import Walk
from effattn.errors import Unsupported
from effattn.heads.gqa import check_swapped, describe_size
from effattn.heads.kinds.base import Job
from effattn.heads.latent.converting import Conversion, check_layers, convert
from effattn.heads.latent.ranks import SIZES, Size
from effattn.heads.latent.report import LatentReport, report_of
from effattn.heads.undo import all_or_nothing
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite, require_here
from effattn.hf.source import unplain
from effattn.specs import format_spec


def check_latent(parts: hf.Anatomy, **options) -> None:
    """Everything about a conversion that can be known to be wrong without calibration tokens.
    Raises what `convert_weights` does."""
    if without := [str(layer.index) for layer in parts if not layer.attends]:
        raise Unsupported(
            f"heads: layers {', '.join(without)} have no attention, nor keys for latents; "
            "valid is a model whose layers all attend"
        )
    check_layers(parts)
    Size(**{name: options.get(name) for name in SIZES}).check(parts)


def convert_weights(
    model,
    calibration: torch.Tensor | None = None,
    *,
    rank: int | None = None,
    bytes: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    refit: bool = True,
    length: int = 512,
    batch: int = 8,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Makes keys and values of `model`, in place, functions of latents; returns a row for each
    layer: layer, rank, lost (the share of weighed energy that its latent leaves out),
    attention_error_merged and attention_error (before and after the re-fit).

    model: a transformers causal LM with q, k and v of their own. One of rank (numbers a token, in
    every layer), bytes (a token, all layers together), ratio (of what the cache takes now) and
    energy (share of the weighed energy that each layer keeps; the smallest ranks). For all but
    rank, each layer's is chosen from the spectra. calibration: int64 (N,), at least ten tokens per
    hidden dimension. refit, length, batch, bos, progress: as for `effattn.convert_gqa`.

    Raises ValueError for bad arguments and effattn.errors.Unsupported for models that cannot have
    it, before anything is changed; FloatingPointError for activations that are not finite. All or
    nothing."""
    require_own_weights(model)
    parts = hf.of(model)
    require_here(model, "latent heads")
    sizes = {"rank": rank, "bytes": bytes, "ratio": ratio, "energy": energy}
    token = bos_of(model, bos)
    asked = checked(parts, calibration, token, refit=refit, length=length, batch=batch, **sizes)
    check_swapped(parts, "contiguous")
    check_finite(model)
    training = model.training
    model.eval()
    try:
        with all_or_nothing(parts) as undo:
            return convert(Walk(parts, asked.batches, undo.remember), asked, progress)
    finally:
        model.train(training)


def checked(
    parts: hf.Anatomy,
    calibration: torch.Tensor | None,
    bos: int | None,
    *,
    refit: bool = True,
    length: int = 512,
    batch: int = 8,
    **size,
) -> Conversion:
    """What is asked of `convert_weights`, as it says; bos: the token itself. ValueError and
    Unsupported for what cannot be asked."""
    check_latent(parts, **size)
    if calibration is None:
        raise ValueError(
            f"calibration: got None, latent heads need tokens (int64, at least "
            f"{tokens_needed(parts):,})"
        )
    length = check_calibration(calibration, parts, length)
    return Conversion(Size(**size), calibration, refit, length, batch, bos)


def job(parts: hf.Anatomy, calibration: torch.Tensor, bos: int | None, **given) -> LatentJob:
    """`convert_weights` with the options `given`, on a walk. Raises as it does."""
    return LatentJob(checked(parts, calibration, bos, **given), describe_size(parts))


@dataclass(frozen=True)
class LatentJob(Job):
    """The conversion on a walk. before: of `describe_size`."""

    asked: Conversion
    before: dict

    @property
    def batches(self) -> list[torch.Tensor]:
        return self.asked.batches

    @property
    def settings(self) -> dict:
        asked = self.asked
        how = {"refit": asked.refit, "length": asked.length, "batch": asked.batch, "bos": asked.bos}
        return asdict(asked.size) | how

    def carry_out(self, walk: Walk, progress=None) -> list[dict]:
        return convert(walk, self.asked, progress)

    def config(self, config: dict, rows: list[dict]) -> dict:
        specs = {str(row["layer"]): format_spec("latent", {"rank": row["rank"]}) for row in rows}
        return unplain(config, {"heads": specs})

    def report(self, old: hf.Anatomy, new: hf.Anatomy, rows: list[dict]) -> LatentReport:
        asked = self.asked
        size = {name: value for name, value in asdict(asked.size).items() if value is not None}
        settings = size | {
            "refit": asked.refit,
            "calibration_tokens": len(asked.calibration),
            "calibration_source": None,
            "calibration_length": asked.length,
            "bos": asked.bos is not None,
            "uptrain_tokens": 0,
        }
        return report_of(new, settings, self.before, describe_size(new), rows)
