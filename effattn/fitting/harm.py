"""What a change costs: the KL of the whole model's output, in nats a token, on windows of text.

    judge = Judge(parent, tokens, length=512)
    judge.of(student)["kl"]

Both are run in fp32 at least, layer by layer (`effattn.fitting.layers`): what a change does is told
apart from what rounding does. The parent is run once, and of it only what its final norm gives is
kept. A student that differs in one layer is the parent before that layer and after it:

    inputs = judge.layers.embed()            # of layer 0; `judge.layers.run` gives the next one's
    judge.alone(student, 0, inputs)["kl"]    # the same number, from one layer on

B: windows; T: tokens of each; D: hidden size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.encoding import begun
from effattn.errors import Unsupported
from effattn.evaluate.logits import positions_at_a_time
from effattn.fitting.layers import PIECE, Layers, tensors, widened
from effattn.hf import anatomy
from effattn.hf.beginning import bos_of
from effattn.hf.placement import input_device

Progress = Callable[[int, int], None]
BATCH = 4096  # tokens at a time
TEMPORARIES = 32  # chunks of logits in the room of one elsewhere: what is summed stays in caches
KEPT = 128 * 2**20  # bytes of the parent's logits that are kept, at most
LARGE = 60.0  # of the difference of two logits in fp32


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
        self.truth = rows[:, 1:].flatten().to(device)
        given = begun(rows[:, :-1], bos_of(parent, bos)).to(device)
        batches = given.split(max(1, BATCH // length))
        self.layers = Layers(parent, batches)
        self._kept: dict[int, Tensor] = {}
        self.wanted = self._final(self.layers, self.layers.embed(), 0, progress)

    def of(
        self, student: nn.Module, piece: int = PIECE, progress: Progress = untold
    ) -> dict[str, float]:
        """{kl, cross_entropy, perplexity, agreement} of a model in eval mode: KL(parent || student)
        and the student's own loss, means over all tokens; the share of tokens that both find most
        likely. piece: tokens at a time through packed caches, of which 1 is decoding itself."""
        layers = Layers(student, self.layers.batches, piece)
        return self._told(layers.parts, self._final(layers, layers.embed(), 0, progress))

    def alone(self, student: nn.Module, index: int, hidden: Sequence[Tensor]) -> dict[str, float]:
        """What `of` gives for a student that is the parent but for layer `index`, whose inputs are
        `hidden`, (B, T, D) by batch."""
        hidden = Layers(student, self.layers.batches).run(index, hidden)
        return self._told(self.parts, self._final(self.layers, hidden, index + 1))

    def rounding(self) -> float:
        """The KL of the parent against itself, each window in two pieces: what another order of the
        same sums does. Whether a smaller harm is one, nobody could tell."""
        half = -(-self.length // 2)
        layers = Layers(self.parts.model, self.layers.batches, half, whole=False)
        found = self._told(self.parts, self._final(layers, layers.embed(), 0))
        return max(0.0, found["kl"])

    def _final(
        self, layers: Layers, hidden: Sequence[Tensor], start: int, progress: Progress = untold
    ) -> list[Tensor]:
        """What the final norm gives, (B, T, D) by batch, from the inputs of layer `start` on."""
        for index in range(start, len(layers)):
            hidden = layers.run(index, hidden)
            progress(index + 1, len(layers))
        return layers.finish(hidden)

    @torch.no_grad()
    def _told(self, parts: anatomy.Anatomy, found: Sequence[Tensor]) -> dict[str, float]:
        """The sums over all tokens, of what the student's final norm gave by batch."""
        sums = {"kl": 0.0, "cross_entropy": 0.0, "agreement": 0.0}
        models = (parts, self.parts)
        heads = [one.model.get_output_embeddings() or one.embeddings for one in models]
        ours, theirs = (torch.cat([x.flatten(0, 1) for x in one]) for one in (found, self.wanted))
        with widened(x for head in dict.fromkeys(heads) for x in tensors(head)):
            self._add(sums, parts, ours, theirs)
        told = {name: value / len(self.truth) for name, value in sums.items()}
        loss = told["cross_entropy"]
        return told | {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _add(self, sums: dict, parts: anatomy.Anatomy, found: Tensor, wanted: Tensor) -> None:
        chunk = positions_at_a_time(self.parts.embeddings.weight.shape[0])
        chunk = max(1, chunk // TEMPORARIES)
        for number, (ours, next_ones) in enumerate(
            zip(found.split(chunk), self.truth.split(chunk), strict=True)
        ):
            student = parts.logits(ours)
            parent = self._logits(number, wanted.split(chunk)[number])
            told = student.gather(-1, next_ones[:, None]).squeeze(-1)
            sums["kl"] += float(divergence(student, parent).double().sum())
            sums["cross_entropy"] += float((student.logsumexp(-1) - told).double().sum())
            sums["agreement"] += float((student.argmax(-1) == parent.argmax(-1)).sum())

    def _logits(self, number: int, found: Tensor) -> Tensor:
        """The parent's logits of a chunk of positions, which are made once where all are few."""
        if number in self._kept:
            return self._kept[number]
        logits = self.parts.logits(found)
        if logits.itemsize * logits.shape[-1] * len(self.truth) <= KEPT:
            self._kept[number] = logits
        return logits


def divergence(student: Tensor, parent: Tensor) -> Tensor:
    """KL(parent || student) at each position, nats (n,), of logits (n, V): log E[exp d] - E[d]
    under the parent's probabilities, d being what they differ by. With d around its mean nothing is
    lost to the difference of logarithms that are nearly equal: fp32 tells a KL of 1e-11."""
    p, d = parent.softmax(-1), student - parent
    d -= (p * d).sum(-1, keepdim=True)
    if d.max() > LARGE:  # exp would overflow, and nothing is nearly equal
        student, parent = (one.double().log_softmax(-1) for one in (student, parent))
        return F.kl_div(student, parent, log_target=True, reduction="none").sum(-1)
    return torch.log1p((p * (torch.expm1(d) - d)).sum(-1))
