"""Latents of keys and values: the best there are by brute force, and lossless where they can be."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import tiny
from test_heads import regauge

from effattn.errors import Unsupported
from effattn.heads.latent.convert import convert_weights
from effattn.heads.latent.ranks import STEP, Size, allocate, full_rank, keeping
from effattn.heads.latent.spectrum import key_weight, spectrum, value_weight
from effattn.hf import anatomy as hf

CALIBRATION = dict(length=64, batch=8)
KINDS = ["llama", "qwen2", "qwen3", "olmo2", "stablelm", "gemma2", "cohere", "glm", "opt"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment_of(x: torch.Tensor) -> torch.Tensor:
    extended = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return extended.T @ extended / len(x)


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[:128].view(2, 64), use_cache=False).logits.double()


def weighed_error(layer, factors, x: torch.Tensor) -> float:
    """The squared error that the spectrum promises, measured on keys and values of x (N, D)."""
    weights = 0.1 * key_weight(layer, moment_of(x), None), value_weight(layer)
    c, total = x @ factors.down.T, 0.0
    pairs = ((layer.k, factors.key, factors.key_bias), (layer.v, factors.value, factors.value_bias))
    for weight, (projection, up, bias) in zip(weights, pairs, strict=True):
        true = torch.einsum("nD,kdD->nkd", x, projection.by_head)
        if projection.bias_by_head is not None:
            true = true + projection.bias_by_head
        lost = true - torch.einsum("nr,kdr->nkd", c, up) - bias
        total += float(torch.einsum("nkd,kde,nke->", lost, weight, lost)) / len(x)
    return total


# GQA with biases on k and v, MHA without
@pytest.mark.parametrize(("kind", "kv_heads"), [("qwen2", 2), ("llama", 8)])
def test_the_energy_left_out_is_the_error(kind, kv_heads):
    layer = hf.of(tiny(kind, num_key_value_heads=kv_heads)).layers[0]
    x = draw(400, 64) @ draw(64, 64, seed=1) * 0.1 + draw(64, seed=2)
    found = spectrum(layer, moment_of(x))
    for rank in (1, 5, 16, 31):
        error = weighed_error(layer, found.factors(rank), x)
        torch.testing.assert_close(error, float(found.energy[rank:].sum()), rtol=1e-6, atol=1e-9)


def test_no_other_latent_of_the_rank_loses_less():
    layer = hf.of(tiny("qwen2", num_key_value_heads=2)).layers[0]
    x = draw(400, 64) @ draw(64, 64, seed=1) * 0.1
    best = spectrum(layer, moment_of(x)).factors(6)
    least = weighed_error(layer, best, x)
    for seed in range(20):  # a step in any direction, with the best keys and values for it
        other = copy.copy(best)
        other.down = best.down + 0.03 * draw(6, 64, seed=seed)
        c = torch.cat([x @ other.down.T, torch.ones(400, 1, dtype=torch.float64)], dim=1)
        for name, projection in (("key", layer.k), ("value", layer.v)):
            true = x @ projection.weight.T + projection.bias
            solved = torch.linalg.lstsq(c, true).solution.T.unflatten(0, (2, -1))
            setattr(other, name, solved[..., :-1])
            setattr(other, f"{name}_bias", solved[..., -1])
        assert weighed_error(layer, other, x) > least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_full_rank_is_the_parent(kind, kv_heads, tokens):
    model = tiny(kind, num_key_value_heads=kv_heads)
    before = logits(model, tokens)
    rank = full_rank(hf.of(model).layers[0])
    convert_weights(model, tokens, rank=rank, refit=False, **CALIBRATION)
    assert (logits(model, tokens) - before).abs().max() < 1e-5
    assert hf.of(model).layers[0].latent.rank == rank


def test_keys_and_values_of_low_rank_are_kept_exactly(tokens):
    model = tiny("llama")
    for layer in hf.of(model):
        common = draw(10, 64, seed=layer.index)
        for projection in (layer.k, layer.v):
            projection.module.weight.data.copy_(draw(64, 10, seed=5 + layer.index) @ common / 20)
    before = logits(model, tokens)
    rows = convert_weights(model, tokens, rank=10, **CALIBRATION)
    assert (logits(model, tokens) - before).abs().max() < 1e-5
    assert all(row["lost"] < 1e-12 for row in rows)


def test_the_gauge_of_the_parent_does_not_matter(tokens):
    results = []
    for seed in (None, 1):
        model = tiny("llama")
        if seed is not None:
            regauge(model, seed, general=True)
        convert_weights(model, tokens, ratio=0.3, refit=False, **CALIBRATION)
        results.append(logits(model, tokens))
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_the_refit_helps(tokens):
    rows = convert_weights(tiny("llama"), tokens, rank=16, **CALIBRATION)
    assert all(row["attention_error"] < row["attention_error_merged"] for row in rows)


def test_steps_are_given_where_they_keep_most():
    shares = [draw(40, seed=s).square().sort(descending=True).values for s in range(3)]
    full, total = [40, 40, 24], 72

    def kept(ranks) -> float:
        return sum(float(one[:rank].sum()) for one, rank in zip(shares, ranks, strict=True))

    choices = itertools.product(*[range(STEP, most + 1, STEP) for most in full])
    best = max(kept(ranks) for ranks in choices if sum(ranks) <= total)
    found = allocate(shares, full, total)
    assert sum(found) <= total
    assert kept(found) == pytest.approx(best)


def test_the_least_rank_that_keeps_the_energy():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, *[0.0625 / 12] * 12])
    assert keeping(shares, 0.9, 16) == STEP
    assert keeping(shares, 1.0, 12) == 12


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "got no size, valid is one of rank"),
        ({"rank": 8, "ratio": 0.5}, "got rank, ratio, valid is one of"),
        ({"rank": 65}, "rank: got 65, valid is 1 to 64"),
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 8.0}, "rank: got 8.0, valid is a whole number"),
        ({"ratio": 1.5}, "ratio: got 1.5, valid is .* to 1"),
        ({"bytes": 4}, "bytes: got 4, valid is 128 to 2048"),
        ({"energy": 0}, "energy: got 0"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(asked, message, tokens):
    with pytest.raises(ValueError, match=message):
        Size(**asked).check(hf.of(tiny("llama")))


def test_what_cannot_be_is_refused_before_anything_changes(tokens):
    for kind, extra, reason in (
        ("phi3", {}, "makes q, k and v by one module"),
        ("olmo", {"clip_qkv": 1.0}, "clips keys and values"),
    ):
        model = tiny(kind, **extra)
        before = logits(model, tokens)
        with pytest.raises(Unsupported, match=reason):
            convert_weights(model, tokens, rank=8)
        assert torch.equal(logits(model, tokens), before)
    model = tiny("llama")
    with pytest.raises(ValueError, match="calibration: got None, latent heads need tokens"):
        convert_weights(model, rank=8)
    convert_weights(model, tokens, rank=8, **CALIBRATION)
    with pytest.raises(Unsupported, match="has them already, of rank 8"):
        convert_weights(model, tokens, rank=8)


def test_an_error_on_the_way_leaves_the_model_as_it_was(tokens):
    model = tiny("llama")
    before, names = logits(model, tokens), set(model.state_dict())

    def stop(done: int, total: int) -> None:
        if done == total - 1:  # one layer is converted
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_weights(model, tokens, ratio=0.4, progress=stop, **CALIBRATION)
    assert torch.equal(logits(model, tokens), before)
    assert set(model.state_dict()) == names
