"""A model's cache in a file: what a run that is killed goes on from.

    write(cache, file, {"segment": 7})
    cache = effattn.new_cache(model)
    told = read(cache, file)                      # {"segment": 7}; the cache holds the same again

Tensors are safetensors, and numbers are JSON in the file's metadata; nothing else is kept: an empty
cache of the same model has the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from effattn.errors import Unsupported
from effattn.hf.state_layer import StateLayer
from effattn.states.base import State
from effattn.states.sizes import Sizes

HELD = ("keys", "values")  # of transformers' own layers
SEEN = "cumulative_length"  # of one with a window
SIZES = "sizes"
NUMBERS = (bool, int, str, type(None))


def holders(cache: DynamicCache) -> Iterator[tuple[str, object]]:
    """(name, what holds tokens) of every layer: a `State`, with those inside of it, or a layer of
    transformers'. Unsupported for any other kind."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StateLayer):
            yield from _states(f"{index}", layer.state)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            yield f"{index}", layer
        else:
            raise Unsupported(
                f"cache: layer {index} is a {type(layer).__name__}, which cannot be carried; valid "
                "are layers with keys and values, transformers' own or those of a swap"
            )


def _states(name: str, state: State) -> Iterator[tuple[str, State]]:
    if state.rows is not None:
        raise Unsupported("cache: rows with padding between their tokens; valid is no padding")
    yield name, state
    for own, value in vars(state).items():
        parts = value if isinstance(value, list) else [value]
        for at, part in enumerate(parts):
            if isinstance(part, State):
                yield from _states(f"{name}.{own}.{at}", part)


def detach(cache: DynamicCache) -> None:
    """Cuts the graph behind what is held: gradients of later calls end there."""
    for _, holder in holders(cache):
        if isinstance(holder, State):
            holder.change(Tensor.detach)
        elif holder.is_initialized:
            holder.keys, holder.values = holder.keys.detach(), holder.values.detach()


def _check_whole(cache: DynamicCache) -> None:
    """Unsupported where a state has tensors that are not its attributes: codes, pages, tokens by
    head. A file without them would be read as another memory."""
    for name, holder in holders(cache):
        if isinstance(holder, State):
            own = {id(x) for _, one in _states(name, holder) for x in vars(one).values()}
            if any(id(x) not in own for x in holder.tensors()):
                raise Unsupported(
                    f"cache: layer {name.split('.')[0]} holds a {type(holder).__name__}, which no "
                    "file takes; valid are full caches and those of bounded patterns, in the "
                    "model's dtype"
                )


def write(cache: DynamicCache, file: Path, told: dict) -> None:
    """Writes what the cache holds, and `told` (JSON), whole or not at all. Unsupported for a layer
    that `holders` does not know, or whose state is in codes or pages or evicts by head; OSError
    where it cannot be written."""
    _check_whole(cache)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, object] = {}
    for name, holder in holders(cache):
        for key, value in _kept(holder).items():
            where = f"{name}:{key}"
            if isinstance(value, Tensor):
                tensors[where] = value.detach().contiguous().cpu()
            else:
                numbers[where] = value
    # two names of one tensor are refused by safetensors: each has its own memory in the file
    tensors = {name: x.clone() for name, x in tensors.items()}
    metadata = {"numbers": json.dumps(numbers), "told": json.dumps(told)}
    partial = file.with_name(f".{file.name}.new")
    try:
        save_file(tensors, partial, metadata)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _kept(holder) -> dict[str, object]:
    """What of a state, or of a layer of transformers', goes into the file."""
    if not isinstance(holder, State):
        if not holder.is_initialized:
            return {}
        kept = {name: getattr(holder, name) for name in HELD}
        seen = getattr(holder, SEEN, None)
        return kept if seen is None else kept | {SEEN: seen}
    kept = {
        name: value for name, value in vars(holder).items() if isinstance(value, (Tensor, *NUMBERS))
    }
    if holder.sizes is not None:
        kept[SIZES] = [*holder.sizes[:4], str(holder.sizes.dtype).removeprefix("torch.")]
    return kept


def read(cache: DynamicCache, file: Path, device: torch.device | str = "cpu") -> dict:
    """Fills an empty cache of the same model; returns what `write` was told. ValueError for a file
    of another cache, OSError for none."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        numbers = json.loads(metadata.get("numbers", "{}"))
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    found: dict[str, dict[str, object]] = {}
    for where, value in (numbers | tensors).items():
        name, _, key = where.partition(":")
        found.setdefault(name, {})[key] = value.to(device) if isinstance(value, Tensor) else value
    known = dict(holders(cache))
    if not found.keys() <= known.keys():
        raise ValueError(f"{file}: it holds the cache of another model; delete it to start again")
    for name, kept in found.items():
        _fill(known[name], kept, file, torch.device(device))
    for layer in cache.layers:
        sizes = layer.state.sizes if isinstance(layer, StateLayer) else None
        if sizes is not None:
            like = torch.empty(0, dtype=sizes.dtype, device=sizes.device)
            layer.lazy_initialization(like, like)
    return json.loads(metadata.get("told", "{}"))


def _fill(holder, kept: dict, file: Path, device: torch.device) -> None:
    if not isinstance(holder, State):
        if kept:
            holder.lazy_initialization(kept["keys"], kept["values"])
    elif kept.get(SIZES) is not None:  # the parts of a state by head have none
        *counts, dtype = kept.pop(SIZES)
        # a place without a number, "cuda", is that of the tensors
        kept[SIZES] = Sizes(*counts, getattr(torch, dtype), torch.empty(0, device=device).device)
    for name, value in kept.items():
        if not hasattr(holder, name):
            raise ValueError(f"{file}: {name} belongs to another cache; delete it to start again")
        setattr(holder, name, value)
