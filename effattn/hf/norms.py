"""The norms that some models have behind their query and key projections, on heads."""

from __future__ import annotations

from torch import Tensor, nn


def normalised(norm: nn.Module, states: Tensor) -> Tensor:
    """states (B, heads, T, d) through a q or k norm: over each head, with gains for each or shared,
    or over all heads.
    """
    if hasattr(norm, "norms"):  # one module a head (StableLM)
        return norm(states)
    by_token = states.transpose(1, 2)
    whole = by_token.flatten(2)
    gain = getattr(norm, "weight", None)
    if gain is not None and gain.shape == whole.shape[2:]:  # over all heads (OLMo 2)
        return norm(whole).view_as(by_token).transpose(1, 2)
    return norm(by_token).transpose(1, 2)


class KeyNorm:
    """A layer's key norm as a function of keys (B, heads, T, d), which a deepcopy copies along."""

    def __init__(self, norm: nn.Module):
        self.norm = norm

    def __call__(self, keys: Tensor) -> Tensor:
        return normalised(self.norm, keys)
