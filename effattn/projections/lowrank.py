"""`LowRankLinear`: a linear layer whose weight is the product of two thin matrices.

The best of rank r for outputs on inputs x of second moment S = E[x x^T] is W' = U_r U_r^T W, with
U_r the leading left singular vectors of W S^(1/2) (Eckart-Young in that metric; SVD-LLM,
arXiv:2403.07378, section 3.1); S = I is the plain SVD. Only U is needed, so that S is never
inverted.

A ratio is one budget for all matrices of a spec: `effattn.projections.budget` chooses the ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from effattn.damping import damped
from effattn.interface import Cost
from effattn.projections.base import ProjectedLinear, StructuredLinear, check_common, register
from effattn.projections.budget import Spectrum, ranks
from effattn.specs import format_spec


@register("lowrank")
class LowRankLinear(ProjectedLinear):
    """y = left (right x) + bias for x (..., in_features); takes the place of an nn.Linear.

    right: parameter (rank, in_features)
    left:  parameter (out_features, rank)
    bias:  parameter (out_features,), or None

    error: |W - its original| / |its original| (Frobenius) when it was projected; None for a new
    layer. Training does not change it. output_error: the same of the outputs, where it was
    projected with `moment`. spec: how it was asked for."""

    EXAMPLE = "lowrank(ratio=0.75)"
    SIZES: ClassVar[dict] = {"rank": (int,)}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """A random layer, with outputs as large as a new nn.Linear's. ValueError for a rank that
        is not 1 to the smaller side."""
        super().__init__()
        _check_rank(rank, min(in_features, out_features), "")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.error: float | None = None
        self.output_error: float | None = None
        self.spec = format_spec("lowrank", {"rank": rank})
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.right = nn.Parameter(torch.empty(rank, in_features, **like))
        self.left = nn.Parameter(torch.empty(out_features, rank, **like))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **like)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def options(
        cls,
        rank: int | None = None,
        ratio: float | None = None,
        ffn: bool = False,
        method: str = "data",
    ) -> dict:
        """The options of `lowrank(...)`, checked as far as no weight is needed.

        rank: of every matrix. Or ratio: the share of all these matrices' parameters that they have
        together afterwards, each with the rank that is best for it; one that would not get smaller
        stays dense. ffn: the linears of the FFN too. method: "data", closest outputs on the
        calibration tokens, or "svd", closest weights."""
        check_common("lowrank", method, ffn=ffn)
        if (rank is None) == (ratio is None):
            raise ValueError(
                f"projections: lowrank: rank={rank!r} and ratio={ratio!r}, valid is one of them, "
                f"for example {cls.EXAMPLE}"
            )
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if ratio is not None and not (number and 0 < ratio < 1):
            raise ValueError(
                f"projections: lowrank: ratio: got {ratio!r}, valid are numbers between 0 and 1"
            )
        return dict(rank=rank, ratio=ratio, ffn=ffn, method=method)

    @classmethod
    def check_sizes(
        cls, in_features: int, out_features: int, *, where: str, **options: Any
    ) -> None:
        whole, each = in_features * out_features, in_features + out_features
        rank, ratio = options.get("rank"), options.get("ratio")
        if rank is not None:
            _check_rank(rank, max(1, (whole - 1) // each), f"{where}: lowrank: ", whole)
        elif ratio is not None and ratio * whole < each:
            raise ValueError(
                f"{where}: lowrank: ratio: got {ratio}, rank 1 has {each / whole:.4g} of the "
                f"parameters of a weight of {out_features} x {in_features}; give at least that"
            )

    @classmethod
    def shared(cls, **options: Any) -> Together | None:
        ratio = options.get("ratio")
        return None if ratio is None else Together(ratio)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | None = None,
        *,
        ratio: float | None = None,
        moment: Tensor | None = None,
    ) -> LowRankLinear:
        """The layer closest to `linear`, in its dtype and on its device; the bias is copied.

        rank; or ratio: the largest one whose parameters are at most that share of the weight's.
        moment (in_features, in_features): second moment of the inputs, E[x x^T]; given, closest in
        its outputs, otherwise in its weights. ValueError for sizes that cannot be, and for weights
        that are not finite."""
        weight = linear.weight
        if rank is None:
            given = cls.options(rank, ratio)["ratio"]
            cls.check_sizes(linear.in_features, linear.out_features, where="weight", ratio=given)
            rank = int(given * weight.numel()) // sum(weight.shape)
        new = cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        return new.take(linear, *closest(weight, rank, moment), moment)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype; with gradients."""
        return product(product(x, self.right), self.left, self.bias)

    def dense(self) -> Tensor:
        """W, (out_features, in_features), multiplied out."""
        return self.left @ self.right

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform; the variance of outputs is a new nn.Linear's, a third of the mean square of the
        inputs.
        """
        # uniform on (-a, a) has variance a^2/3: `right` keeps the variance of x
        bound = (3 / self.in_features) ** 0.5
        nn.init.uniform_(self.right, -bound, bound)
        nn.init.uniform_(self.left, -(self.rank**-0.5), self.rank**-0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @property
    def weight_parameters(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    def cost(self, rows: int, backward: bool = False) -> Cost:
        """The fewest operations and bytes for x (rows, in_features): the numbers between both
        products never leave the chip.

        backward: of the backward pass alone, which makes these numbers again, and two products for
        each factor."""
        size, factors = self.left.element_size(), self.weight_parameters
        x, y = rows * self.in_features * size, rows * self.out_features * size
        flops = 2 * rows * factors
        if backward:
            again = 2 * rows * self.right.numel()
            return Cost(2 * flops + again, x + y + factors * size, x + self.nbytes)
        return Cost(flops, x + self.nbytes, y)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class Together:
    """Ranks by matrix for `ratio` of the parameters of all; see `base.Shared`."""

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.spectra: dict[str, Spectrum] = {}

    def look(self, linear: nn.Linear, moment: Tensor | None) -> Tensor:
        """The squared singular values that decide what each rank loses, fp64 on the CPU."""
        return torch.linalg.svdvals(_scaled(linear.weight, moment)).square().cpu()

    def add(self, name: str, linear: nn.Linear | StructuredLinear, seen: Tensor) -> None:
        """Notes what `look` has seen of the matrix of this name."""
        self.spectra[name] = Spectrum(linear.out_features, linear.in_features, seen)

    def sizes(self) -> dict[str, dict | None]:
        """{"rank": …} for each, None for those that stay dense."""
        spectra = list(self.spectra.values())
        budget = int(self.ratio * sum(one.dense for one in spectra))
        found = ranks(spectra, budget)
        return {
            name: None if rank is None else {"rank": rank}
            for name, rank in zip(self.spectra, found, strict=True)
        }


@torch.no_grad()
def closest(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """right (rank, in) and left (out, rank), fp64, whose product is closest to weight (out, in): in
    the Frobenius norm, or in the outputs for inputs of second moment `moment` (in, in).

    ValueError for a weight that is not finite."""
    vectors = torch.linalg.svd(_scaled(weight, moment), full_matrices=False).U[:, :rank]
    right = vectors.T @ weight.double()
    # Any invertible matrix between the two is free. Each pair of a row and a column gets the same
    # norm, as half precision, quantizers and optimizers like it.
    roots = right.norm(dim=1).sqrt()
    return right / roots.clamp_min(1e-150)[:, None], vectors * roots


def _scaled(weight: Tensor, moment: Tensor | None) -> Tensor:
    """W S^(1/2) up to a rotation, fp64: its left singular vectors and its values are what is
    wanted."""
    if not torch.isfinite(weight).all():
        raise ValueError("lowrank: the weight holds NaN or Inf")
    weight = weight.detach().double()
    if moment is None:
        return weight
    return weight @ torch.linalg.cholesky(damped(moment.to(weight)))


def _check_rank(rank: object, most: int, where: str, whole: int | None = None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        why = "" if whole is None else f", which have fewer parameters than the weight's {whole:,}"
        raise ValueError(f"{where}rank: got {rank!r}, valid are 1 to {most}{why}")
