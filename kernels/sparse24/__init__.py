"""y = x W' + bias for a 2:4 sparse W: of every four weights in a row at most two are not zero, and
only those are kept.

    packed = pack(weight)                 # values and 2-bit positions: 9/16 of the bytes in 16 bits
    y = linear(x, packed, bias)

<<<<<<< HEAD
    M rows of x, N outputs, K inputs, a multiple of 8; G = K / 4 groups of a row, H = G / 2
    values  (N, 2, G)     the two kept weights of each group, in the order of their positions: two
                          planes a row
    indices (N, H) uint8  the low four bits belong to group j, the high four to group j + H:
                          position of the first kept weight (0 to 2), plus four times that of the
                          second (1 to 3)

Groups with fewer than two non-zeros keep zeros beside them, at the lowest free positions. Packing
and unpacking are exact, but for -0.0, which comes back as 0.0 where it is not kept."""
=======
How the kept weights lie is in `packed`."""
>>>>>>> layers

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .packed import Packed, pack, unpack

__all__ = ["FEW_ROWS", "IMPLEMENTATIONS", "Packed", "choose", "linear", "pack", "unpack"]

# of x, that the Triton kernel takes: more are a dense product, for which a block of W is unpacked
FEW_ROWS = 16


<<<<<<< HEAD
class Packed(NamedTuple):
    """A 2:4 matrix: values (N, 2, G) of a float dtype, indices (N, G / 2) uint8."""

    values: Tensor
    indices: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.values.shape[0], 4 * self.values.shape[2]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes


def pack(weight: Tensor) -> Packed:
    """weight (N, K), 2:4 sparse along K. ValueError for a K that is no multiple of 8, and for a
    group of four with more than two non-zeros (it says how many there are and where the first
    is)."""
    if weight.ndim != 2 or weight.shape[1] % 8 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, valid is a float matrix (outputs, "
            "inputs) with a "
            "multiple of 8 inputs"
        )
    groups = weight.unflatten(1, (-1, 4))
    kept = groups != 0
    over = kept.sum(dim=2) > 2
    if over.any():
        row, group = over.nonzero()[0].tolist()
        raise ValueError(
            f"weight: it is not 2:4 sparse: {int(over.sum())} of {over.numel()} groups of four "
            "have more than two "
            f"non-zeros, the first in row {row} at columns {4 * group} to {4 * group + 3}"
        )
    # non-zeros first, then free places
    at = (~kept).byte().argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    values = groups.gather(2, at).movedim(2, 1).contiguous()
    nibbles = (at[..., 0] | at[..., 1] << 2).to(torch.uint8)
    low, high = nibbles.chunk(2, dim=1)
    return Packed(values, low | high << 4)


def unpack(packed: Packed) -> Tensor:
    """The matrix (N, K)."""
    return torch.stack(columns(packed), dim=2).flatten(1)


def columns(packed: Packed) -> list[Tensor]:
    """Its columns c, c + 4, c + 8, ... for c from 0 to 3: (N, G) each."""
    nibbles = torch.cat([packed.indices & 15, packed.indices >> 4], dim=1)
    first, second = nibbles & 3, nibbles >> 2
    a, b = packed.values.unbind(1)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    inner = [torch.where(first == c, a, torch.where(second == c, b, zero)) for c in (1, 2)]
    return [torch.where(first == 0, a, zero), *inner, torch.where(second == 3, b, zero)]


=======
>>>>>>> layers
def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W' + bias. x (..., K), bias (N,), of the values' dtype and device; returns (..., N) in it,
    sums are fp32 (torch: as its matrix products do). The gradient is x's and the bias' only: packed
    weights do not train.

    impl: "auto", "torch", "triton" or "reference". Triton takes up to `FEW_ROWS` rows; "auto" takes
    torch for more. ValueError for sizes and dtypes that do not fit."""
    outputs, inputs = packed.shape
    if x.shape[-1] != inputs or x.dtype != packed.values.dtype:
        raise ValueError(
            f"x: expected (..., {inputs}) {packed.values.dtype} as the packed weight is, got "
            f"{tuple(x.shape)} {x.dtype}"
        )
    rows = x.reshape(-1, inputs)
    kind = choose(impl, x.device)
    if kind == "triton" and len(rows) > FEW_ROWS:
        if impl == "triton":
            raise ValueError(
                f"x: got {len(rows)} rows, valid for impl='triton' are at most {FEW_ROWS}"
            )
        kind = "torch"
    if kind == "triton":
        from .triton_impl import linear as run
    elif kind == "reference":
        from .reference import linear as run
    else:
        from .torch_impl import linear as run
    return run(rows, packed, bias).view(*x.shape[:-1], outputs)
