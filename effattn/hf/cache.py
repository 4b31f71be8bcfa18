"""The cache that `generate()` uses by itself after a swap."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for one batch. Dense attention remembers what plain transformers does, so it is the plain one."""
    return DynamicCache(config=model.config)
