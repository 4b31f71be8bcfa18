"""What the report says of a model and of each cache, beside what is measured."""

from __future__ import annotations

from torch import nn

from effattn.hf import anatomy
from effattn.hf.weights import packing, weight_bytes
from effattn.quant.sensitivity import lanes
from effattn.quant.sensitivity.lanes import Lane
from effattn.surgery.describing import describe

CONTEXTS = (4096, 32768, 131072)  # tokens that the bytes of a cache are told at
MADE_FOR = 2048  # tokens, of a model whose config does not say


def model_facts(model: nn.Module) -> dict:
    """The report's "model": its shape, what its weights and a full cache take, in bytes, and the
    tokens that it was made for."""
    told, parts = describe(model), anatomy.of(model)
    return {
        "class": told.model,
        "dtype": told.dtype,
        "device": str(model.device),
        "layers": len(parts.layers),
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "head_dim": parts.head_dim,
        "parameters": told.parameters["total"],
        "weights": packing(parts.layers[0].q.module) or told.dtype,
        "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "trained_length": parts.trained_length or MADE_FOR,
    }


def held(lane: Lane, length: int, seed: int) -> list[dict]:
    """`lanes.allocated` after a window of `length` tokens, and after twice as many more as are
    packed at a time: there the cache is as full as it gets before it packs again."""
    formats = lane.formats(anatomy.of(lane.model))
    flush = max((one.flush for one in formats if one is not None), default=128)
    return lanes.allocated(lane, [length, length + 2 * flush], seed)


def format_row(lane: Lane, quality: dict, held: list[dict]) -> dict:
    """One of the report's "formats": quality as `tokenwise` gives it, held as `held` does."""
    parts = anatomy.of(lane.model)
    formats = lane.formats(parts)
    return {
        "name": lane.name,
        "cache": lane.cache,
        "quality": quality,
        "adapted": lanes.adapted(parts, lane.cache) if isinstance(lane.cache, str) else "",
        "bytes_per_token": sum(lane.layer_bytes()),
        "held": held,
        "memory": [
            {"context": tokens, "bytes": lanes.predicted_bytes(parts, formats, tokens)}
            for tokens in CONTEXTS
        ],
    }
