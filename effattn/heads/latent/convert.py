"""`convert_weights` gives a live model latent keys and values; its cache is the swap's business
(`effattn.surgery.latents`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn.calibration.tokens import check_calibration, tokens_needed
from effattn.heads.gqa import check_swapped
from effattn.heads.latent.converting import Conversion, check_layers, convert
from effattn.heads.latent.ranks import SIZES, Size
from effattn.heads.undo import all_or_nothing
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite, require_here


def check_latent(parts: hf.Anatomy, **options) -> None:
    """Everything about a conversion that can be known to be wrong without calibration tokens.
    Raises what `convert_weights` does."""
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
    check_latent(parts, rank=rank, bytes=bytes, ratio=ratio, energy=energy)
    if calibration is None:
        raise ValueError(
            f"calibration: got None, latent heads need tokens (int64, at least "
            f"{tokens_needed(parts):,})"
        )
    length = check_calibration(calibration, parts, length)
    check_swapped(parts, "contiguous")
    check_finite(model)
    size = Size(rank, bytes, ratio, energy)
    asked = Conversion(size, calibration, refit, length, batch, bos_of(model, bos))
    training = model.training
    model.eval()
    try:
        with all_or_nothing(parts) as undo:
            return convert(parts, asked, undo, progress)
    finally:
        model.train(training)
