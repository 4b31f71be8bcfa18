"""`convert_latent`: keys and values become functions of a latent, and the cache holds latents.

    report = effattn.convert_latent(model, tokens, ratio=0.5)      # in place
    effattn.swap(model, heads="latent(ratio=0.5)", calibration=tokens)     # the same

The weights are `effattn.heads.latent`'s business, the cache that of the swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effattn.heads.gqa import describe_size
from effattn.heads.latent.convert import check_latent, convert_weights
from effattn.heads.latent.report import LatentReport, report_of
from effattn.hf import anatomy
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.surgery import plan as planning
from effattn.surgery.swapping import remember_latents


def convert_latent(
    model,
    calibration: torch.Tensor,
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
) -> LatentReport:
    """Gives `model`, in place, latent keys and values, and caches that hold them; returns a report.

    model: a transformers causal LM, whose layers without a swapped pattern get "dense". One of
    rank (numbers a token, in every layer), bytes (a token, in all layers together), ratio (of what
    the cache takes now) and energy (the share of the weighed energy of keys and values that each
    layer keeps). With bytes and ratio each layer's rank is chosen from the spectra, in steps of 8.
    calibration: int64 (N,), at least ten tokens per hidden dimension. refit: solve the output
    projections again by least squares. length, batch: of the calibration windows, in tokens, and
    how many at a time. bos: whether BOS takes the place of each one's first token (None: as the
    model's tokenizer does it). progress: called with (steps done, steps). `effattn.save` writes a
    checkpoint that `effattn.load` brings back.

    Raises ValueError for bad arguments and effattn.errors.Unsupported for what this model or its
    swapped patterns cannot have, both before anything is changed; and FloatingPointError for
    activations that are not finite. All or nothing."""
    require_own_weights(model)
    parts = anatomy.of(model)
    size: dict[str, Any] = {"rank": rank, "bytes": bytes, "ratio": ratio, "energy": energy}
    check_latent(parts, **size)
    planning.make(parts, None, {}, latent=True)
    before = describe_size(parts)
    rows = convert_weights(
        model,
        calibration,
        **size,
        refit=refit,
        length=length,
        batch=batch,
        bos=bos,
        progress=progress,
    )
    remember_latents(model)
    settings = {name: value for name, value in size.items() if value is not None} | {
        "refit": refit,
        "calibration_tokens": len(calibration),
        "calibration_source": None,
        "calibration_length": length,
        "bos": bos_of(model, bos) is not None,
        "uptrain_tokens": 0,
    }
    parts = anatomy.of(model)
    return report_of(parts, settings, before, describe_size(parts), rows)
