"""What the lanes of a run share: the model with each format, how many bytes that takes, and how
fast it decodes.

A lane is the model with one cache: the full one, one format in all layers, or a plan. All lanes
share the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from effattn.evaluate.loss import Progress
from effattn.evaluate.streaming import cache_bytes
from effattn.hf import anatomy
from effattn.hf.cache import new_cache
from effattn.hf.last_logits import last_only
from effattn.hf.placement import input_device
from effattn.measuring.measurement import MEMORY_SHARE
from effattn.measuring.variants import Variant, build
from effattn.profiling.memory import available_bytes
from effattn.profiling.timing import Clock, alternate, pace, percentiles
from effattn.quant.formats import Format
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.state import PackedState
from effattn.specs import parse_layers

FULL, PLAN = "full", "plan"
PREFILL = 512  # tokens of a prefill that go in at a time


@dataclass(frozen=True)
class Lane:
    """A name, and a cache as `effattn.swap` takes it: a spec, a dict from layers to specs, or None
    for the full one.
    """

    name: str
    cache: str | Mapping[str, str] | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def of(self, model: nn.Module) -> Lane:
        """The lane with its model: `model`'s weights and this cache. Raises what `effattn.swap`
        raises.
        """
        axes = {} if self.cache is None else {"cache": self.cache}
        return Lane(self.name, self.cache, build(model, Variant(self.name, axes)))

    def formats(self, parts: anatomy.Anatomy) -> list[Format | None]:
        """The format of each layer, fitted to its heads; None: full precision. ValueError where one
        does not fit.
        """
        specs: dict[int, str] = {}
        if self.cache is not None:
            whole = (
                {f"0-{len(parts.layers) - 1}": self.cache}
                if isinstance(self.cache, str)
                else self.cache
            )
            specs = parse_layers(whole, len(parts.layers), "cache")
        found = []
        for layer in parts.layers:
            spec = specs.get(layer.index, FULL)
            found.append(
                None if spec == FULL else Format.parse(spec).fit(layer.head_dim, layer.value_dim)[0]
            )
        return found

    def layer_bytes(self) -> list[float]:
        """Bytes that each layer's cache grows by with a token: 0 for rings of the model's own
        windows; where all are rings, those of a token that they hold. ValueError where a format
        does not fit."""
        parts = anatomy.of(self.model)
        sizes = [bytes_per_token(*pair) for pair in zip(parts, self.formats(parts), strict=True)]
        grow = [layer.window is None for layer in parts]
        pairs = zip(sizes, grow, strict=True)
        return [size if grows or not any(grow) else 0.0 for size, grows in pairs]


def adapted(parts: anatomy.Anatomy, spec: str) -> str:
    """What is different about a format in this model, "" if nothing is."""
    said = [Format.parse(spec).fit(layer.head_dim, layer.value_dim)[1] for layer in parts.layers]
    return "; ".join(dict.fromkeys(filter(None, said)))


def bytes_per_token(layer: anatomy.Layer, format: Format | None) -> float:
    """Of a packed token in one layer, keys and values, scales included; of a full one for None."""
    if format is None:
        return float(layer.kv_bytes_per_token)
    return format.bytes_per_token(layer.kv_heads, layer.head_dim, layer.value_dim)


def predicted_bytes(
    parts: anatomy.Anatomy, formats: Sequence[Format | None], tokens: int, batch: int = 1
) -> int:
    """Of all layers' keys and values after `tokens` tokens in each of `batch` rows, as the formats
    say; rings of the model's own windows hold no more than those.
    """
    total = 0
    for layer, format in zip(parts.layers, formats, strict=True):
        if format is None:
            # transformers' own ring leaves out the query's own token
            count = tokens if layer.window is None else min(tokens, layer.window - 1)
            total += batch * count * layer.kv_bytes_per_token
        else:
            own = layer.window
            state = PackedState(format) if own is None else PackedRing(format, own)
            sizes = (layer.kv_heads, layer.head_dim, layer.dtype.itemsize, layer.value_dim)
            total += state.predicted_bytes(tokens, batch, *sizes)
    return total


@torch.no_grad()
def prefilled(model: nn.Module, ids: torch.Tensor):
    """A new cache of `model` that holds ids (B, T), fed in chunks of `PREFILL` tokens."""
    cache, last = new_cache(model), last_only(model)
    for piece in ids.split(PREFILL, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, **last)
    return cache


def allocated(lane: Lane, tokens: Sequence[int], seed: int) -> list[dict]:
    """What the cache of one sequence holds after each number of `tokens`: {tokens, predicted, held,
    allocated}; held is what the layers say, allocated every storage that is kept alive."""
    parts = anatomy.of(lane.model)
    formats, rows = lane.formats(parts), []
    for count in tokens:
        cache = prefilled(lane.model, random_ids(lane.model, 1, count, seed))
        held = [getattr(layer, "nbytes", None) for layer in cache.layers]
        held = [
            layer.keys.nbytes + layer.values.nbytes if one is None else one
            for one, layer in zip(held, cache.layers, strict=True)
        ]
        rows.append(
            {
                "tokens": count,
                "predicted": predicted_bytes(parts, formats, count),
                "held": sum(held),
                "allocated": cache_bytes(cache),
            }
        )
    return rows


class _Steps:
    """A model that decodes from a cache of its own."""

    def __init__(self, model: nn.Module, cache, batch: int):
        self.model, self.cache = model, cache
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=input_device(model))

    @torch.no_grad()
    def step(self) -> None:
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].argmax(-1)


def decode_speed(
    lanes: Sequence[Lane],
    context: int,
    batches: Sequence[int],
    *,
    seconds: float,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> list[dict]:
    """Greedy single-token steps after `context` tokens, at each batch: the lanes take turns in one
    process.

    The prompt goes in once a lane; a batch has copies of it. Rows, by batch and then lane:
    {context, batch, lane, ms (median), ms_p20, ms_p80, tokens_per_s (of the whole batch), rounds,
    kv_bytes (of the whole batch, allocated)}; {context, batch, does_not_fit: bytes} where the
    caches of all lanes do not fit into memory together."""
    device, rows = input_device(lanes[0].model), []
    parts = anatomy.of(lanes[0].model)
    sizes = [predicted_bytes(parts, lane.formats(parts), context + steps) for lane in lanes]
    ids = random_ids(lanes[0].model, 1, context, seed)
    filled: dict[str, object] = {}
    for number, batch in enumerate(batches):
        need, free = (batch + 1) * sum(sizes), available_bytes(device)
        if free is not None and need > MEMORY_SHARE * free:
            rows.append({"context": context, "batch": batch, "does_not_fit": need})
            continue
        runs = {}
        for lane in lanes:
            if lane.name not in filled:
                filled[lane.name] = prefilled(lane.model, ids)
            cache = copy.deepcopy(filled[lane.name])
            if batch > 1:
                cache.batch_repeat_interleave(batch)
            runs[lane.name] = _Steps(lane.model, cache, batch)
        calls = {name: run.step for name, run in runs.items()}
        times = alternate(calls, Clock(device), seconds, least=min(3, steps), most=steps, warmup=1)
        for name, run in runs.items():
            found = percentiles(times[name])
            rows.append(
                {
                    "context": context,
                    "batch": batch,
                    "lane": name,
                    "ms": 1000 * found["p50"],
                    "ms_p20": 1000 * found["p20"],
                    "ms_p80": 1000 * found["p80"],
                    "rounds": found["rounds"],
                    "tokens_per_s": batch / pace(found),
                    "kv_bytes": cache_bytes(run.cache),
                }
            )
        if progress:
            progress(number + 1, len(batches))
    return rows


def random_ids(model: nn.Module, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """int64 (batch, tokens), on the model's device."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, table.shape[0], (batch, tokens), generator=generator).to(table.device)
