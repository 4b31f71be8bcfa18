"""`convert_mla`: a model's keys and values as multi-head latent attention, in a new model of
transformers' DeepSeek-V3 class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import windows
from effattn.calibration.refit import OutputRefit
from effattn.calibration.tokens import check_calibration
from effattn.calibration.walk import Stream, Walk
from effattn.heads.converting import Observed, observe
from effattn.heads.gqa import check_swapped, describe_size
from effattn.heads.latent.ranks import full_rank
from effattn.heads.latent.spectrum import Spectrum, joint, key_weight, value_weight
from effattn.heads.mla import build
from effattn.heads.mla.report import MlaReport, report_of_mla
from effattn.heads.mla.rotary import Kept, Shared, shared, valid
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.anatomy import Layer
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite, require_here

Progress = Callable[[int, int], None]


def check_mla(parts: hf.Anatomy, rank: int, rope_dim: int | None) -> tuple[int, Kept]:
    """rope_dim (None: the size of a head), and what it means. ValueError for numbers that mean
    nothing in this model, naming those that do; Unsupported for models that the class lacks."""
    build.check(parts)
    one = parts.layers[0]
    most = min(map(full_rank, parts)) + 1
    if type(rank) is not int or not 2 <= rank <= most:
        raise ValueError(f"mla: rank: got {rank!r}, valid is 2 to {most}, one of them a constant")
    known = valid(one.head_dim // 2, one.kv_heads)
    rope_dim = one.head_dim if rope_dim is None else rope_dim
    if type(rope_dim) is not int or rope_dim not in known:
        nearest = min(known, key=lambda size: abs(size - rope_dim)) if type(rope_dim) is int else ""
        said = f" (nearest: {nearest})" if nearest else ""
        raise ValueError(
            f"mla: rope_dim: got {rope_dim!r}{said}, valid are {', '.join(map(str, known))}"
        )
    return rope_dim, known[rope_dim]


def convert_mla(
    model,
    calibration: Tensor,
    *,
    rank: int,
    rope_dim: int | None = None,
    refit: bool = True,
    length: int = 512,
    batch: int = 8,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, MlaReport]:
    """A new model of transformers' DeepSeek-V3 class that does what `model` does with a cache of
    rank + rope_dim numbers a token and layer, and a report; `model` stays as it is.

    model: a transformers Llama or Mistral without windows. rank: numbers of a latent, one of which
    is a constant. rope_dim: dimensions that keep their position, shared by all heads: a head's own
    size by default; the size divided, where neighbouring frequencies become one, or multiplied, up
    to the number of key/value heads, where nothing is lost. calibration: int64 (N,), at least ten
    tokens per hidden dimension. refit, length, batch, bos, progress: as for `effattn.convert_gqa`.
    `model.save_pretrained` writes a checkpoint that needs nothing of effattn.

    Raises ValueError for bad arguments, effattn.errors.Unsupported for models that the class cannot
    hold, both before any work, and FloatingPointError for activations that are not finite."""
    require_own_weights(model)
    parts = hf.of(model)
    require_here(model, "multi-head latent attention")
    rope_dim, kept = check_mla(parts, rank, rope_dim)
    length = check_calibration(calibration, parts, length)
    check_swapped(parts, "contiguous")
    check_finite(model)
    before = describe_size(parts)
    training = model.training
    model.eval()
    try:
        batches = windows(calibration, length, batch, bos_of(model, bos))
        new, rows = _convert(parts, batches, Asked(rank, rope_dim, kept, refit), progress)
    finally:
        model.train(training)
    settings = {
        "rank": rank,
        "rope_dim": rope_dim,
        "refit": refit,
        "calibration_tokens": len(calibration),
        "calibration_source": None,
        "calibration_length": length,
        "bos": bos_of(model, bos) is not None,
        "uptrain_tokens": 0,
    }
    return new, report_of_mla(parts, new, settings, before, rows)


@dataclass(frozen=True)
class Asked:
    """What is asked of a conversion, checked."""

    rank: int
    rope_dim: int
    kept: Kept
    refit: bool


def _convert(
    parts: hf.Anatomy, batches: list[Tensor], asked: Asked, progress: Progress | None
) -> tuple[nn.Module, list[dict]]:
    """The new model, and a row of facts for each layer: those of a conversion to latents, and
    norm_remains, by what share the latent's norm scales tokens otherwise than it should."""
    walk, kept = Walk(parts, batches), asked.kept
    rope = parts.layers[0].rotary.rope()
    inv_freq = rope.inv_freq[:: kept.fold].repeat_interleave(kept.each)
    new = build.empty(parts, asked.rank, asked.rope_dim, inv_freq)

    def step(layer: Layer, teacher: Stream, student: Stream) -> dict:
        seen = observe(walk, layer, teacher)
        moment = seen.moment.to(layer.k.like.device)
        turning = shared(layer, moment, rope.inv_freq, kept)
        found = spectrum(layer, moment, turning)
        factors = found.factors(min(asked.rank - 1, len(found.energy)))
        block = new.model.layers[layer.index]
        made = build.Attention(turning, factors, layer.rotary.rope())
        remains = build.write(block.self_attn, layer, made, moment)
        lost = float(found.shares[asked.rank - 1 :].sum())
        row = {"layer": layer.index, "rank": asked.rank, "lost": lost, "norm_remains": remains}
        return row | _refit(new, layer.index, student, seen, asked.refit)

    return new, walk.over("mla", step, streams=2, progress=progress)


def spectrum(layer: Layer, moment: Tensor, turning: Shared) -> Spectrum:
    """Of the keys that have no position, as much as they count, and the values."""
    weights, share = key_weight(layer, moment, None), turning.mean.abs().square()
    real, imaginary = layer.rotary_pairs()
    each = torch.ones(layer.head_dim, dtype=moment.dtype, device=moment.device)
    each[real] = each[imaginary] = share.to(each)
    key_weights = weights * each.sqrt()[:, None] * each.sqrt()
    value = layer.v.with_bias.to(moment)
    return joint(turning.rest, value, key_weights, value_weight(layer).to(moment), moment)


@torch.no_grad()
def _refit(new: nn.Module, index: int, student: Stream, seen: Observed, refit: bool) -> dict:
    """Solves a new layer's output projection for what the old one gave, on the new model's own
    activations, which it moves one layer on."""
    block, fit = new.model.layers[index], OutputRefit()
    output = block.self_attn.o_proj

    def run(states: Tensor) -> Tensor:
        states = states.to(output.weight.device)
        places = torch.arange(states.shape[1], device=states.device)[None]
        turns = new.model.rotary_emb(states, places)
        return block(states, position_embeddings=turns, attention_mask=None)

    for number, states in enumerate(student.source):
        given: list[Tensor] = []
        handle = output.register_forward_pre_hook(lambda _, args, to=given: to.append(args[0]))
        try:
            run(states)
        finally:
            handle.remove()
        wanted = seen.wanted(number, student.source).to(output.weight.device)
        fit.add(given.pop().flatten(0, -2), wanted)
    row = {"attention_error_merged": fit.error(output.weight), "attention_error": None}
    if refit:
        output.weight.copy_(fit.solve(output.weight))
        row["attention_error"] = fit.error(output.weight)
    for number, states in enumerate(student.source):
        student.sink[number] = run(states).cpu()
    return row
