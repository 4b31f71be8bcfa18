"""Logits of a batch of windows, made in pieces: 4,096 tokens of a vocabulary of 262,144 are 4 GiB
of them in fp32.

    scores = Scores.of(model, ids)
    losses = scores.each(lambda logits, at: F.cross_entropy(logits, targets[at], reduction="none"))

Where all of a batch fit into `BYTES`, they are the model's own; a larger batch keeps the final
norm's output, which is hundreds of times smaller, and multiplies it with the head piece by piece.
With gradients each piece is made again in the backward pass. Whatever makes logits of a number of
tokens that a user chooses goes through here: evaluation, criteria, training.

B: windows; T: tokens of each; N: positions in all; n: of a piece; V: the vocabulary; D: hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.hf.last_logits import last_only

BYTES = 256 * 2**20  # of fp32 logits at a time
EVERYWHERE = slice(None)
PREDICTING = slice(None, -1)  # all but a window's last token have a next one to be told by


def positions_at_a_time(vocabulary: int) -> int:
    """How many positions' logits fit into `BYTES`."""
    return max(1, BYTES // (4 * vocabulary))


class Scores:
    """Logits of N positions, which are asked for in pieces of at most `chunk`.

    found (..., D), with the parts of the model whose final norm gave it, or (..., V) and None: the
    logits themselves."""

    def __init__(self, parts: anatomy.Anatomy | None, found: Tensor, chunk: int):
        self._parts, self._found = parts, found.flatten(0, -2)
        self.count, self.chunk = len(self._found), chunk

    @classmethod
    def of(
        cls,
        model: nn.Module,
        ids: Tensor,
        among: slice = EVERYWHERE,
        called: Callable | None = None,
        **call,
    ) -> Scores:
        """What `model` makes of ids (B, T) at the positions `among` of each window: N of them in
        order. The model runs once, here, in the dtype that it has, with gradients where they are
        recorded.

        called: the model as a trainer has wrapped it. call: what else it gets, such as a cache."""
        chunk = positions_at_a_time(model.get_input_embeddings().weight.shape[0])
        parts = _known(model) if ids.numel() > chunk else None
        given = {"input_ids": ids, "use_cache": False, **call}
        if parts is None:
            found = (called or model)(**given).logits
        else:
            found = _final_hidden(parts, called or model, given)
        return cls(parts, found[:, among], chunk)

    def pieces(self) -> Iterator[slice]:
        """Which positions to ask for at a time, (0, N) in order."""
        for start in range(0, self.count, self.chunk):
            yield slice(start, min(start + self.chunk, self.count))

    def logits(self, at: slice) -> Tensor:
        """(n, V) fp32, or fp64 of a model that is."""
        return self._logits(self._found[at])

    def each(self, make: Callable[[Tensor, slice], Tensor]) -> Iterator[Tensor]:
        """make(logits (n, V), at) of every piece in order. With gradients, `make` is called again
        in the backward pass: a piece's logits are gone in between."""
        for at in self.pieces():

            def part(found: Tensor, at: slice = at) -> Tensor:
                return make(self._logits(found), at)

            found = self._found[at]
            again = self._parts is not None and torch.is_grad_enabled()
            yield checkpoint(part, found, use_reentrant=False) if again else part(found)

    def _logits(self, found: Tensor) -> Tensor:
        logits = found if self._parts is None else self._parts.logits(found)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_losses(model: nn.Module, ids: Tensor, **call) -> Tensor:
    """Cross-entropy in nats of ids[:, 1:], each from the tokens before it, (B, T - 1), with
    gradients where they are recorded. call: as for `Scores.of`."""
    targets = ids[:, 1:].flatten()
    scores = Scores.of(model, ids, PREDICTING, **call)
    losses = scores.each(lambda logits, at: F.cross_entropy(logits, targets[at], reduction="none"))
    return torch.cat([*losses]).view(len(ids), -1)


def training_loss(model: nn.Module, ids: Tensor, called: Callable | None = None, **call) -> Tensor:
    """The loss that `model` itself has on ids (B, T) with the same labels: (). Where that is the
    mean cross-entropy of next tokens, as in a causal LM, and the logits are many, in pieces."""
    many = ids.numel() > positions_at_a_time(model.get_input_embeddings().weight.shape[0])
    if many and _of_next_tokens(model):
        return next_token_losses(model, ids, called=called, **call).mean()
    return (called or model)(input_ids=ids, labels=ids, **{"use_cache": False, **call}).loss


def _of_next_tokens(model: nn.Module) -> bool:
    """Whether the model's own loss is `next_token_losses`' mean, and nothing is added to it, as the
    balance of experts is."""
    return getattr(model, "loss_function", None) is ForCausalLMLoss and not getattr(
        model.config, "output_router_logits", False
    )


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


def _final_hidden(parts: anatomy.Anatomy, called: Callable, given: dict) -> Tensor:
    """The final norm's output (B, T, D). The call goes through the model, whose hooks a swap needs,
    and asks for the logits of one position only."""
    seen: list[Tensor] = []
    handle = parts.final_norm.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        called(**given, **last_only(parts.model))
    finally:
        handle.remove()
    return seen.pop()
