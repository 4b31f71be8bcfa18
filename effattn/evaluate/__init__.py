"""What a causal model can do: losses over long texts, and tasks that need what was said far back.

effattn.evaluate.passkey(model, tokenizer, length=4096)
effattn.evaluate.associative_recall(model, tokenizer, pairs=8)
"""

from __future__ import annotations

import importlib

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what is asked for: shares of a prompt's length

_FUNCTIONS = {
    "associative_recall": "effattn.evaluate.recall",
    "by_position": "effattn.evaluate.curve",
    "harness_scores": "effattn.evaluate.harness_runs",
    "harness_tasks": "effattn.evaluate.harness",
    "line_retrieval": "effattn.evaluate.lines",
    "listops": "effattn.evaluate.list_operations",
    "listops_examples": "effattn.evaluate.list_operations",
    "passkey": "effattn.evaluate.passkey_retrieval",
    "topic_retrieval": "effattn.evaluate.topics",
    "variable_tracking": "effattn.evaluate.tracking",
}

__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(
        f"module 'effattn.evaluate' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return [*__all__]
