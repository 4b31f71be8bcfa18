"""Models whose modules are hooked, wrapped, compiled or elsewhere: a swap does the same to them as to plain ones."""

from __future__ import annotations

import accelerate
import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported

CPU = torch.device("cpu")


def model_of(kind: str = "llama"):
    return tiny(kind, dtype=torch.float32, num_hidden_layers=3)


def mapped(tmp_path, kind: str, where: dict[str, str]):
    """As `from_pretrained` makes it with a device map; modules that are not named are on the CPU."""
    model_of(kind).save_pretrained(tmp_path / "plain")
    base = "model" if kind != "gpt_neox" else "gpt_neox"
    names = [f"{base}.{name}" for name, _ in getattr(model_of(kind), base).named_children()]
    layers = [f"{base}.layers.{index}" for index in range(3)]
    heads = {name: "cpu" for name, _ in model_of(kind).named_children() if name != base}
    device_map = {name: "cpu" for name in [*names, *layers] if name != f"{base}.layers"} | heads
    device_map |= {name: place for name, place in where.items() if name in device_map}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    return model.eval()


def wrapped(model):
    """Somebody's own forward around the rotary module's."""
    rotary = model.model.rotary_emb
    inner = rotary.forward
    rotary.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


def compiled(model):
    model.model.rotary_emb = torch.compile(model.model.rotary_emb, backend="eager")
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="eager")
    return model


MADE = {
    "a layer on the disk": lambda path: mapped(path, "llama", {"model.layers.0": "disk"}),
    "all on the disk": lambda path: mapped(path, "llama", {f"model.layers.{i}": "disk" for i in range(3)}),
    "embeddings on the disk": lambda path: mapped(path, "llama", {"model.embed_tokens": "disk", "lm_head": "disk"}),
    "cpu_offload": lambda path: accelerate.cpu_offload(model_of(), execution_device=CPU),
    "buffers offloaded": lambda path: accelerate.cpu_offload(model_of(), execution_device=CPU, offload_buffers=True),
    "disk_offload": lambda path: accelerate.disk_offload(model_of(), path / "disk", execution_device=CPU),
    "a wrapped rotary module": lambda path: wrapped(model_of()),
}
SWAPS = {
    "plain rule": dict(positions="ntk(factor=4, variant='fixed')"),
    "yarn": dict(positions="yarn(factor=4)"),
    "two rules": dict(positions="yarn(factor=4)+logn"),
    "learned rule": dict(positions="power(kappa=0.5)"),
    "raw keys": dict(positions="rerope(window=8)"),
    "no positions": dict(positions="nope"),
    "sinks": dict(pattern="sliding(window=6, sinks=2)"),
    "learned": dict(pattern="sliding(window=6, sink_logits=True)"),
    "longformer": dict(pattern="longformer(window=6, global_tokens=2)"),
    "packed": dict(cache="int8(residual=16)"),
}


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def disturb(model) -> None:
    """Other weights for what a swap has added, the same ones in every model."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "effattn" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)


@pytest.mark.parametrize("made", MADE)
def test_a_swap_and_restore(made, tokens, tmp_path):
    ids, plain = tokens[None, :40], model_of()
    own, model = logits(plain, ids), MADE[made](tmp_path)
    assert torch.equal(logits(model, ids), own)
    for name, swap in SWAPS.items():
        effattn.swap(plain, **swap)
        effattn.swap(model, **swap)
        disturb(plain)
        disturb(model)
        expected = logits(plain, ids)
        assert torch.equal(logits(model, ids), expected), name
        assert not torch.allclose(expected, own, atol=1e-4) or name == "packed", name
        effattn.restore(plain)
        assert torch.equal(logits(effattn.restore(model), ids), own), name


@pytest.mark.parametrize("name", ["plain rule", "two rules", "longformer"])
def test_compiled_modules(name, tokens):
    ids, plain, model = tokens[None, :40], model_of(), compiled(model_of())
    own = logits(model, ids)
    for one in (plain, model):
        disturb(effattn.swap(one, **SWAPS[name]))
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(plain, ids), own, atol=1e-3)
    torch.testing.assert_close(logits(effattn.restore(model), ids), own, rtol=1e-5, atol=1e-5)


def test_a_forward_that_was_replaced_is_refused_where_it_would_be_lost(tokens):
    model = model_of()
    projection = model.model.layers[1].self_attn.v_proj
    inner = projection.forward
    projection.forward = lambda x: 2 * inner(x)
    before = logits(model, tokens[None, :20])
    with pytest.raises(Unsupported, match=r"layers 1: the forward of v_proj was replaced, which longformer's second"):
        effattn.swap(model, "longformer", window=6)
    assert torch.equal(logits(model, tokens[None, :20]), before)
    effattn.swap(model, {"0": "longformer(window=6)", "1": "sliding(window=6)"})


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox"])
def test_other_architectures_on_the_disk(kind, tokens, tmp_path):
    base = "gpt_neox" if kind == "gpt_neox" else "model"
    ids, plain = tokens[None, :40], model_of(kind)
    model = mapped(tmp_path, kind, {f"{base}.layers.1": "disk"})
    for swap in (dict(positions="yarn(factor=4)+logn"), dict(pattern="longformer(window=6, global_tokens=2)")):
        for one in (plain, model):
            disturb(effattn.swap(one, **swap))
        assert torch.equal(logits(model, ids), logits(plain, ids))
        effattn.restore(plain)
        effattn.restore(model)
