"""Proof that a saved checkpoint is the model, and that it decodes from the quantized cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from effattn.hf.cache import new_cache
from effattn.surgery.checkpoint import load_again
from effattn.surgery.describing import describe

STEP = 16  # tokens that go in at a time


@torch.no_grad()
def verify(folder: Path, model: nn.Module, tokens: torch.Tensor) -> dict:
    """What loading the checkpoint in `folder` again shows, on tokens (N,) int64: its logits without
    a cache and, in steps, with the quantized one. RuntimeError when they differ from those of
    `model`.

    Returns what `load_again` says, "max_logit_difference_decoding" and "caches_after_loading", a
    cache's spec for each layer."""
    again, found = load_again(folder, model, tokens)
    ids = tokens[None].to(model.device)
    ours, theirs = (_decoded(one, ids) for one in (model, again))
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * float(ours.abs().max()):
        raise RuntimeError(
            f"the saved checkpoint decodes otherwise (largest logit difference {difference:.3g})"
        )
    caches = [layer["cache"] for layer in describe(again).layers]
    return found | {"max_logit_difference_decoding": difference, "caches_after_loading": caches}


def _decoded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, N, V) of ids (1, N), through a cache of the model's own."""
    cache = new_cache(model)
    pieces = ids.split(STEP, dim=1)
    found = [model(input_ids=one, past_key_values=cache, use_cache=True).logits for one in pieces]
    return torch.cat(found, dim=1)
