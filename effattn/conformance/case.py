"""One backend in one setting: how it is run, what is right, and what counts as close."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effattn.interface import Backend
from effattn.kernels.flash.pattern import layout_of

SIZES = (3, 4, 2, 16)  # batch, query heads, key/value heads, head size
RMS_RATIO = 0.005  # of gradients, and of outputs that no plain torch formula exists for
# one rounding, about
SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Violation(AssertionError):
    """A property that the backend does not have: which, in what setting, by how much."""


@dataclass
class Report:
    """What was checked: property -> the largest relative RMS error (0.0: bit for bit; None: holds,
    no number).
    """

    backend: str
    setting: str
    properties: dict[str, float | None] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.setting}"]
        for name, error in self.properties.items():
            lines.append(
                f"  {name:<20} "
                f"{'holds' if error is None else 'bit for bit' if error == 0 else f'{error:.1e}'}"
            )
        return "\n".join(lines)


def inputs(
    tokens: int, dtype=torch.float32, device="cpu", seed=0, sizes=SIZES
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, Hq, T, D), k and v (B, Hkv, T, D); sizes: B, Hq, Hkv, D."""
    draw = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, dim = sizes
    of = (torch.randn(batch, h, tokens, dim, generator=draw) for h in (heads, kv_heads, kv_heads))
    q, k, v = (x.to(device, dtype) for x in of)
    return q, k, v


@dataclass
class Case:
    """One backend in one setting, and how to run it."""

    backend: Backend
    causal: bool
    dtype: torch.dtype
    device: str | torch.device
    lengths: tuple[int, ...]
    seed: int
    sizes: tuple[int, int, int, int]

    def __post_init__(self):
        with torch.no_grad():  # parameters whose shape depends on the inputs exist from now on
            self.run(*self.inputs(self.long))
        self.truth = copy.deepcopy(self.backend).double()
        self.truth.impl = "reference"

    @property
    def long(self) -> int:
        """The longest length, in tokens."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.sizes[0]

    def inputs(self, tokens: int):
        """q, k, v of so many tokens, always the same for a length."""
        return inputs(tokens, self.dtype, self.device, self.seed + tokens, self.sizes)

    def run(self, q, k, v, mask=None, **options) -> Tensor:
        """The backend's output (B, Hq, Tq, D), in the case's dtype."""
        return self.backend(q, k, v, causal=self.causal, padding_mask=mask, **options)

    def reference(self, q, k, v, mask=None) -> Tensor:
        """The backend's own definition of it, in fp64."""
        return self.truth(q.double(), k.double(), v.double(), causal=self.causal, padding_mask=mask)

    def plain(self, q, k, v, mask=None) -> Tensor | None:
        """The definition in plain torch operations and this dtype; None for what is not exact,
        and for backends that say no `counts`.
        """
        if not (self.backend.traits.exact and hasattr(self.backend, "counts")):
            return None
        from effattn.interface import Call

        groups = q.shape[1] // k.shape[1]
        call = Call(self.causal, layout_of(mask), 1.0)
        counts = self.backend.counts(q, k, call).to(q.dtype)  # type: ignore[operator]
        scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        weights = torch.softmax(scores + counts.log().clamp(min=torch.finfo(q.dtype).min), dim=-1)
        return (weights * (counts > 0).any(-1, keepdim=True)) @ v.repeat_interleave(groups, 1)

    def padded(self, side: str, tokens: int) -> Tensor:
        """(B, T) bool: row 0 has no padding, the others more and more of it, at least one real
        token each.
        """
        mask = torch.ones(self.rows, tokens, dtype=torch.bool, device=self.device)
        for row in range(1, self.rows):
            pads = min(row * max(1, tokens // self.rows), tokens - 1)
            if side == "left":
                mask[row, :pads] = False
            else:
                mask[row, tokens - pads :] = False
        return mask

    def close(self, got: Tensor, expected: Tensor, what: str, budget: float | None = None) -> float:
        """The relative RMS error; Violation above `budget` (default: a few roundings of this
        dtype).
        """
        if not torch.isfinite(got).all():
            raise Violation(f"{what}: NaN or Inf")
        error = relative(got, expected)
        budget = 4 * SLACK[self.dtype] if budget is None else budget
        if not error <= budget:
            raise Violation(f"{what}: relative RMS error {error:.2e}, allowed are {budget:.2e}")
        return error


def rms(x: Tensor) -> float:
    """Root of the mean square; 0 for an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative(got: Tensor, expected: Tensor) -> float:
    """RMS of the error over the RMS of what is expected."""
    return rms(got.double() - expected.double()) / (rms(expected) or 1.0)
