"""What a model is made of and how fast it is, before and after a shearing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from effattn.hf import anatomy as hf
from effattn.profiling.cost import model_cost
from effattn.profiling.decode import decode_by_context
from effattn.profiling.timing import Clock, alternate, pace, percentiles
from effattn.prune.shearing.masks import shapes
from effattn.surgery.describing import describe

SECONDS = 2.0  # how long each model's reading speed is measured


def axes_of(model: nn.Module) -> dict[str, int]:
    """Axis -> its size in every layer: hidden dimensions, key/value heads, FFN dimensions,
    layers."""
    return {axis: shape[-1] for axis, shape in shapes(hf.of(model)).items()}


def size_of(model: nn.Module, length: int) -> dict[str, int | float | None]:
    """What a model is made of, in numbers. FLOPs are those of a forward pass over a window of
    `length` tokens with all its logits; "file_bytes" is for those who know its files."""
    told = describe(model)
    flops = model_cost(model, 1, length, logits=length).total.flops / length
    layers = sum(told.parameters[part] for part in ("attention", "ffn", "norms"))
    return {
        "parameters": told.parameters["total"],
        "layer_parameters": layers,
        "file_bytes": None,
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "flops_per_token": flops,
    }


@torch.no_grad()
def speeds(
    parent: nn.Module,
    small: nn.Module,
    length: int,
    contexts: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Tokens/s "before" and "after", the models taking turns: reading a window of `length` tokens,
    and decoding at each context."""
    models = {"before": parent, "after": small}
    ids = torch.zeros(1, length, dtype=torch.int64, device=parent.device)
    calls = {
        name: lambda model=model: model(input_ids=ids, use_cache=False)
        for name, model in models.items()
    }
    times = alternate(calls, Clock(parent.device), seconds=SECONDS)
    rows = [
        {"what": f"reading {length} tokens"}
        | {name: length / pace(percentiles(seconds)) for name, seconds in times.items()}
    ]
    steps, tell = 1 + len(contexts), progress or (lambda done, total: None)
    tell(1, steps)
    decoded = (models, contexts, lambda done, _: tell(1 + done, steps))
    for row in decode_by_context(*decoded) if contexts else ():
        speed = {name: row[name].get("tokens_per_s") for name in models}
        rows.append({"what": f"decoding at {row['context']:,} tokens"} | speed)
    return rows
