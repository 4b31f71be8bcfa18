"""Logits of a batch of windows, made in pieces: 4,096 tokens of a vocabulary of 262,144 are 4 GiB
of them in fp32.

    scores = Scores(model, ids)
    for at in scores.pieces():
        losses[at] = F.cross_entropy(scores.logits(at), targets[at], reduction="none")

Where all of a batch fit into `BYTES`, they are the model's own; a larger batch keeps the final
norm's output, which is hundreds of times smaller, and multiplies it with the head piece by piece.

B: windows; T: tokens of each; N: positions in all; n: of a piece; V: the vocabulary; D: hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy

BYTES = 256 * 2**20  # of fp32 logits at a time


class Scores:
    """What `model` makes of ids (B, T), from position `first` of each window on: N = B (T - first)
    positions in order.

    The model runs once, here, in the dtype that it has. `chunk`: positions whose logits fit into
    `BYTES`."""

    def __init__(self, model: nn.Module, ids: Tensor, first: int = 0):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.count = ids.shape[0] * (ids.shape[1] - first)
        # one piece: the model's own logits; more: its final hidden states, and the head by pieces
        self.chunk = max(1, BYTES // (4 * vocabulary))
        self._parts = _known(model) if ids.numel() > self.chunk else None
        whole = self._parts is None
        found = (
            model(input_ids=ids, use_cache=False).logits
            if whole
            else _final_hidden(self._parts, ids)
        )
        self._found = found[:, first:].flatten(0, 1)

    def pieces(self) -> Iterator[slice]:
        """Which positions to ask for at a time, (0, N) in order."""
        for start in range(0, self.count, self.chunk):
            yield slice(start, min(start + self.chunk, self.count))

    def logits(self, at: slice) -> Tensor:
        """(n, V) fp32."""
        found = self._found[at]
        return (found if self._parts is None else self._parts.logits(found)).float()


def _known(model: nn.Module) -> anatomy.Anatomy | None:
    """The model's anatomy where its head can be called on its own; None where all logits have to be
    made at once.
    """
    try:
        parts = anatomy.of(model)
    except Unsupported:
        return None
    head = parts.embeddings if parts.head is None else parts.head
    # An offloaded head has its weights only while accelerate's hooks run, in the model's own
    # forward.
    return None if parts.final_norm is None or head.weight.is_meta else parts


def _final_hidden(parts: anatomy.Anatomy, ids: Tensor) -> Tensor:
    """The final norm's output (B, T, D). The call goes through the model, whose hooks a swap needs,
    and asks for the logits of one position only."""
    seen: list[Tensor] = []
    handle = parts.final_norm.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with torch.no_grad():
            parts.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return seen.pop()
