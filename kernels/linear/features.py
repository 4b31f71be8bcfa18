"""Feature maps: what stands in for the exponential, so that attention becomes sums that can be
kept.

A map turns x (..., D) into features phi (..., F) >= 0, and maybe a log weight mu (...) of the whole
row: a key counts as exp(mu) phi(x). FAVOR+ needs mu to stay in range; a query's mu cancels in the
normalised output.

    name         phi(x)                               source
    elu          elu(x) + 1                           Katharopoulos et al., arXiv:2006.16236, eq. 7
    relu         max(x, 0)                            arXiv:2202.08791 (without its cosine weights)
    relu2        max(x, 0)^2                          arXiv:2403.04797
    softmax      softmax of x over its D dimensions   arXiv:1812.01243
    identity     x, of either sign: only without a normaliser; or features that were computed before
    favor        exp(w x - |x|^2 / 2), w in W (F, D)  Performer, arXiv:2009.14794, eq. 7
    favor_relu   max(w x, 0) + 0.001                  the same, its generalised kernel

Exponentials end at exp(LOWEST) below: smaller ones count as that, so that the product of a query's
and a key's features never leaves fp32's range, and a normaliser is no subnormal number whose
reciprocal is infinite. Gradients there stay the exponential's. Ordinary inputs do not get there:
1e-13 is lost beside a feature of 1.

`backward` is the derivative, told from x, phi and d phi: dx. The shift of `favor` is a constant
there: what it takes from phi it gives to mu."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given

EPSILON = 1e-3  # of favor_relu
LOWEST = -30.0  # exponent of a feature
LOG2_E = math.log2(math.e)


class FeatureMap(NamedTuple):
    """`forward(x, W) -> (phi, mu or None)` and `backward(x, W, phi, dphi) -> dx`, which may change
    dphi. W is None unless `directed`.

    `forward(x, W, room)` may take memory for phi from `room(shape)`, where a map has several passes
    over it."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
    directed: bool = False  # needs directions W (F, D)
    weighs: bool = False  # gives log weights mu
    signed: bool = False  # features may be negative


def _elu(x: Tensor, _, room: Callable | None = None) -> tuple[Tensor, None]:
    room = x.new_empty if room is None else room
    # A third of the time of torch's own elu on a CPU; exp2 takes 0.6 of exp's.
    phi = torch.clamp(x, min=LOWEST, max=0, out=room(x.shape)).mul_(LOG2_E).exp2_()
    return phi.add_(torch.clamp(x, min=0, out=room(x.shape))), None


def _favor(x: Tensor, directions: Tensor, _=None) -> tuple[Tensor, Tensor]:
    exponent = x @ directions.mT
    top = exponent.amax(dim=-1, keepdim=True)
    mu = top.squeeze(-1) - x.square().sum(dim=-1) / 2
    return exponent.sub_(top).clamp_(min=LOWEST).exp_(), mu


def _favor_backward(x: Tensor, directions: Tensor, phi: Tensor, grad: Tensor) -> Tensor:
    inner = phi * grad
    return torch.addcmul(inner @ directions, x, inner.sum(dim=-1, keepdim=True), value=-1)


def normalized(x: Tensor) -> Tensor:
    """softmax over the last dimension, computed in at least fp32; no feature is below exp(LOWEST),
    which fp16 has not: x should not be in that."""
    phi = x.softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return phi.clamp(min=math.exp(LOWEST)).to(x.dtype)


def _softmax_backward(x, directions, phi: Tensor, grad: Tensor) -> Tensor:
    inner = phi * grad
    return inner.sub_(phi * inner.sum(dim=-1, keepdim=True))


MAPS: dict[str, FeatureMap] = {
    "elu": FeatureMap(
        _elu,
        # exp(x) below 0, where phi is that too
        lambda x, _, phi, grad: grad.mul_(phi.clamp(max=1)),
    ),
    "relu": FeatureMap(
        lambda x, *_: (x.relu(), None),
        lambda x, _, phi, grad: grad * (phi > 0),
    ),
    "relu2": FeatureMap(
        lambda x, *_: (x.relu().square_(), None),
        lambda x, _, phi, grad: grad * x.relu().mul_(2),
    ),
    "softmax": FeatureMap(lambda x, *_: (normalized(x), None), _softmax_backward),
    "identity": FeatureMap(lambda x, *_: (x, None), lambda x, _, phi, grad: grad, signed=True),
    "favor": FeatureMap(_favor, _favor_backward, directed=True, weighs=True),
    "favor_relu": FeatureMap(
        lambda x, directions, *_: ((x @ directions.mT).relu_().add_(EPSILON), None),
        lambda x, directions, phi, grad: (grad * (phi > EPSILON)) @ directions,
        directed=True,
    ),
}


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        phi, _ = MAPS[name].forward(x, None)
        ctx.name = name
        ctx.save_for_backward(x, phi)
        return phi

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad: Tensor):
        x, phi = ctx.saved_tensors
        return MAPS[ctx.name].backward(x, None, phi, grad.clone()), None


def mapped(x: Tensor, name: str) -> Tensor:
    """phi (..., F) of x (..., D) by the map `name`, which has no directions and no log weights;
    forward and backward."""
    return x if name == "identity" else _Mapped.apply(x, name)
