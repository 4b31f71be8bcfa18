"""Models whose modules are hooked, wrapped, compiled or elsewhere: a swap does the same to them as
to plain ones.
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported
from effattn.hf import placement
from effattn.measuring.variants import build, parse_all

CPU = torch.device("cpu")


def model_of(kind: str = "llama"):
    return tiny(kind, dtype=torch.float32, num_hidden_layers=3)


def mapped(tmp_path, kind: str, where: dict[str, str]):
    """As `from_pretrained` makes it with a device map; modules that are not named are on the
    CPU.
    """
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
    model.model.layers[1].self_attn = torch.compile(
        model.model.layers[1].self_attn, backend="eager"
    )
    return model


MADE = {
    "a layer on the disk": lambda path: mapped(path, "llama", {"model.layers.0": "disk"}),
    "all on the disk": lambda path: mapped(
        path, "llama", {f"model.layers.{i}": "disk" for i in range(3)}
    ),
    "embeddings on the disk": lambda path: mapped(
        path, "llama", {"model.embed_tokens": "disk", "lm_head": "disk"}
    ),
    "cpu_offload": lambda path: accelerate.cpu_offload(model_of(), execution_device=CPU),
    "buffers offloaded": lambda path: accelerate.cpu_offload(
        model_of(), execution_device=CPU, offload_buffers=True
    ),
    "disk_offload": lambda path: accelerate.disk_offload(
        model_of(), path / "disk", execution_device=CPU
    ),
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


@pytest.mark.parametrize("name", ["plain rule", "two rules"])
def test_compiled_modules(name, tokens):
    ids, plain, model = tokens[None, :40], model_of(), compiled(model_of())
    own = logits(model, ids)
    for one in (plain, model):
        disturb(effattn.swap(one, **SWAPS[name]))
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(plain, ids), own, atol=1e-3)
    torch.testing.assert_close(logits(effattn.restore(model), ids), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["two rules", "longformer"])
def test_copies_are_made_in_one_graph(name, tokens):
    ids = tokens[None, :20]
    model = effattn.swap(tiny("llama", dtype=torch.float32, num_hidden_layers=1), **SWAPS[name])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(20)[None],
        use_cache=False,
    )
    disturb(model)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)


class Narrow(accelerate.hooks.ModelHook):
    """Takes what comes to another dtype and back, as a hook on a device of its own takes it
    there.
    """

    def pre_forward(self, module, *args, **kwargs):
        def narrow(x):
            if isinstance(x, tuple):
                return tuple(map(narrow, x))
            return x.float() if torch.is_tensor(x) and x.is_floating_point() else x

        return tuple(map(narrow, args)), {name: narrow(x) for name, x in kwargs.items()}

    def post_forward(self, module, output):
        return output[0].double(), *output[1:]


@pytest.mark.parametrize("name", ["two rules", "raw keys", "longformer", "packed"])
def test_hooks_that_change_what_comes_in(name, tokens):
    ids, plain, model = tokens[None, :40], model_of(), model_of().double()
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer.self_attn.float(), Narrow())
    torch.testing.assert_close(logits(model, ids).float(), logits(plain, ids), rtol=1e-4, atol=1e-4)
    for one in (plain, model):
        disturb(effattn.swap(one, **SWAPS[name]))
    torch.testing.assert_close(logits(model, ids).float(), logits(plain, ids), rtol=1e-4, atol=1e-4)


def test_a_forward_that_was_replaced_is_refused_where_it_would_be_lost(tokens):
    model = model_of()
    projection = model.model.layers[1].self_attn.v_proj
    inner = projection.forward
    projection.forward = lambda x: 2 * inner(x)
    before = logits(model, tokens[None, :20])
    with pytest.raises(
        Unsupported,
        match=r"layers 1: the forward of v_proj was replaced, which longformer's second",
    ):
        effattn.swap(model, "longformer", window=6)
    assert torch.equal(logits(model, tokens[None, :20]), before)
    effattn.swap(model, {"0": "longformer(window=6)", "1": "sliding(window=6)"})


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox"])
def test_other_architectures_on_the_disk(kind, tokens, tmp_path):
    base = "gpt_neox" if kind == "gpt_neox" else "model"
    ids, plain = tokens[None, :40], model_of(kind)
    model = mapped(tmp_path, kind, {f"{base}.layers.1": "disk"})
    for swap in (
        dict(positions="yarn(factor=4)+logn"),
        dict(pattern="longformer(window=6, global_tokens=2)"),
    ):
        for one in (plain, model):
            disturb(effattn.swap(one, **swap))
        assert torch.equal(logits(model, ids), logits(plain, ids))
        effattn.restore(plain)
        effattn.restore(model)


LEARNED = {
    "longformer": dict(pattern="longformer(window=6, global_tokens=2)"),
    "sink logits": dict(pattern="sliding(window=6, sink_logits=True)"),
    "positions": dict(positions="power(kappa=0.5)"),
    "monarch": dict(projections="monarch(blocks=8)"),
}
OFFLOADED = ["a layer on the disk", "cpu_offload", "disk_offload"]


@pytest.mark.parametrize("made", OFFLOADED)
def test_what_is_elsewhere_is_saved_and_measured(made, tokens, tmp_path):
    ids, plain, model = tokens[None, :40], model_of(), MADE[made](tmp_path)
    assert effattn.perplexity(model, tokens[:100], 32) == effattn.perplexity(
        plain, tokens[:100], 32
    )
    for name in ("plain rule", "longformer", "learned rule"):
        for one in (plain, model):
            disturb(effattn.swap(one, **SWAPS[name]))
        effattn.save(model, tmp_path / name)
        assert torch.equal(logits(effattn.load(tmp_path / name), ids), logits(plain, ids)), name
        assert placement.is_elsewhere(model)
        effattn.restore(plain)
        effattn.restore(model)
    twice = {"0": "sliding(window=8)", "1-": "dense"}
    cached = [
        effattn.swap(one, twice).generate(ids, max_new_tokens=4, do_sample=False)
        for one in (plain, model)
    ]
    assert torch.equal(*cached)


@pytest.mark.parametrize("name", LEARNED)
def test_offloading_after_the_swap(name, tokens, tmp_path):
    ids, model = tokens[None, :40], effattn.swap(model_of(), **LEARNED[name])
    disturb(model)
    expected = logits(model, ids)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert torch.equal(logits(model, ids), expected)
    effattn.save(model, tmp_path / "saved")
    assert torch.equal(logits(effattn.load(tmp_path / "saved"), ids), expected)


def test_non_finite_weights_are_found_elsewhere_too(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf \(1 of"
    ):
        effattn.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


CHANGES = {
    "convert_gqa": lambda model, tokens: effattn.convert_gqa(model, kv_heads=2, calibration=tokens),
    "heads": lambda model, tokens: effattn.swap(model, "dense", heads="mqa", calibration=tokens),
    "projections": lambda model, tokens: effattn.swap(
        model, "dense", projections="monarch(blocks=8)"
    ),
    "oneshot": lambda model, tokens: effattn.prune.oneshot(model, tokens, sparsity=0.5),
    "shear": lambda model, tokens: effattn.prune.shear(
        model, effattn.prune.Target(ffn=48), tokens, length=64
    ),
    "structured": lambda model, tokens: effattn.prune.structured(model, tokens, ffn=48),
    "quantize_weights": lambda model, tokens: effattn.quant.quantize_weights(model),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("made", [*OFFLOADED, "meta"])
def test_what_changes_weights_is_refused_before_any_work(made, what, tokens, tmp_path):
    model = model_of().to("meta") if made == "meta" else MADE[made](tmp_path)
    before = None if made == "meta" else logits(model, tokens[None, :20])
    with pytest.raises(
        Unsupported, match=r"the weights of .* are elsewhere .*load the model without device_map"
    ):
        CHANGES[what](model, tokens)
    assert "effattn" not in str(model.config._attn_implementation)
    assert before is None or torch.equal(logits(model, tokens[None, :20]), before)


def one_module():
    model = model_of()
    model.model.layers[2].self_attn.k_proj = model.model.layers[0].self_attn.k_proj
    return model, "layers.0.self_attn.k_proj.weight and model.layers.2.self_attn.k_proj.weight"


def one_weight():
    model = model_of()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model, "layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight"


def one_layer():
    model = model_of()
    model.model.layers[1] = model.model.layers[0]
    return model, "layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("shared", [one_module, one_weight, one_layer])
def test_weights_that_two_modules_share(shared, tokens, tmp_path):
    (model, names), ids = shared(), tokens[None, :40]
    model.config.use_cache = False  # a layer that is there twice has one place in a cache
    own = logits(model, ids)
    changes = CHANGES | {"save": lambda model, tokens: effattn.save(model, tmp_path / "saved")}
    for change in changes.values():
        with pytest.raises(
            Unsupported, match=f"{names} are one weight, which LlamaForCausalLM does not tie"
        ):
            change(model, tokens)
        assert torch.equal(logits(model, ids), own)
    assert not (tmp_path / "saved").exists()
    seen = effattn.swap(model, "longformer(window=81, global_tokens=2)")  # sees everything
    torch.testing.assert_close(logits(seen, ids), own, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(effattn.restore(model), ids), own)


def test_an_output_embedding_that_was_tied_by_hand(tokens, tmp_path):
    model = model_of()
    # transformers would save it without a head
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(
        Unsupported,
        match=r"embed_tokens.weight and lm_head.weight are one weight.*tie_word_embeddings",
    ):
        effattn.save(model, tmp_path / "saved")
    effattn.convert_gqa(model, kv_heads=4, method="mean", refit=False)  # it changes neither
    tied = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    effattn.save(tied, tmp_path / "tied")
    ids = tokens[None, :20]
    assert torch.equal(logits(effattn.load(tmp_path / "tied"), ids), logits(tied, ids))


def contiguous(weight):
    return weight.clone()


def views(weight):
    return torch.cat([torch.randn_like(weight), weight])[len(weight) :]


def transposed(weight):
    return weight.t().contiguous().t()


def strided(weight):
    return torch.stack([weight, torch.randn_like(weight)], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [views, transposed, strided])
def test_layouts_of_weights_change_nothing(layout, tokens, tmp_path):
    found = []
    for make in (contiguous, layout):
        model, outputs = model_of(), []
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(make(module.weight.detach()))
        disturb(effattn.swap(model, "longformer(window=6, global_tokens=2)"))
        effattn.save(model, tmp_path / make.__name__)
        outputs.append(logits(effattn.load(tmp_path / make.__name__), tokens[None, :40]))
        effattn.restore(model)
        effattn.convert_gqa(model, kv_heads=4, calibration=tokens, length=64)
        effattn.prune.oneshot(model, tokens, sparsity="2:4", length=64)
        effattn.prune.pack(model)
        outputs.append(logits(model, tokens[None, :40]))
        found.append(outputs)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_model_without_numbers(tokens, tmp_path):
    model = model_of().to("meta")
    effattn.describe(effattn.swap(model, "sliding(window=8)", positions="yarn(factor=4)+logn"))
    with pytest.raises(
        Unsupported, match="is on the meta device, it has no numbers to compute with"
    ):
        effattn.perplexity(model, tokens[:100], 32)
    with pytest.raises(
        Unsupported,
        match="is on the meta device, and nothing in the model says where its numbers are",
    ):
        effattn.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_approximation_of_weights_that_are_elsewhere(tokens):
    options = dict(methods=["monarch"], layers=[0], length=64)
    models = [tiny("llama", dtype=torch.float32, hidden_size=256) for _ in range(2)]
    accelerate.cpu_offload(models[1], execution_device=CPU)
    expected, found = (
        effattn.measure_approximation(one, tokens, **options).data["matrices"] for one in models
    )
    assert found
    assert found == expected


@pytest.mark.parametrize("made", OFFLOADED)
def test_measuring_leaves_a_model_where_it_is(made, tokens, tmp_path):
    ids, model = tokens[None, :40], MADE[made](tmp_path)
    own, maps = logits(model, ids), placement.maps(model)
    variants = parse_all(["plain", "window=sliding(window=8)", "longformer(window=8)"])
    twins = [build(model, variant) for variant in variants]
    assert torch.equal(logits(twins[0], ids), own)
    assert torch.equal(
        logits(twins[1], ids), logits(effattn.swap(model_of(), "sliding(window=8)"), ids)
    )
    assert torch.equal(
        logits(twins[2], ids), logits(effattn.swap(model_of(), "longformer(window=8)"), ids)
    )
    shared = zip(placement.maps(twins[1]), maps, strict=True)
    assert all(one is other for one, other in shared)  # no second copy of all weights
    assert placement.is_elsewhere(model)
    assert torch.equal(logits(model, ids), own)
