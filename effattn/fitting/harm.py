"""What a change costs: the KL of the whole model's output, in nats a token, on windows of text.

    judge = Judge(parent, tokens, length=512)
    judge.of(student)["kl"]

The parent is run once, and of it only what its final norm gives is kept. A model with a packed
cache is fed a few tokens at a time, each of which sees the packed past, as in decoding; any other
is given whole windows, which is the same and quicker.

A student that differs in one layer is the parent before that layer and after it:

    inputs = judge.runner.embed()            # of layer 0; `judge.forward` gives the next one's
    judge.alone(student, 0, inputs)["kl"]    # the same number, from one layer on

B: windows; T: tokens of each; D: hidden size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from effattn.calibration.layerwise import LayerRunner, Stop, instead, passed
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
        self.runner = LayerRunner(self.parts, list(batches))
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
        packed, found = is_packed(student), []
        for number, ids in enumerate(self.given.split(self.batch)):
            if packed:
                cache = new_cache(student)
                pieces = [
                    self._final(student, one, past_key_values=cache, use_cache=True)
                    for one in ids.split(piece, dim=1)
                ]
                found.append(torch.cat(pieces, dim=1))
            else:
                found.append(self._final(student, ids))
            progress(number + 1, len(self.wanted))
        return self._told(anatomy.of(student), found)

    @torch.no_grad()
    def forward(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the parent's layer gives for its inputs, (B, T, D) by batch."""
        return [output for _, output in self.runner.run(index, hidden)]

    @torch.no_grad()
    def alone(self, student: nn.Module, index: int, hidden: Sequence[Tensor]) -> dict[str, float]:
        """What `of` gives for a student that is the parent but for layer `index`, whose inputs are
        `hidden`: only that layer's cache, if it is packed, is fed a few tokens at a time."""
        if is_packed(student):
            batches = self.given.split(self.batch)
            pairs = zip(batches, hidden, strict=True)
            hidden = [through_cache(student, index, *pair, PIECE) for pair in pairs]
        else:
            runner = LayerRunner(anatomy.of(student), self.runner.batches)
            hidden = [output for _, output in runner.run(index, hidden)]
        for later in range(index + 1, len(self.parts.layers)):
            hidden = self.forward(later, hidden)
        device = self.given.device
        found = [self.parts.final_norm(states.to(device)) for states in hidden]
        return self._told(self.parts, found)

    def _told(self, parts: anatomy.Anatomy, found: Sequence[Tensor]) -> dict[str, float]:
        """The sums over all tokens, of what the student's final norm gave by batch."""
        sums = {"kl": 0.0, "cross_entropy": 0.0, "agreement": 0.0}
        truth = self.truth.split(self.batch)
        for ours, theirs, next_ones in zip(found, self.wanted, truth, strict=True):
            self._add(sums, parts, ours.flatten(0, 1), theirs.flatten(0, 1), next_ones.flatten())
        told = {name: value / self.tokens for name, value in sums.items()}
        loss = told["cross_entropy"]
        return told | {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _add(self, sums: dict, parts, found: Tensor, wanted: Tensor, truth: Tensor) -> None:
        chunk = positions_at_a_time(self.parts.embeddings.weight.shape[0])
        chunk = max(1, chunk // TEMPORARIES)
        for ours, theirs, next_ones in zip(
            found.split(chunk), wanted.split(chunk), truth.split(chunk), strict=True
        ):
            # in the next wider type: the KL of 8 bits is a millionth, which is what fp32 rounds to
            logits = [parts.logits(ours), self.parts.logits(theirs)]
            wide = torch.float32 if logits[0].itemsize < 4 else torch.float64
            student, parent = (F.log_softmax(one, -1, dtype=wide) for one in logits)
            kl = F.kl_div(student, parent, log_target=True, reduction="none").sum(-1)
            sums["kl"] += float(kl.double().sum())
            sums["cross_entropy"] += float(F.nll_loss(student, next_ones, reduction="sum"))
            sums["agreement"] += float((student.argmax(-1) == parent.argmax(-1)).sum())


def is_packed(model: nn.Module) -> bool:
    """Whether some layer's cache is packed, so that a whole window would not read it."""
    held = [getattr(layer.attention, hooks.ATTRIBUTE, None) for layer in anatomy.of(model)]
    return any(one is not None and one.cache is not None for one in held)


class _As:
    """Stands in a cache for a layer that is not run, and says what another one says."""

    def __init__(self, other: CacheLayerMixin):
        self._other = other

    def __getattr__(self, name: str):
        return getattr(self._other, name)


@torch.no_grad()
def through_cache(model: nn.Module, index: int, ids: Tensor, hidden: Tensor, piece: int) -> Tensor:
    """What layer `index` gives for its inputs `hidden` (B, T, D), `piece` tokens at a time, which
    read of the past what its cache has kept. ids (B, T): the tokens; no other layer is run."""
    layers, cache, seen = anatomy.of(model).layers, new_cache(model), []
    own, held = layers[index].block, cache.layers[index]
    # whichever is asked how long the past is
    cache.layers = [held if number == index else _As(held) for number in range(len(layers))]

    def enter(_, args, kwargs):
        states = hidden[:, len(seen) * piece :][:, :piece].to(
            args[0].device if args else ids.device
        )
        if args:
            return (states, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": states}

    def leave(_, __, output):
        seen.append((output[0] if isinstance(output, tuple) else output).cpu())
        raise Stop

    def skip(_, *args, **kwargs):
        return passed(args[0] if args else kwargs["hidden_states"])

    handles = [
        own.register_forward_pre_hook(enter, with_kwargs=True),
        own.register_forward_hook(leave),
    ]
    try:
        with instead((layer.block for layer in layers if layer.block is not own), skip):
            for one in ids.split(piece, dim=1):
                with suppress(Stop):
                    model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(seen, dim=1)
