"""Leaving out the logits that nobody reads."""

from __future__ import annotations

import inspect

from torch import nn


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the class can compute the last token's logits alone, as `generate()` asks it to."""
    return "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters


def last_only(model: nn.Module) -> dict[str, int]:
    """What a call of the model gets for logits of the last token only, where the class has that."""
    return {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
