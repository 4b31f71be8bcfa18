"""The conversion of a model's keys and values to latents, layer by layer.

As for fewer heads (`effattn.heads.converting`): the old layer runs on the old model's activations,
its keys and values are replaced, and its output projection is re-fitted on the activations of the
model converted so far. Where ranks are chosen, all spectra come first: one pass more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.calibration.attended import is_linear
from effattn.calibration.layerwise import windows
from effattn.calibration.walk import CHANGED, Stream, Walk
from effattn.errors import Unsupported
from effattn.heads.converting import Observed, measure_and_refit, observe
from effattn.heads.latent.ranks import Size
from effattn.heads.latent.spectrum import Factors, Spectrum, spectrum
from effattn.hf import latents
from effattn.hf.anatomy import Anatomy, Layer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What is asked of a conversion, checked. calibration (N,) int64, in windows of `length`,
    `batch` at a time; bos: the token that begins each, if one does."""

    size: Size
    calibration: Tensor
    refit: bool
    length: int
    batch: int
    bos: int | None = None

    @property
    def batches(self) -> list[Tensor]:
        """The calibration windows, int64 (batch, length) each."""
        return windows(self.calibration, self.length, self.batch, self.bos)


def check_layers(parts: Anatomy) -> None:
    """Unsupported, naming the reason, for a model whose keys and values cannot be latents."""
    for layer in parts:
        check_layer(type(parts.model).__name__, layer)


def check_layer(kind: str, layer: Layer) -> None:
    """The same for one layer; kind: what it is a part of, in words."""
    where = f"{kind} cannot have latent keys and values: layer {layer.index}"
    if not layer.causal:
        raise Unsupported(f"{where} is bidirectional, and an encoder remembers nothing")
    if layer.latent is not None:
        rank = layer.latent.rank
        raise Unsupported(f"{where} has them already, of rank {rank}; valid is its parent")
    if layer.family.fused:
        path = layer.family.k
        raise Unsupported(f"{where} makes q, k and v by one module ({path}), valid are three")
    if layer.clip is not None:
        raise Unsupported(
            f"{where} clips keys and values (clip_qkv={layer.clip}), after which a latent's "
            "weighted sum is no longer the values'"
        )
    for projection in (layer.q, layer.k, layer.v, layer.o):
        projection.by_head  # noqa: B018 - raises where there is none


def convert(walk: Walk, asked: Conversion, progress: Progress | None = None) -> list[dict]:
    """Converts every layer, and returns a row of facts for each.

    `teacher` are the activations of the model as it was, `student` those of the model converted so
    far."""
    chosen = asked.size.rank is None
    counted = Counted(progress, len(walk.parts.layers) * (2 if chosen else 1))
    shares = spectra(walk, counted.one_more) if chosen else None
    ranks = asked.size.choose(walk.parts, shares)

    def step(layer: Layer, teacher: Stream, student: Stream) -> dict:
        found, seen = _observed(walk, layer, teacher)
        rank = ranks[layer.index]
        install(layer, found.factors(rank))
        row = {"layer": layer.index, "rank": rank, "lost": float(found.shares[rank:].sum())}
        return row | measure_and_refit(walk, layer, student, seen, asked.refit)

    return walk.over(CHANGED, step, streams=2, changes=True, progress=counted.one_more)


def spectra(walk: Walk, tell: Progress = lambda done, total: None) -> list[Tensor]:
    """Each layer's spectrum as shares of its energy, (n,) fp64, descending."""

    def step(layer: Layer, teacher: Stream) -> list[float]:
        return _observed(walk, layer, teacher)[0].shares.tolist()

    found = walk.over("spectra", step, progress=tell)
    return [torch.tensor(one, dtype=torch.float64) for one in found]


def _observed(walk: Walk, layer: Layer, teacher: Stream) -> tuple[Spectrum, Observed]:
    """The spectrum of an old layer, and what was seen of it; moves `teacher` one layer on."""
    seen = observe(walk, layer, teacher)
    inputs = None if is_linear(layer) else seen.inputs
    return spectrum(layer, seen.moment.to(layer.k.like.device), inputs), seen


@torch.no_grad()
def install(layer: Layer, factors: Factors) -> None:
    """Puts the latent's modules in the places of k_proj and v_proj."""
    memory, key, value = latents.put(layer, len(factors.down))
    memory.down.weight.copy_(factors.down)
    key.weight.copy_(factors.key.flatten(0, 1))
    value.weight.copy_(factors.value.flatten(0, 1))
    key.bias.copy_(factors.key_bias.flatten())
    value.bias.copy_(factors.value_bias.flatten())


class Counted:
    """Tells `progress` of one step more, of `total`."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.done, self.total = progress, 0, total

    def one_more(self, *_: int) -> None:
        """A step is done."""
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)
