"""The best latents of one layer, of every rank at once: the spectrum of weighed keys and values.

A latent c = W_D x of r numbers, from which keys and values come by K = W_UK c and V = W_UV c, loses
least when W_D has the r leading eigenvectors of

    M = E[a a^T],  a = [ A_K (k - mean k) ; A_V (v - mean v) ]

where A_K and A_V say what an error of a key and of a value does to the layer's output: M's other
eigenvalues are the squared error. It is the SVD of the stacked weights, whitened by the inputs'
second moment on one side and by these weights on the other.

A_V A_V^T is O^T O, summed over the query heads of a K/V head: an error of v moves the output by O
times it. An error of k moves a score by q times it, and the output by that times what the values
differ by, scale^2 E[q q^T] E|O (v - mean v)|^2 in the mean, as if all tokens' errors were
independent and weighed alike. They are not: a softmax hides what it shifts alike, and looks at few
tokens. `KEY_SHARE` makes up for it.

RoPE turns two dimensions into each other: both get their mean weight, so that a key's error weighs
the same wherever it stands.

K: key/value heads; r: query heads of each, or a rank; d: size of a head; D1: hidden size + 1, the
bias; n = 2 K d."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.calibration.attended import attended
from effattn.heads.roots import roots
from effattn.hf.anatomy import Layer

# Of the weight of keys' errors beside values'. The embedded model at 1,024 B a token, no re-fit,
# excess nats: 0.077 at 3, 0.051 at 1, 0.035 at 0.3, 0.020 at 0.1, 0.021 at 0.03.
KEY_SHARE = 0.1


@dataclass
class Factors:
    """A latent of rank r, fp64: c = down x with down (r, D), and keys and values of it by key and
    value (K, d, r) and their biases (K, d): the layer's own, and the mean of what c leaves out."""

    down: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor


@dataclass
class Spectrum:
    """energy (n,): the squared error that each further number of a latent makes good, descending.
    vectors (n, n): the eigenvectors, as columns. maps (n, D1): keys and values of (x, 1), weighed;
    mean (n,): theirs. inverse (2, K, d, d): of the weights of keys and of values."""

    energy: Tensor
    vectors: Tensor
    maps: Tensor
    mean: Tensor
    inverse: Tensor

    @property
    def shares(self) -> Tensor:
        """energy as shares of all, (n,)."""
        return self.energy / self.energy.sum().clamp_min(1e-300)

    def factors(self, rank: int) -> Factors:
        """The best latent of `rank` numbers."""
        heads, size = self.inverse.shape[1:3]
        vectors = self.vectors[:, :rank]
        down, biases = vectors.T @ self.maps[:, :-1], self.maps[:, -1]
        # in the mean nothing is lost: neither of the biases, nor of what c leaves out
        rest = self.mean - vectors @ (vectors.T @ (self.mean - biases))
        up = torch.cat([vectors, rest[:, None]], dim=1).view(2, heads, size, rank + 1)
        key, value = self.inverse @ up
        # any scale will do: numbers of mean square 1 fit every dtype
        scale = (self.energy[:rank].sum() / rank).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return Factors(
            down / scale,
            key[..., :-1] * scale,
            value[..., :-1] * scale,
            key[..., -1],
            value[..., -1],
        )


def spectrum(layer: Layer, moment: Tensor, inputs: Tensor | None = None) -> Spectrum:
    """Of a layer whose inputs have E[(x, 1)(x, 1)^T] = moment (D1, D1), fp64.

    inputs (N, D): some of them, where q or k go through a norm, whose effect a moment does not
    tell: then keys are weighed by what the norm makes of them in the mean, which is approximate."""
    weights = key_weight(layer, moment, inputs), value_weight(layer).to(moment)
    return joint(layer.k.with_bias.to(moment), layer.v.with_bias.to(moment), *weights, moment)


def joint(
    key: Tensor, value: Tensor, key_weights: Tensor, value_weights: Tensor, moment: Tensor
) -> Spectrum:
    """Of keys and values that are these of (x, 1), (K, d, D1) both, whose errors weigh (K, d, d)
    each, keys' by `KEY_SHARE` beside values'."""
    weights = torch.stack([KEY_SHARE * key_weights, value_weights])
    # keys and values each by itself: a weight counts as zero beside its like
    pairs = [roots(weight) for weight in weights]
    root, inverse = (torch.stack(each) for each in zip(*pairs, strict=True))
    maps = (root @ torch.stack([key, value])).flatten(0, 2)
    mean = maps @ moment[:, -1]
    centred = moment - moment[:, -1:] * moment[-1:]
    energy, vectors = torch.linalg.eigh(maps @ centred @ maps.T)
    return Spectrum(energy.flip(0).clamp_min(0), vectors.flip(1), maps, mean, inverse)


def value_weight(layer: Layer) -> Tensor:
    """O^T O summed over the query heads of each K/V head: (K, d, d), fp64."""
    o = layer.o.by_head.double().unflatten(0, (layer.kv_heads, -1))
    return torch.einsum("krDd,krDe->kde", o, o)


def key_weight(layer: Layer, moment: Tensor, inputs: Tensor | None) -> Tensor:
    """scale^2 E[q q^T] E|O (v - mean v)|^2 summed over the query heads of each K/V head: (K, d, d),
    fp64, of which rotary dimensions have the diagonal, a mean for each pair."""
    kv_heads, size = layer.kv_heads, layer.head_dim
    value, o = layer.v.with_bias.to(moment), layer.o.by_head.to(moment)
    centred = moment - moment[:, -1:] * moment[-1:]
    spread = value @ centred @ value.transpose(1, 2)
    spread = torch.einsum(
        "krDd,kde,krDe->kr", o.unflatten(0, (kv_heads, -1)), spread, o.unflatten(0, (kv_heads, -1))
    )
    if inputs is None:
        q = layer.q.with_bias.to(moment).unflatten(0, (kv_heads, -1))
        energy = torch.einsum("kr,krdi,ij,krej->kde", spread, q, moment, q)
    else:
        x = inputs.to(moment)
        q = attended(layer, "q", x).unflatten(1, (kv_heads, -1))
        energy = torch.einsum("kr,nkrd,nkre->kde", spread, q, q) / len(x)
        gain = _norm_gain(layer, x)
        energy = gain[:, :, None] * energy * gain[:, None]
    energy = energy * float(getattr(layer.attention, "scaling", None) or size**-0.5) ** 2
    real, imaginary = layer.rotary_pairs()
    pairs = energy.diagonal(dim1=1, dim2=2).clone()
    pairs[:, real] = pairs[:, imaginary] = (pairs[:, real] + pairs[:, imaginary]) / 2
    turned = torch.zeros(size, dtype=torch.bool, device=energy.device)
    turned[torch.cat([real, imaginary])] = True
    alone = turned[:, None] | turned
    return torch.where(alone, torch.diag_embed(pairs), energy)


def _norm_gain(layer: Layer, x: Tensor) -> Tensor:
    """By how much a key's error grows in the layer's key norm, in the mean: (K, d)."""
    before = torch.einsum("nD,kdD->nkd", x, layer.k.by_head.to(x))
    if layer.k.bias_by_head is not None:
        before = before + layer.k.bias_by_head.to(x)
    after = attended(layer, "k", x)
    old, new = (each.square().mean(dim=0) for each in (before, after))
    return (new / old.clamp_min(1e-300)).sqrt()
