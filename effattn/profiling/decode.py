"""How fast models decode: greedy single-token steps at a given cache length, several models side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from effattn.errors import Unsupported
from effattn.hf.families import trained_length
from effattn.hf.placement import input_device
from effattn.hf.state_layer import StateLayer
from effattn.profiling.memory import available_bytes
from effattn.profiling.timing import Clock, pace, percentiles
from effattn.states.latent import LatentState

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# of the available memory may be filled; the rest is for logits, activations and others
MEMORY_SHARE = 0.9


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values that `cache` holds now, over all layers and the batch."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer) -> int:
    if isinstance(layer, StateLayer):
        return layer.nbytes
    return 0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes


@torch.no_grad()
def one_token_cache(model, batch: int) -> Cache:
    """The cache that the model itself makes, after one token per row: it tells each layer's kind,
    shape and dtype.
    """
    device = input_device(model)
    cache = model(
        input_ids=torch.zeros(batch, 1, dtype=torch.long, device=device), use_cache=True
    ).past_key_values
    for index, layer in enumerate(getattr(cache, "layers", None) or [cache]):
        latent = isinstance(layer, StateLayer) and type(layer.state) is LatentState
        if type(layer) not in PLAIN_LAYERS and not (latent and not layer.state.evicts):
            raise Unsupported(
                f"decode_speed: the cache of layer {index} is a {type(layer).__name__}; it knows "
                f"how to fill and rewind {' and '.join(kind.__name__ for kind in PLAIN_LAYERS)}"
            )
    return cache


def _needs(cache: Cache, context: int) -> tuple[int, int]:
    """(KV bytes at `context` tokens, bytes a step needs) from a one-token cache. A step holds
    copies of one layer.
    """
    # transformers' ring holds a token less than the window
    layers = [
        _layer_bytes(layer) * min(context, getattr(layer, "sliding_window", context + 1) - 1)
        for layer in cache.layers
    ]
    return sum(layers), sum(layers) + 4 * max(layers)


def fill(cache: Cache, context: int, generator: torch.Generator) -> None:
    """Replaces what `cache` holds (one token) by `context` tokens of random keys and values, layer
    by layer.
    """
    for layer in cache.layers:
        if isinstance(layer, StateLayer):  # latents
            layer.state.fill(context, generator)
            continue
        if layer.keys is None:  # shares another layer's keys and values
            continue
        new = []
        for one in (layer.keys, layer.values):
            shape = (*one.shape[:-2], context, one.shape[-1])
            new.append(torch.randn(shape, generator=generator, device=one.device, dtype=one.dtype))
        layer.reset()
        layer.update(*new)


class _Lane:
    """One model with its filled cache: a step decodes a token and puts the cache back to `context`
    tokens.
    """

    def __init__(self, model, context: int, batch: int, seed: int):
        self.model, self.context, self.cache = model, context, one_token_cache(model, batch)
        self.device = input_device(model)
        fill(self.cache, context, torch.Generator(self.device).manual_seed(seed))
        self.bytes = kv_bytes(self.cache)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        # A learned position table ends somewhere; the time does not depend on which position is
        # looked up.
        longest = trained_length(model.config) or context + 1
        self.position = torch.full_like(self.token, min(context, longest - 1))
        self.clock = Clock(self.device)
        if any(isinstance(layer, StateLayer) for layer in self.cache.layers):
            self.position = None  # its own attention counts, and would miss the tokens left out
        self.seconds: list[float] = []

    def step(self) -> float:
        """Seconds of one forward of one token per row plus its argmax, from a cache of `context`
        tokens.
        """
        # A sliding layer that dropped tokens cannot be cropped: keep what it held (updates make new
        # tensors, no copy).
        held = [
            (layer, layer.keys, layer.values) for layer in self.cache.layers if layer.is_sliding
        ]

        def put_back() -> None:
            for layer, keys, values in held:
                layer.keys, layer.values, layer.cumulative_length = keys, values, self.context
            for layer in self.cache.layers:
                if not layer.is_sliding:
                    layer.crop(-1)

        seconds = self.clock(self._forward, undo=put_back)
        put_back()
        lengths = {layer.get_seq_length() for layer in self.cache.layers if _layer_bytes(layer)}
        if lengths != {self.context}:
            raise RuntimeError(f"the cache holds {lengths} tokens after a step, not {self.context}")
        return seconds

    def _forward(self) -> None:
        logits = self.model(
            input_ids=self.token,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.token = logits[:, -1:].argmax(-1)

    def row(self) -> dict:
        """p20, p50 and p80 in milliseconds over all timed steps; tokens/s of the whole batch at the
        median; the host's milliseconds where there is a GPU.
        """
        found = percentiles(self.seconds)
        host = {"host_ms": 1000 * found["host_p50"]} if "host_p50" in found else {}
        return {
            **{f"ms_{key}": 1000 * found[key] for key in ("p20", "p50", "p80")},
            **host,
            "tokens_per_s": len(self.token) / pace(found),
            "kv_bytes": self.bytes,
        }


@contextmanager
def _evaluating(models: dict[str, torch.nn.Module]) -> Iterator[None]:
    training = [model for model in models.values() if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


@torch.no_grad()
def _time_group(
    group: dict[str, torch.nn.Module], context: int, batch: int, steps: int, repeats: int, seed: int
) -> dict[str, dict]:
    lanes = {name: _Lane(model, context, batch, seed) for name, model in group.items()}
    for _ in range(repeats):
        for step in range(-1, steps):  # step -1 warms up: allocator, kernels' first calls
            for lane in lanes.values():
                seconds = lane.step()
                if step >= 0:
                    lane.seconds.append(seconds)
    return {name: {**lane.row(), "alternated": len(lanes) > 1} for name, lane in lanes.items()}


def decode_speed(
    models: dict[str, torch.nn.Module],
    contexts: list[int],
    batch: int = 1,
    steps: int = 16,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Measured greedy decoding speed of each model at each context length (tokens already in the KV
    cache).

    How it is timed: the cache the model itself makes is filled with `context` random keys and
    values (no prefill: the time does not depend on the values; lengths beyond the trained positions
    are fine). A timed step is one eager forward of one token per row plus its argmax, wall clock on
    a CPU, the device's own time on a GPU (`timing.Clock`); the cache is then cropped, so every step
    starts from exactly `context` tokens. The models take turns step by step, so slow drift (clock,
    temperature, other jobs) hits all alike; each also finds the processor's caches as the other
    left them. `repeats` rounds of one warm-up and `steps` timed steps; percentiles are over all of
    them. Transformers' DynamicCache copies a layer's keys and values at every step, as in
    `generate()`: that is included.

    Rows, by context and then in the models' order: {"context", "batch", "model", "ms_p20",
    "ms_p50", "ms_p80" (milliseconds a step), "host_ms" (of a GPU's steps: what launching one takes
    the host), "tokens_per_s" (of the whole batch, at the median of the slower of both), "kv_bytes"
    (of the whole batch, at `context` tokens), "alternated"}. "alternated" is False if the models'
    caches fit only one at a time. A row whose cache does not fit at all is {"context", "batch",
    "model", "kv_bytes", "does_not_fit": bytes it would need}. `progress` is called with (contexts
    done, contexts)."""
    if not models:
        raise ValueError("models: got none, give at least one as {name: model}")
    for argument, value in [
        ("contexts", min(contexts, default=0)),
        ("batch", batch),
        ("steps", steps),
    ]:
        if value < 1:
            raise ValueError(f"{argument}: got {value}, needs to be at least 1")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, needs to be at least 1")
    devices = {input_device(model) for model in models.values()}
    rows = []
    with _evaluating(models):
        probes = {name: one_token_cache(model, batch) for name, model in models.items()}
        for number, context in enumerate(contexts):
            needs = {name: _needs(probe, context) for name, probe in probes.items()}
            free = {device: available_bytes(device) for device in devices}
            room = min(
                (MEMORY_SHARE * bytes_ for bytes_ in free.values() if bytes_ is not None),
                default=float("inf"),
            )
            fitting = {name: model for name, model in models.items() if needs[name][1] <= room}
            together = sum(needs[name][1] for name in fitting) <= room
            groups = [fitting] if together else [{name: model} for name, model in fitting.items()]
            measured: dict[str, dict] = {}
            for group in groups:
                try:
                    measured |= _time_group(group, context, batch, steps, repeats, seed)
                except torch.OutOfMemoryError:
                    # the estimate was too low: nothing of this group is reported as timed
                    torch.cuda.empty_cache()
            for name in models:
                missing = {"kv_bytes": needs[name][0], "does_not_fit": needs[name][1]}
                rows.append(
                    {
                        "context": context,
                        "batch": batch,
                        "model": name,
                        **measured.get(name, missing),
                    }
                )
            if progress:
                progress(number + 1, len(contexts))
    return rows


def decode_by_context(
    models: Mapping[str, torch.nn.Module], contexts: Sequence[int], progress=None
) -> list[dict]:
    """`decode_speed` of one batch, a row a context: {"context", "batch", and by each model's name
    what was measured of it}."""
    rows: dict[int, dict] = {}
    for row in decode_speed(models, list(contexts), progress=progress):
        entry = rows.setdefault(row["context"], {"context": row["context"], "batch": row["batch"]})
        entry[row["model"]] = {
            key: value for key, value in row.items() if key not in ("context", "batch", "model")
        }
    return list(rows.values())


def rows_by_context(
    models: Mapping[str, torch.nn.Module], contexts: Sequence[int], progress=None
) -> list[dict]:
    """The same with whole rows, as the reports of pruning have them: {"context", and by each
    model's name its row of `decode_speed`, without "model"}."""
    rows: dict[int, dict] = {}
    for row in decode_speed(models, list(contexts), progress=progress):
        entry = rows.setdefault(row["context"], {"context": row["context"]})
        entry[row.pop("model")] = row
    return list(rows.values())
