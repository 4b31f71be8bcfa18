"""Where a forward pass spends its time: seconds of every operation in every layer, by forward
hooks.

    with OperationTimer(model) as timer:
        model(...)
        seconds = timer.read()
    seconds[3, "q_proj"], seconds[None, "head"], seconds[None, "other"]

A module's time is its own: what runs in a timed module inside it is taken off. So "attention" is
the attention module without its projections and norms (rotation, cache update, scores, sum), and
"other" is the model without all of them (residual sums, masks, rotary tables, Python). Hooks cost a
few microseconds a module: passes that are timed as a whole run without them."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import nn

from effattn.hf import anatomy
from effattn.hf.placement import input_device

Key = tuple[int | None, str]  # layer (None: outside the layers), operation
NAMES = (
    "embedding",
    "norms",
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "attention",
    "o_proj",
    "ffn",
    "head",
    "other",
)
# The same, fewer: what a plot can show.
GROUPS = {
    "attention": ("attention",),
    "projections": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "FFN": ("ffn",),
    "embedding and head": ("embedding", "head"),
    "norms": ("norms",),
    "other": ("other",),
}


def modules_of(parts: anatomy.Anatomy) -> dict[nn.Module, Key]:
    """The modules whose calls are the operations. One module that holds q, k and v is
    "qkv_proj".
    """
    found: dict[nn.Module, Key] = {
        parts.model: (None, "other"),
        parts.embeddings: (None, "embedding"),
    }
    if parts.final_norm is not None:
        found[parts.final_norm] = (None, "norms")
    if (head := parts.model.get_output_embeddings()) is not None:
        found[head] = (None, "head")
    for layer in parts:
        found[layer.attention] = (layer.index, "attention")
        for module in layer.ffn if isinstance(layer.ffn, nn.ModuleList) else [layer.ffn]:
            found[module] = (layer.index, "ffn")
        found.update({norm: (layer.index, "norms") for norm in layer.norms})
        q, k, v = layer.q.module, layer.k.module, layer.v.module
        names = {q: "qkv_proj"} if q is k else {q: "q_proj", k: "k_proj", v: "v_proj"}
        found.update(
            {
                module: (layer.index, name)
                for module, name in (names | {layer.o.module: "o_proj"}).items()
            }
        )
    return found


def merged_name(parts: anatomy.Anatomy, operation: str) -> str:
    """The timed operation that one of the cost model belongs to: the cache is updated inside the
    attention module.
    """
    if operation == "cache":
        return "attention"
    fused = parts.layers[0].q.module is parts.layers[0].k.module
    return "qkv_proj" if fused and operation in ("q_proj", "k_proj", "v_proj") else operation


class OperationTimer:
    """Context manager that hooks a model's operations. Wall clock on a CPU, events on a GPU, and
    no synchronisation between operations: gaps in which the GPU waits for Python belong to the
    operation that they delay, and there are none when the calls are a `Clock`'s."""

    def __init__(self, model: nn.Module):
        self.modules = modules_of(anatomy.of(model))
        self.gpu = input_device(model).type == "cuda"
        self._handles: list = []
        self.clear()

    def clear(self) -> None:
        """Forgets what was timed since the last reading."""
        self._open: list[tuple[Key, object, int]] = []  # started and not ended: key, start, number
        # ... end, number, number of the parent
        self._closed: list[tuple[Key, object, object, int, int | None]] = []
        self._count = 0

    def __enter__(self) -> OperationTimer:
        for module, key in self.modules.items():
            # first of the pre-hooks, so that what a swap does before its attention counts as
            # attention
            self._handles.append(module.register_forward_pre_hook(self._starts(key), prepend=True))
            self._handles.append(module.register_forward_hook(self._ends))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _starts(self, key: Key):
        def start(module, args) -> None:
            self._open.append((key, self._mark(), self._count))
            self._count += 1

        return start

    def _ends(self, module, args, output) -> None:
        key, start, number = self._open.pop()
        parent = self._open[-1][2] if self._open else None
        self._closed.append((key, start, self._mark(), number, parent))

    def read(self) -> dict[Key, float]:
        """Seconds of every operation since the last reading; they add up to the time of the model's
        calls.
        """
        if self.gpu:
            torch.cuda.synchronize()
        seconds, owners = defaultdict(float), {number: key for key, _, _, number, _ in self._closed}
        for key, start, end, _, parent in self._closed:
            took = start.elapsed_time(end) / 1000 if self.gpu else end - start
            seconds[key] += took
            if parent is not None:
                seconds[owners[parent]] -= took
        self.clear()
        return dict(seconds)
