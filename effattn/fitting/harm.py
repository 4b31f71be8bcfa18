"""What a change costs: the KL of the whole model's output, in nats a token, on windows of text.

    judge = Judge(parent, tokens, length=512)
    judge.of(student)["kl"]

The parent is run once, and of it only what its final norm gives is kept. A model with a packed
cache is fed a few tokens at a time, each of which sees the packed past, as in decoding; any other
is given whole windows, which is the same and quicker."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.encoding import begun
from effattn.errors import Unsupported
from effattn.evaluate.logits import positions_at_a_time
from effattn.hf import anatomy, hooks
from effattn.hf.beginning import bos_of
from effattn.hf.cache import new_cache
from effattn.hf.placement import input_device

Progress = Callable[[int, int], None]
PIECE = 16  # tokens at a time through a packed cache
BATCH = 4096  # tokens at a time otherwise
# fp32 logits that the sums take the room of: of both models logits and log-probabilities in fp64
TEMPORARIES = 8


def untold(done: int, total: int) -> None:
    """A progress that nobody is told of."""


class Judge:
    """Windows of tokens (N,) int64 and what the parent says of them. length: of a window."""

    @torch.no_grad()
    def __init__(
        self,
        parent: nn.Module,
        tokens: Tensor,
        length: int,
        bos: bool | None = None,
        progress: Progress = untold,
    ):
        self.parts, self.length = anatomy.of(parent), length
        if self.parts.final_norm is None:
            raise Unsupported(f"{type(parent).__name__} has no final norm that could be watched")
        count = (len(tokens) - 1) // length
        if count < 1:
            raise ValueError(
                f"tokens: got {len(tokens):,} to measure on, valid is more than one window of "
                f"{length:,}"
            )
        rows = torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
        device = input_device(parent)
        self.given = begun(rows[:, :-1], bos_of(parent, bos)).to(device)
        self.truth = rows[:, 1:].to(device)
        self.batch = max(1, BATCH // length)
        self.wanted: list[Tensor] = []
        batches = self.given.split(self.batch)
        for some in batches:
            self.wanted.append(self._final(parent, some))
            progress(len(self.wanted), len(batches))
        self.tokens = rows[:, 1:].numel()

    def _final(self, model: nn.Module, ids: Tensor, **call) -> Tensor:
        """What the final norm of `model` gives, (B, T, D)."""
        seen: list[Tensor] = []
        handle = anatomy.of(model).final_norm.register_forward_hook(
            lambda _, __, output: seen.append(output)
        )
        try:
            model(**({"input_ids": ids, "use_cache": False, "logits_to_keep": 1} | call))
        finally:
            handle.remove()
        return seen.pop()

    @torch.no_grad()
    def of(
        self, student: nn.Module, piece: int = PIECE, progress: Progress = untold
    ) -> dict[str, float]:
        """{kl, cross_entropy, perplexity, agreement} of a model in eval mode: KL(parent || student)
        and the student's own loss, means over all tokens; the share of tokens that both find most
        likely. piece: tokens at a time through packed caches, of which 1 is decoding itself."""
        sums = {"kl": 0.0, "cross_entropy": 0.0, "agreement": 0.0}
        packed = is_packed(student)
        groups = zip(
            self.given.split(self.batch), self.truth.split(self.batch), self.wanted, strict=True
        )
        parts = anatomy.of(student)
        for number, (ids, truth, wanted) in enumerate(groups):
            if packed:
                cache = new_cache(student)
                found = torch.cat(
                    [
                        self._final(student, one, past_key_values=cache, use_cache=True)
                        for one in ids.split(piece, dim=1)
                    ],
                    dim=1,
                )
            else:
                found = self._final(student, ids)
            self._add(sums, parts, found.flatten(0, 1), wanted.flatten(0, 1), truth.flatten())
            progress(number + 1, len(self.wanted))
        told = {name: value / self.tokens for name, value in sums.items()}
        loss = told["cross_entropy"]
        return told | {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _add(self, sums: dict, parts, found: Tensor, wanted: Tensor, truth: Tensor) -> None:
        chunk = positions_at_a_time(self.parts.embeddings.weight.shape[0])
        chunk = max(1, chunk // TEMPORARIES)
        for ours, theirs, next_ones in zip(
            found.split(chunk), wanted.split(chunk), truth.split(chunk), strict=True
        ):
            # fp64: the KL of 8 bits is a millionth, which is what fp32 rounds to
            student = parts.logits(ours).double().log_softmax(-1)
            parent = self.parts.logits(theirs).double().log_softmax(-1)
            kl = F.kl_div(student, parent, log_target=True, reduction="sum")
            sums["kl"] += float(kl)
            sums["cross_entropy"] += float(F.nll_loss(student, next_ones, reduction="sum"))
            sums["agreement"] += float((student.argmax(-1) == parent.argmax(-1)).sum())


def is_packed(model: nn.Module) -> bool:
    """Whether some layer's cache is packed, so that a whole window would not read it."""
    held = [getattr(layer.attention, hooks.ATTRIBUTE, None) for layer in anatomy.of(model)]
    return any(one is not None and one.cache is not None for one in held)
