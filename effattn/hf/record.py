"""What a checkpoint says about a swap: the entry "effattn" of its config.json, and the weights that a swap added."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from effattn.hf import caches, hooks, placement, positions
from effattn.hf import swap as swapping
from effattn.hf.source import KEY
from effattn.projections import packed, replace

LEARNED = "effattn.safetensors"  # the weights that plain transformers does not know


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state_dict that a swap added, by name."""
    added = {name: x for name, x in model.state_dict().items() if hooks.LEARNED_PARTS & set(name.split("."))}
    return {name: placement.fetched(model, name, tensor) for name, tensor in added.items()}


def once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without further names of the same tensor, which layers may share."""
    first: dict[tuple, str] = {}
    return {name: x for name, x in tensors.items() if first.setdefault((x.data_ptr(), x.shape), name) == name}


@torch.no_grad()
def load_learned(model: nn.Module, name: str) -> None:
    """Fills what a swap added from the checkpoint's file. ValueError unless names and shapes are the same."""
    wanted = once(learned(model))
    file = Path(name) / LEARNED
    if wanted and not Path(name).is_dir():
        from transformers.utils import cached_file

        file = Path(cached_file(name, LEARNED, _raise_exceptions_for_missing_entries=False) or file)
    saved = load_file(file) if file.is_file() else {}
    for what, names in (("missing", wanted.keys() - saved.keys()), ("unexpected", saved.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"weights: {LEARNED} does not fit the swap in config.json, {what}: {', '.join(sorted(names))}"
            )
    for key, tensor in wanted.items():
        if tensor.shape != saved[key].shape:
            raise ValueError(
                f"weights: {LEARNED}: {key}: got {tuple(saved[key].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[key])


def write(model: nn.Module, file: Path) -> None:
    """Adds to config.json what plain transformers would not know, or would get wrong, without it."""
    done = swapping.active(model)
    specs = {} if done is None else {i: spec for i, spec in done.specs.items() if not swapping.is_plain(spec)}
    config = json.loads(file.read_text())
    config.pop(KEY, None)
    more = {"pattern": {str(index): spec for index, spec in sorted(specs.items())}} if specs else {}
    more |= {} if done is None else caches.saved(done.caches)
    ours, plain = positions.saved(model)
    more |= ours
    config |= plain
    others = {"projections": replace.record(model), "packed": list(packed.layers_of(model))}
    if others := {name: record for name, record in others.items() if record}:
        more |= {"model_type": config["model_type"], **others}
        config["model_type"] = KEY
    if more:
        config[KEY] = more
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
