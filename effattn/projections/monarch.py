"""`MonarchLinear`: a linear layer whose weight is a Monarch matrix, and which sizes such a matrix
may have.

Monarch: Dao et al. 2022, arXiv:2204.00595. W = P L P' R with block-diagonal L and R and fixed
permutations, which `effattn.kernels.monarch` defines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effattn.interface import Cost
from effattn.kernels import monarch as kernel
from effattn.projections.base import ProjectedLinear, check_common, register
from effattn.projections.project import project
from effattn.specs import format_spec


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Monarch matrix: `blocks` blocks of p inputs and s outputs, pairs of blocks of rank
    `rank`.
    """

    in_features: int
    out_features: int
    blocks: int
    rank: int

    @property
    def p(self) -> int:
        """Inputs of a block, the last one's padding included."""
        return -(-self.in_features // self.blocks)

    @property
    def s(self) -> int:
        """Outputs of a block, the last one's padding included."""
        return -(-self.out_features // self.blocks)

    @property
    def parameters(self) -> int:
        """Of both factors, padding included."""
        return self.blocks * self.blocks * self.rank * (self.p + self.s)


def sizes(
    in_features: int,
    out_features: int,
    blocks: int,
    rank: int | None = None,
    ratio: float | None = None,
    pad: bool = True,
    name: str = "",
) -> Sizes:
    """The sizes that these options come to for a weight (out_features, in_features).

    rank: of each pair of blocks, at most the smaller side of a block. Or ratio: the largest rank
    whose parameters are at most that share of the dense weight's. Neither: min(p, s) // blocks, at
    least 1, for which the blocks of L and R have as many inner numbers as the smaller side has (the
    paper's).

    ValueError, beginning with `name`, for what is not possible; without `pad`, also for blocks that
    do not divide."""
    where = f"{name}: " if name else ""
    smaller = min(in_features, out_features)
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= smaller:
        raise ValueError(
            f"{where}monarch: blocks: got {blocks!r}, valid are 1 to {smaller} for a weight of "
            f"{out_features} x {in_features}"
        )
    if not pad and (in_features % blocks or out_features % blocks):
        both = ", ".join(
            str(n) for n in range(1, smaller + 1) if not in_features % n and not out_features % n
        )
        raise ValueError(
            f"{where}monarch: blocks: {blocks} does not divide a weight of {out_features} x "
            f"{in_features}; these do: {both}; or give pad=True, which adds zero rows and columns"
        )
    found = Sizes(in_features, out_features, blocks, 1)
    most = min(found.p, found.s)
    if rank is not None and ratio is not None:
        raise ValueError(
            f"{where}monarch: rank={rank!r} and ratio={ratio!r} given, valid is one of them"
        )
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(
                f"{where}monarch: ratio: got {ratio!r}, valid are numbers above 0, up to 1"
            )
        least = found.parameters / (in_features * out_features)
        if ratio < least:
            raise ValueError(
                f"{where}monarch: ratio: got {ratio}, rank 1 has {least:.4g} of the parameters of "
                f"a weight of {out_features} x {in_features} with {blocks} blocks; give at least "
                "that, or fewer blocks"
            )
        rank = min(most, int(ratio * in_features * out_features) // found.parameters)
    if rank is None:
        rank = max(1, most // blocks)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(
            f"{where}monarch: rank: got {rank!r}, valid are 1 to {most} (the smaller side of a "
            f"block of {found.s} x {found.p})"
        )
    return Sizes(in_features, out_features, blocks, rank)


@register("monarch")
class MonarchLinear(ProjectedLinear):
    """y = W x + bias with W = P L P' R, for x (..., in_features); takes the place of an nn.Linear.
    Source: Monarch, arXiv:2204.00595.

    right: parameter (blocks, blocks·rank, p), the blocks of R        p = padded_in / blocks
    left:  parameter (blocks, s, blocks·rank), the blocks of L        s = padded_out / blocks
    bias:  parameter (out_features,), or None

    Output t of block j is output t·blocks + j of the layer, inputs are in order. Where `blocks`
    does not divide, the weight is padded with zeros to padded_out x padded_in: these are parameters
    like others, counted and shown.

    error: |W - its original| / |its original| (Frobenius) when it was projected; None for a new
    layer. Training does not change it. output_error: the same of the outputs, sqrt(E|W x - original
    x|^2 / E|original x|^2), where it was projected with `moment`. spec: how it was asked for. impl:
    "auto" (triton on a GPU, else torch), "torch", "triton" or "reference"; an explicit one runs or
    raises."""

    EXAMPLE = "monarch(blocks=16)"
    SIZES: ClassVar[dict] = {"blocks": (int,), "rank": (int, type(None))}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        bias: bool = True,
        *,
        rank: int | None = None,
        ratio: float | None = None,
        pad: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """A random layer, with outputs as large as a new nn.Linear's. Arguments and errors are
        those of `sizes`.
        """
        super().__init__()
        self.sizes = sizes(in_features, out_features, blocks, rank, ratio, pad)
        self.in_features, self.out_features = in_features, out_features
        self.blocks, self.rank = self.sizes.blocks, self.sizes.rank
        kernel.choose(impl)
        self.impl = impl
        self.error: float | None = None
        self.output_error: float | None = None
        # the rank is part of the spec only where it is not what `blocks` alone comes to
        usual = sizes(in_features, out_features, blocks).rank == self.rank
        self.spec = format_spec(
            "monarch", {"blocks": blocks} if usual else {"blocks": blocks, "rank": self.rank}
        )
        inner = self.blocks * self.rank
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.right = nn.Parameter(torch.empty(self.blocks, inner, self.sizes.p, **like))
        self.left = nn.Parameter(torch.empty(self.blocks, self.sizes.s, inner, **like))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **like)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def options(
        cls,
        blocks: int,
        rank: int | None = None,
        ratio: float | None = None,
        ffn: bool = False,
        method: str = "svd",
        pad: bool = False,
    ) -> dict:
        """The options of `monarch(...)`, checked as far as no weight is needed.

        blocks, rank, ratio: as for `sizes`. ffn: the linears of the FFN too. method: "svd", closest
        weights, or "data", closest outputs on the calibration tokens. pad: where blocks do not
        divide, add zero rows and columns; otherwise refuse."""
        check_common("monarch", method, ffn=ffn, pad=pad)
        return dict(blocks=blocks, rank=rank, ratio=ratio, ffn=ffn, method=method, pad=pad)

    @classmethod
    def check_sizes(cls, in_features: int, out_features: int, *, where: str, **options) -> None:
        sizes(in_features, out_features, **options, name=where)

    @property
    def weight_parameters(self) -> int:
        return self.sizes.parameters

    @property
    def padded_in(self) -> int:
        """Inputs, padded to whole blocks."""
        return self.blocks * self.sizes.p

    @property
    def padded_out(self) -> int:
        """Outputs, padded to whole blocks."""
        return self.blocks * self.sizes.s

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform; the variance of outputs is a new nn.Linear's, a third of the mean square of the
        inputs.
        """
        # uniform on (-a, a) has variance a^2/3: R's rows of p inputs keep the variance of x, and
        # L's rows of blocks x rank numbers give a third of it
        nn.init.uniform_(self.right, -((3 / self.sizes.p) ** 0.5), (3 / self.sizes.p) ** 0.5)
        nn.init.uniform_(
            self.left, -((self.blocks * self.rank) ** -0.5), (self.blocks * self.rank) ** -0.5
        )
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        blocks: int,
        *,
        rank: int | None = None,
        ratio: float | None = None,
        pad: bool = True,
        moment: Tensor | None = None,
        impl: str = "auto",
    ) -> MonarchLinear:
        """The Monarch layer closest to `linear`, in its dtype and on its device; the bias is
        copied.

        blocks, rank, ratio, pad: as for `sizes`. moment (in_features, in_features): second moment
        of the inputs, E[x x^T]; given, closest in its outputs (`effattn.projections.project`),
        otherwise in its weights, which is exact for a weight that is Monarch already. ValueError as
        for `sizes`, and for weights that are not finite."""
        weight = linear.weight
        new = cls(
            linear.in_features,
            linear.out_features,
            blocks,
            linear.bias is not None,
            rank=rank,
            ratio=ratio,
            pad=pad,
            impl=impl,
            device=weight.device,
            dtype=weight.dtype,
        )
        if not torch.isfinite(weight).all():
            raise ValueError("monarch: the weight holds NaN or Inf")
        right, left = project(weight, blocks, new.rank, moment)
        return new.take(linear, right, left, moment)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype; with gradients."""
        return kernel.linear(
            x, self.right, self.left, self.bias, out_features=self.out_features, impl=self.impl
        )

    def dense(self) -> Tensor:
        """W, (out_features, in_features), multiplied out."""
        shape = (self.blocks, -1, self.blocks, self.rank)  # left: j, t, i, a
        right = self.right.view(self.blocks, self.blocks, self.rank, -1)  # i, j, a, k
        weight = torch.einsum("jtia,ijak->tjik", self.left.view(shape), right)
        return weight.reshape(self.padded_out, self.padded_in)[
            : self.out_features, : self.in_features
        ]

    def cost(self, rows: int, backward: bool = False) -> Cost:
        """The fewest operations and bytes for x (rows, in_features): intermediate numbers never
        leave the chip.

        backward: of the backward pass alone, which reads dy, x and the factors and writes their
        gradients: the intermediate numbers again, and two products for each factor."""
        size, factors = self.left.element_size(), self.sizes.parameters
        x, y = rows * self.in_features * size, rows * self.out_features * size
        flops = 2 * rows * factors  # a multiply-add for each number of the factors
        if backward:
            again = 2 * rows * self.right.numel()
            return Cost(2 * flops + again, x + y + factors * size, x + self.nbytes)
        return Cost(flops, x + self.nbytes, y)

    def extra_repr(self) -> str:
        padding = ""
        if (self.padded_in, self.padded_out) != (self.in_features, self.out_features):
            padding = f", padded_in={self.padded_in}, padded_out={self.padded_out}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"blocks={self.blocks}, rank={self.rank}, bias={self.bias is not None}{padding}"
        )
