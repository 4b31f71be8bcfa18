"""The shape that a model is sheared to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from effattn.hf import anatomy as hf
from effattn.prune.shearing.masks import check_axes, shapes
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.sliced_config import sliced_config

NAMES = {
    "hidden": "hidden dimensions",
    "heads": "key/value heads a layer",
    "ffn": "FFN dimensions a layer",
    "layers": "layers",
}


@dataclass(frozen=True)
class Target:
    """How much of each axis stays; None leaves it as it is.

    hidden: dimensions of the residual stream. heads: key/value groups a layer, with all their query
    heads (for multi-head attention a group is a head). ffn: inner dimensions a layer. layers: how
    many. Whether a model can become that, `of` checks (ValueError, Unsupported)."""

    hidden: int | None = None
    heads: int | None = None
    ffn: int | None = None
    layers: int | None = None

    def of(self, parts: hf.Anatomy) -> dict[str, int]:
        """Axis -> what stays, for the axes that get smaller. Raises ValueError, naming what can be
        reached, for what this model cannot become, and Unsupported for axes that it cannot be cut
        along."""
        sizes = {axis: shape[-1] for axis, shape in shapes(parts).items()}
        wanted = {axis: value for axis, value in asdict(self).items() if value is not None}
        check_axes(parts, [axis for axis in wanted if axis not in sizes])
        for axis, value in wanted.items():
            if type(value) is not int or not 1 <= value <= sizes[axis]:
                raise ValueError(
                    f"target: {axis}: got {value!r}, the model has {sizes[axis]} {NAMES[axis]}; "
                    f"valid is 1 to {sizes[axis]}"
                )
        smaller = {axis: value for axis, value in wanted.items() if value < sizes[axis]}
        if not smaller:
            has = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ValueError(
                f"target: got {wanted or 'nothing'}, which removes nothing from a model of {has}; "
                "valid is less of at least one"
            )
        check_axes(parts, list(smaller))
        sliced_config(parts.model.config, _first(sizes, smaller))  # refuses what it cannot say
        return smaller


def _first(sizes: dict[str, int], smaller: dict[str, int]) -> Keep:
    """Keeps the first of everything: for checks of a shape before it is known what will stay."""
    kept = {axis: torch.arange(smaller.get(axis, size)) for axis, size in sizes.items()}
    rows = {
        axis: [kept[axis]] * len(kept["layers"]) for axis in ("heads", "ffn") if axis in smaller
    }
    return Keep(**rows, **{axis: kept[axis] for axis in ("hidden", "layers") if axis in smaller})
