"""Making a plain model what a checkpoint's record says it is: for `effattn.load`, and for plain
`from_pretrained` (`effattn.plugin.loading`).

    record = take(config)          # off the config of the plain model
    shape(record, model)           # the new, empty model's modules
    ...                            # weights are read
    finish(record, model, folder)  # pattern, positions, cache, and what they learned"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from effattn.hf import latents, trusted, uneven
from effattn.projections import packed
from effattn.surgery import codebooks, record, replace, swapping

AXES = ("pattern", "positions", "cache")  # what is hung on a plain model
SHAPES = ("heads", "projections", "packed")  # what makes its modules others


def take(config, checked: bool = True) -> dict:
    """What a config says of a swap, taken off it; {} where nothing.

    "trained" is the model before its rule was written in plain terms: it is put back. checked:
    whether `trusted.check_config` has seen it; else ValueError for what no save writes."""
    again = config.__dict__.pop(trusted.KEY, {})
    if not checked:
        if not again and not uneven.overrides(config):
            raise ValueError(trusted.NO_RECORD)
        if not again:
            return again
        kind = trusted.KEY if "model_type" in again else config.model_type
        trusted.check_record(again, config.to_dict() | {"model_type": kind})
    for field, value in again.get("trained", {}).items():
        setattr(config, field, value)
    return again


def shape(again: dict, model: nn.Module) -> None:
    """Makes a new model's modules what the checkpoint holds; their weights mean nothing yet."""
    latents.rebuild(model, again.get("heads", {}))
    replace.rebuild(model, again.get("projections", {}))
    packed.rebuild(model, again.get("packed", {}))


def finish(again: dict, model: nn.Module, name: str | None) -> nn.Module:
    """Swaps the loaded model, and fills what its methods learned from the checkpoint `name` (a
    folder or hub name; None: there is no file). Returns the model."""
    if "packed" in again:
        packed.check(model)
    hang(again, model)
    # what was learned for a swap that config.json does not have is refused, too
    if name is not None and (again.keys() & set(AXES) or Path(name).is_dir()):
        record.load_learned(model, name)
    if "heads" in again or not again.keys() & set(AXES):  # a swap has marked it
        record.mark(model)
    return model


def hang(again: dict, model: nn.Module) -> nn.Module:
    """Puts pattern, positions and cache on a model; what its methods learned is filled later.
    Returns the model."""
    axes = {axis: again[axis] for axis in AXES if axis in again}
    if axes:
        with codebooks.filled_later():
            swapping.swap(model, **axes)
    if "heads" in again:
        swapping.remember_latents(model)
    return model
