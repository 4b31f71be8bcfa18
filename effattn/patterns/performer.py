"""Performer (FAVOR+): softmax attention estimated with positive orthogonal random features, at
linear cost.

    exp(scale q.k) = E[exp(w.q' - |q'|^2 / 2) exp(w.k' - |k'|^2 / 2)]
    w ~ N(0, 1), q' = sqrt(scale) q, k' = sqrt(scale) k

Choromanski et al., arXiv:2009.14794, lemma 1. The error falls like 1 / sqrt(features), and grows
exponentially with |q'|^2 and |k'|^2: for inputs of unit variance it is large at any number of
features that pays.

B: rows; H: heads; T: tokens; D: of a key; F: `features` random directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.errors import check_choice
from effattn.interface import Traits
from effattn.patterns.exact import check_size
from effattn.patterns.feature_maps import KernelBackend
from effattn.registry import register

KERNELS = {"softmax": "favor", "relu": "favor_relu"}


@register("performer")
class Performer(KernelBackend):
    """Attention by `features` random features of q and k.

    kernel: "softmax" estimates softmax attention; "relu" is relu(w.x) + 0.001, a kernel of its own.
    seed: of the directions, which are drawn by a generator of their own at the first call, when the
    head size is known. They are a buffer `directions` (features, D), in the state_dict."""

    traits = Traits(exact=False, causal=True, bidirectional=True, learned=False, state="recurrent")

    def __init__(
        self, features: int = 256, kernel: str = "softmax", seed: int = 0, impl: str = "auto"
    ):
        super().__init__(impl)
        self.features = check_size("performer", "features", features)
        self.kernel = check_choice("performer: kernel", kernel, KERNELS)
        self.seed = self.first_seed = check_size("performer", "seed", seed, least=0)
        self.feature_map = KERNELS[kernel]
        self.register_buffer("directions", None)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, kernel={self.kernel!r}, seed={self.seed}, "
            f"{super().extra_repr()}"
        )

    @property
    def signature(self) -> str:
        """As it was made: what a redraw takes from a state, `draws` tells."""
        return (
            f"performer(features={self.features}, kernel={self.kernel!r}, seed={self.first_seed})"
        )

    def redraw(self, seed: int | None = None) -> None:
        """New directions, of `seed` (None: the next one). A state with tokens from before is
        refused from now on.
        """
        self.seed = (
            self.seed + 1
            if seed is None
            else check_size("performer: redraw", "seed", seed, least=0)
        )
        self.draws += 1
        if self.directions is not None:
            self.directions.copy_(draw(self.features, self.directions.shape[1], self.seed))

    def check_call(self, q, k, v, causal, extras):
        dim = q.shape[-1]
        if self.directions is None:
            self.directions = draw(self.features, dim, self.seed).to(q.device)
        if self.directions.shape != (self.features, dim):
            raise ValueError(
                f"q: expected heads of {self.directions.shape[1]}, as the directions are, got {dim}"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        given = state_dict.get(prefix + "directions")
        if given is not None:
            if self.directions is None and given.shape[0] == self.features:
                self.directions = torch.empty_like(given)
            self.draws += 1  # sums that a state made with the old directions are void
        super()._load_from_state_dict(state_dict, prefix, *args)

    def feature_count(self, head_dim: int) -> int:
        return self.features

    def feature_flops(self, head_dim: int) -> int:
        return 2 * head_dim * self.features

    def kernel_options(self, k):
        return {"directions": self.directions}


def draw(features: int, dim: int, seed: int) -> Tensor:
    """Directions (features, dim) fp32, each N(0, 1) as a whole, orthogonal within every block of
    dim (section 3.2).

    The QR decomposition of a normal matrix, with the signs that make it unique, is uniform over the
    rotations; lengths are those of independent normal vectors."""
    # in fp64 on the CPU, so that a seed means the same directions on every device
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-features // dim)
    q, r = torch.linalg.qr(torch.randn(blocks, dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(features, dim, generator=generator, dtype=torch.float64).norm(
        dim=-1, keepdim=True
    )
    return (q.mT.reshape(-1, dim)[:features] * lengths).float()
