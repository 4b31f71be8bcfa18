"""Inputs of very different sizes, as trained models have them: one massive channel changes nothing
for the others. Rescaling a channel, and its weights the other way, leaves every method where it
was."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from effattn.calibration.refit import OutputRefit
from effattn.damping import DAMPING, damped
from effattn.hf import anatomy as hf
from effattn.prune import structured
from effattn.prune.structural.criteria import obs
from effattn.prune.unstructured import from_files
from effattn.prune.unstructured.methods.sparsegpt import sparsegpt
from effattn.prune.unstructured.methods.wanda import wanda_mask
from effattn.prune.unstructured.nm import Sparsity

# of SmolLM2-135M's residual stream: 23,936 where most are near 10
MASSIVE = 2048.0
SCALES = st.integers(-16, 16).map(lambda power: 2.0**power)  # exact in every dtype


def layer(outputs: int = 48, inputs: int = 64, tokens: int = 640):
    """Weights (outputs, inputs), and calibration and held-out inputs (tokens, inputs): correlated,
    and of sizes that differ by a few times."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(
        outputs,
        inputs,
        generator=draw,
        dtype=torch.float64,
    )
    mix = (
        2
        * torch.randn(
            inputs,
            inputs,
            generator=draw,
            dtype=torch.float64,
        )
        / inputs**0.5
    )
    sizes = torch.randn(
        inputs,
        generator=draw,
        dtype=torch.float64,
    ).exp()
    x = torch.randn(
        2 * tokens,
        inputs,
        generator=draw,
        dtype=torch.float64,
    )
    return weight, *((x @ (mix + torch.eye(inputs).double()) * sizes).split(tokens))


def lost(weight, pruned, x) -> float:
    """The squared error of the output, over its square."""
    return float(((weight - pruned) @ x.T).square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparsegpt_beats_wanda_beside_a_massive_channel(sparsity, dtype):
    """Damped by the diagonal's mean, which is the massive channel's, it is magnitude pruning."""
    weight, seen, held_out = layer()
    for x in (seen, held_out):
        x[:, 20] *= MASSIVE
    weight[:, 20] /= MASSIVE
    hessian, what = seen.T @ seen, Sparsity.parse(sparsity)
    mask = wanda_mask(weight, hessian.diagonal(), what)
    wanda = lost(weight, weight.masked_fill(mask, 0), held_out)
    mean = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert (
        lost(
            weight,
            sparsegpt(weight, mean, what, damping=0).weight,
            held_out,
        )
        > wanda
    )
    ours = sparsegpt(
        weight.to(dtype),
        hessian,
        what,
    ).weight.double()
    assert lost(weight, ours, held_out) < 0.9 * wanda


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 63), SCALES)
def test_no_method_depends_on_the_size_of_a_channel(channel, scale):
    weight, x, other = layer()
    by = torch.ones(64, dtype=torch.float64)
    by[channel] = scale
    gram, target = x.T @ x, x @ weight.T + other[:, :48]

    pruned, same = (
        sparsegpt(weight, gram, 0.5),
        sparsegpt(
            weight / by,
            gram * by * by[:, None],
            0.5,
        ),
    )
    assert torch.equal(pruned.mask, same.mask)
    torch.testing.assert_close(pruned.weight, same.weight * by)

    order = obs.removal_order(gram, weight)
    assert torch.equal(order, obs.removal_order(gram * by * by[:, None], weight / by))

    fits = OutputRefit(), OutputRefit()
    for fit, z in zip(
        fits,
        (x, x * by),
        strict=True,
    ):
        fit.add(z, target)
    torch.testing.assert_close(fits[0].solve(weight), fits[1].solve(weight / by) * by)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_a_pruned_model_does_not_depend_on_the_size_of_a_channel(scale, tokens):
    """Through the whole flow: obs chooses, what is left is solved again."""
    plain, scaled = (tiny("llama", dtype=torch.float64) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    for layer in hf.of(scaled):
        layer.feed_forward.inputs[-1].weight.data[7] *= scale  # up_proj, which is linear in it
        layer.feed_forward.output.weight.data[:, 7] /= scale
    found = [
        structured(
            one,
            tokens,
            ffn=0.5,
            criterion="obs",
            length=64,
        )
        for one in (plain, scaled)
    ]
    (one, report), (other, again) = found
    assert report.data["kept"] == again.data["kept"]
    ids = tokens[None, :32]
    with torch.no_grad():
        torch.testing.assert_close(
            one(ids).logits,
            other(ids).logits,
            rtol=1e-5,
            atol=1e-7,
        )


def test_an_input_that_was_always_zero_keeps_its_weights_in_a_refit():
    weight, x, _ = layer()
    x[:, 5] = 0
    fit = OutputRefit()
    fit.add(x, x @ weight.T)
    start = weight + 0.1
    solved = fit.solve(start, damping=1e-3)
    torch.testing.assert_close(solved[:, 5], start[:, 5])
    assert fit.error(solved) < 1e-4 * fit.error(start)


def test_damping_is_of_each_input_and_a_copy():
    gram = torch.tensor([[1e8, 3.0, 0], [3.0, 2.0, 0], [0, 0, 0]])
    assert damped(gram, 0.5).tolist() == [[1.5e8, 3.0, 0], [3.0, 3.0, 0], [0, 0, 1]]
    assert gram[2, 2] == 0


def test_files_with_a_fault_are_found_beside_a_massive_channel(tokens, tmp_path, monkeypatch):
    """A share of the largest hidden value would allow 0.5 here; the fault changes less."""
    model = tiny("llama", dtype=torch.float32)
    model.model.embed_tokens.weight.data[:, 3] = 5e4
    model.save_pretrained(tmp_path / "in")
    whole = from_files._Run.write_rest

    def damage(run):
        whole(run)
        file = run.out / run._file(1)
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
        save_file(tensors, file, {"format": "pt"})

    arguments = {"length": 64, "method": "wanda"}
    facts = from_files.prune_files(tmp_path / "in", tmp_path / "good", tokens, **arguments)
    assert facts["verification"]["max_difference"] == 0
    monkeypatch.setattr(from_files._Run, "write_rest", damage)
    with pytest.raises(RuntimeError, match="other hidden states") as error:
        from_files.prune_files(tmp_path / "in", tmp_path / "bad", tokens, **arguments)
    assert float(re.search(r"difference ([\d.e-]+)", str(error.value))[1]) < 1e-5 * 5e4
