"""Cross-entropy of one long text that streams through a model's cache, and the bytes that the cache
holds meanwhile.

    effattn.swap(model, "sliding", window=256, sinks=4)
    losses, held = stream_losses(model, tokens)          # (N - 1,) nats, bytes after every chunk

A stream has no windows: every token is scored after everything before it, as far as the cache
remembers it. That is what a chat or a log reader does, and where attention over positions that were
never trained falls apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.encoding import begun
from effattn.evaluate.logits import Scores
from effattn.evaluate.loss import Progress, check_stream
from effattn.hf.beginning import bos_of
from effattn.hf.placement import input_device
from effattn.states.base import State


@torch.no_grad()
def stream_losses(
    model,
    tokens: Tensor,
    chunk: int = 128,
    cache=None,
    progress: Progress | None = None,
    *,
    bos: bool | None = None,
) -> tuple[Tensor, list[int]]:
    """Cross-entropy in nats of tokens[1:], float32 (N - 1,), and the cache's bytes after every
    chunk.

    tokens: int64 (N,). `chunk` tokens go in at a time; the result is that of one token at a time,
    only sooner, since a cache's prefill, chunked prefill and decoding are the same function. cache:
    default a new one, which is what `generate()` uses on this model; one that holds a past goes on
    from there, and gets no BOS. bos: whether BOS takes the place of the first token (None: as the
    model's tokenizer does it). progress(tokens done, all of them)."""
    from effattn.hf.cache import new_cache

    check_stream(model, tokens, 1, None)
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"chunk: got {chunk!r}, valid is a positive number of tokens")
    if cache is None:
        cache, tokens = new_cache(model), begun(tokens, bos_of(model, bos))
    device = input_device(model)
    losses, held, training = torch.empty(len(tokens) - 1), [], model.training
    model.eval()
    try:
        for start in range(0, len(losses), chunk):
            ids = tokens[start : start + chunk + 1].to(device)
            # logits at a token are of the next one: `ids` has one token more than goes in
            scores = Scores.of(model, ids[None, :-1], past_key_values=cache, use_cache=True)
            rows, truth = losses[start : start + chunk], ids[1:]
            for at in scores.pieces():
                rows[at] = F.cross_entropy(scores.logits(at), truth[at], reduction="none").cpu()
            held.append(cache_bytes(cache))
            if progress:
                progress(min(start + chunk, len(losses)), len(losses))
    finally:
        model.train(training)
    return losses, held


def cache_bytes(cache) -> int:
    """Bytes of memory that `cache` keeps alive, whatever its kind: every tensor in it, and in what
    it holds.

    Storages count, once and whole: a small view that keeps a large tensor alive costs the large
    one."""
    # whatever a cache is made of: attributes, slots, containers and tensors, but no modules or
    # classes, which it only refers to
    seen: set[int] = set()
    storages: dict[tuple, int] = {}
    waiting = [cache]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, nn.Module | type | str | bytes):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[thing.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        else:
            own = getattr(thing, "__dict__", {})
            if isinstance(thing, State):  # it says itself what is its own
                own = thing.__getstate__()
            waiting += own.values()
            slots = getattr(type(thing), "__slots__", ())
            waiting += [
                getattr(thing, name, None)
                for name in ([slots] if isinstance(slots, str) else slots)
            ]
    return sum(storages.values())
