"""The arena's model: a small pre-norm Transformer encoder that attends by one of the patterns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from effattn.arena.tasks import Task
from effattn.registry import backend

INIT = 0.02  # standard deviation of embeddings


class Encoder(nn.Module):
    """Tokens (B, T) -> a class, or every token again.

    real (B, T): bool, what is no padding. width: numbers a token, divided among `heads`; length:
    the longest sequence, which learned positions are there for. pattern: a spec."""

    def __init__(
        self, task: Task, pattern: str, *, length: int, width: int, layers: int, heads: int
    ):
        super().__init__()
        self.mask = task.vocabulary  # the id behind the task's own
        self.tokens = nn.Embedding(task.vocabulary + 1, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList([Layer(pattern, width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, task.classes)
        self.again = nn.Linear(width, task.vocabulary)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=INIT)

    def features(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, T, width)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = None if bool(real.all()) else real
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, classes): of the mean over what is real."""
        weights = real / real.sum(1, keepdim=True)
        return self.classes(torch.einsum("btw,bt->bw", self.features(tokens, real), weights))

    def restored(self, tokens: Tensor, real: Tensor) -> Tensor:
        """(B, T, vocabulary): what stands at every place."""
        return self.again(self.features(tokens, real))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, pattern: str, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.pattern = backend(pattern)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, width) -> (B, T, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        self._follow(k, mask)
        seen = self.pattern(q, k, v, causal=False, padding_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.second(x))))

    def _follow(self, k: Tensor, mask: Tensor | None) -> None:
        """A codebook goes after the keys while they are trained (arXiv:2309.16354, eq. 10)."""
        if not self.training or not hasattr(self.pattern, "calibrate"):
            return
        if self.pattern.codebook is None:
            self.pattern.calibrate(k.detach(), mask)
        else:
            self.pattern.update(k.detach(), mask)
