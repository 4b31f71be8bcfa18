"""A swapped model in ordinary hands: another attention function, continuous batching, graphs,
pickles, dropout.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import tiny

from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.surgery.swapping import active, restore, swap

AXES = [
    {"pattern": "sliding(window=8)"},
    {"pattern": "sliding(window=60, sinks=4)"},
    {"pattern": {"1": "block(block=8)"}},
    {"positions": "rerope(window=60)"},
    {"cache": "int8"},
]


def batch(rows=2, length=24):
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def by_model(model):
    model.set_attn_implementation("sdpa")


def by_inner_model(model):
    model.model.set_attn_implementation("eager")


def by_config(model):
    model.config._attn_implementation = "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("change", [by_model, by_inner_model, by_config])
@pytest.mark.parametrize("axis", AXES)
def test_another_attention_function_never_runs_on_a_swapped_layer(axis, change):
    model, tokens = tiny("llama"), batch()
    plain = model(tokens).logits
    swapped = swap(model, **axis)(tokens).logits
    change(model)
    for use_cache in (False, True):
        with pytest.raises(
            Unsupported, match=r"attention implementation was set to '\w+'.*effattn.restore"
        ):
            model(tokens, use_cache=use_cache)
    with pytest.raises(Unsupported, match="attention implementation was set to"):
        model.generate(tokens, max_new_tokens=2)
    model.set_attn_implementation("effattn")  # the two remedies of the message
    assert torch.equal(model(tokens).logits, swapped)
    change(model)
    assert torch.equal(restore(model)(tokens).logits, plain)
    change(model)  # a restored model is anybody's
    # eager's softmax is in fp32
    torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_continuous_batching_is_refused_with_what_helps():
    model, inputs = swap(tiny("llama"), "dense"), batch(1, 12).tolist()
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for attempt in ("effattn", "sdpa"):
        model.set_attn_implementation(attempt)
        with pytest.raises(Unsupported, match=r"continuous batching .*effattn.restore"):
            model.generate_batch(inputs=inputs, generation_config=settings)
        with pytest.raises(Unsupported, match=r"continuous batching .*effattn.restore"):
            model.init_continuous_batching()
    assert (
        type(restore(model).init_continuous_batching(settings)).__name__
        == "ContinuousBatchingManager"
    )


PACKED = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma2", "opt"])
def test_graphs_notice_packed_documents_only_where_there_are_some(kind):
    """Compiled without a mask and a cache, transformers describes documents whether there are
    several or one. Where they begin, a graph cannot ask.
    """
    torch._dynamo.reset()
    model, tokens = swap(tiny(kind), "sliding(window=5)"), batch(2, 20)
    expected = model(tokens, use_cache=False).logits
    step = torch.compile(model, backend="eager", fullgraph=True)
    for given in ({}, {"position_ids": torch.arange(20).expand(2, -1)}):
        torch.testing.assert_close(step(tokens, use_cache=False, **given).logits, expected)
    assert not torch.allclose(model(tokens, use_cache=False, position_ids=PACKED).logits, expected)
    with pytest.raises(RuntimeError, match="packed documents"):
        step(tokens, use_cache=False, position_ids=PACKED)


class Logits(torch.nn.Module):
    """A model with tensors for arguments and result, as exports want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, position_ids=None):
        return self.model(tokens, position_ids=position_ids, use_cache=False).logits


@torch.no_grad()
def test_exported_and_traced():
    model, tokens = Logits(swap(tiny("llama"), "sliding(window=5, sinks=2)")), batch(2, 20)
    expected, places = model(tokens), torch.arange(20).expand(2, -1)
    torch.testing.assert_close(torch.export.export(model, (tokens,)).module()(tokens), expected)
    exported = torch.export.export(model, (tokens, places)).module()
    torch.testing.assert_close(exported(tokens, places), expected)
    with pytest.raises(RuntimeError, match="packed documents"):
        exported(tokens, PACKED)
    torch.testing.assert_close(
        torch.jit.trace(model, (tokens,), check_trace=False)(tokens), expected
    )


@torch.no_grad()
def test_a_compiled_model_follows_swaps_and_restore():
    torch._dynamo.reset()
    model, tokens = tiny("qwen3"), batch()
    step = torch.compile(model, backend="eager")
    plain = step(tokens).logits
    for pattern in ("sliding(window=4)", "sliding(window=9)"):
        swap(model, pattern)
        torch.testing.assert_close(step(tokens).logits, model(tokens).logits)
    restore(model)
    torch.testing.assert_close(step(tokens).logits, plain)


FRESH = """
import sys, torch
torch.set_grad_enabled(False)
model, expected = torch.load(sys.argv[1], weights_only=False)
tokens = torch.arange(1, 21)[None]
assert torch.equal(model(tokens).logits, expected), "other logits"
assert model.generate(tokens, max_new_tokens=2).shape == (1, 22)
import effattn
effattn.restore(model)(tokens)
"""


@torch.no_grad()
def test_unpickled_in_a_process_that_never_swapped(tmp_path):
    model = swap(tiny("llama"), "sliding(window=5, sinks=1)", cache="int8")
    torch.save((model, model(torch.arange(1, 21)[None]).logits), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_a_model_built_from_a_swapped_models_config():
    model, tokens = swap(tiny("llama"), "sliding(window=5)"), batch()
    twin = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    with pytest.raises(
        Unsupported, match=r"config of another model that was swapped.*set_attn_implementation"
    ):
        twin(tokens)
    swapped = swap(twin, "dense")(tokens).logits
    torch.testing.assert_close(restore(twin)(tokens).logits, swapped)
    assert twin.config._attn_implementation == "sdpa"


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def bert():
    config = transformers.BertConfig(
        **SMALL, intermediate_size=64, attention_probs_dropout_prob=0.25
    )
    return transformers.BertModel(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=64, n_layers=1, n_heads=4
    )
    return transformers.DistilBertModel(config)


DROPPING = {
    "llama": lambda: tiny("llama", attention_dropout=0.25),
    "opt": lambda: tiny("opt", attention_dropout=0.25),
    "gpt_neox": lambda: tiny("gpt_neox", attention_dropout=0.25),
    "bert": bert,
    "distilbert": distilbert,
}


@pytest.mark.parametrize("kind", DROPPING)
def test_attention_drops_weights_while_training_alone(kind):
    model, tokens = swap(DROPPING[kind](), "dense"), batch()
    plain = model.eval()(tokens)[0]
    for module in model.modules():  # other dropout, of hidden states
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.25 if "attention" in type(module).__name__.lower() else module.p
    model.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(tokens)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], plain)
    assert torch.equal(model.eval()(tokens)[0], plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_drops_the_same_weights(use_reentrant):
    tokens, found = batch(), []
    for checkpointing in (False, True):
        model = swap(tiny("llama", attention_dropout=0.25), "sliding(window=9)").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_dropout_has_the_mean_of_transformers_own():
    """Means over draws of ours and of eager attention, which drops weights in the same way."""
    tokens, means = batch(1, 12).expand(64, -1), []
    model = tiny("llama", attention_dropout=0.5, num_hidden_layers=1)
    for own in (False, True):
        if own:
            swap(model, "dense")
        else:
            model.set_attn_implementation("eager")
        torch.manual_seed(0)
        with torch.no_grad():
            outs = torch.cat([model.train()(tokens).logits for _ in range(8)])
        means.append((outs.mean(dim=0), outs.var(dim=0) / len(outs)))
    (one, spread), (other, more) = means
    assert ((one - other).abs() < 6 * (spread + more).sqrt() + 1e-6).all()
    assert 0.7 < more.mean() / spread.mean() < 1.4


@pytest.mark.parametrize(
    "pattern", ["linear", "performer(features=16)", "topk(window=4, blocks=1)"]
)
def test_approximate_patterns_refuse_attention_dropout(pattern):
    model = swap(tiny("llama", attention_dropout=0.25), pattern).train()
    with pytest.raises(
        Unsupported, match=r"attention dropout 0\.25 .*has no weights of pairs to drop"
    ):
        model(batch())
    model.eval()(batch())


@pytest.mark.parametrize("kind", DROPPING)
def test_the_advice_on_dropout_works(kind):
    model, tokens = swap(DROPPING[kind](), "linear").train(), batch()
    with pytest.raises(Unsupported, match="attention dropout") as refusal:
        model(tokens)
    place, _, names = (
        str(refusal.value).partition("while training; ")[2].partition(" = 0.0 on every ")
    )
    *path, name = place.split(".")
    for module in model.modules():
        if type(module).__name__ == names.split()[0]:
            setattr(module.get_submodule(".".join(path)), name, 0.0)
    model(tokens)


def test_pickles_of_a_part_keep_its_swap():
    model = swap(tiny("llama"), "sliding(window=5)")
    again = pickle.loads(pickle.dumps(model.model.layers[0]))
    assert again.self_attn._effattn.pattern == "sliding(window=5)"
    assert active(model) is not None


class Cutting:
    """Keeps every second key of a layer's cache after a prompt, as libraries that compress caches
    do.
    """

    def __init__(self, model):
        self.handles = [
            layer.self_attn.register_forward_hook(self.cut, with_kwargs=True)
            for layer in model.model.layers
        ]

    @staticmethod
    def cut(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] > 1:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]


@torch.no_grad()
def test_hooks_that_cut_a_cache():
    model, tokens = tiny("llama"), batch()
    Cutting(model)

    def step():
        cache = model(tokens).past_key_values
        places = torch.full((2, 1), tokens.shape[1])
        return model(tokens[:, :1], past_key_values=cache, position_ids=places).logits

    plain = step()
    torch.testing.assert_close(swap(model, "dense") and step(), plain)
    refused = r"layer 0 .* cannot be cut or replaced; .*'dense'.*effattn.restore"
    swap(model, "sliding(window=8)")
    with pytest.raises(Unsupported, match=refused):
        step()
    for axis in ({"cache": "int8"}, {"pattern": "linear"}):
        cache = new_cache(swap(restore(model), **axis))
        with pytest.raises(Unsupported, match=refused):
            cache.layers[0].values = torch.zeros(2, 8, 3, 8)


BEFORE = [{}, {"positions": "yarn(factor=2)"}, {"pattern": "block(block=8)", "positions": "alibi"}]


@torch.no_grad()
@pytest.mark.parametrize("before", BEFORE)
def test_a_swap_that_fails_late_leaves_positions_as_they_were(before, monkeypatch):
    model, tokens = tiny("llama"), batch()
    if before:
        swap(model, **before)
    plain, rope = model(tokens).logits, copy.deepcopy(model.config.rope_parameters)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("effattn.hf.hooks.GlobalProjections", fail)
    for positions in ("yarn(factor=4)", "rope"):
        with pytest.raises(MemoryError):
            swap(model, "longformer(window=5)", positions=positions)
        assert model.config.rope_parameters == rope
        assert torch.equal(model(tokens).logits, plain)
