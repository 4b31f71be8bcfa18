"""kvpress' scores as a policy: what it would keep is kept, by kvpress itself where it is installed,
and by a stand-in of the same signature."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import tiny
from transformers import DynamicCache

import effattn
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.surgery.checkpoint import save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import restore, swap

IDS = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
TOKENS = 150  # no two of which are alike: keys of the same token have the same norm


@dataclass
class Stub:
    """Reads all that kvpress hands over."""

    compression_ratio: float = 0.5

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None
        assert module.rotary_emb is not None
        cos, _ = kwargs["position_embeddings"]
        q = module.q_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
        assert hidden_states.shape[1] == cos.shape[1] == keys.shape[2]
        return (q.mean(dim=(1, 2))[:, None, None] * keys * cos[:, None]).sum(-1) + values[..., 0]

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """As kvpress' ScorerPress does it."""
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        count = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        at = scores.topk(count, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
        return keys.gather(2, at), values.gather(2, at)


def press_of(name, ratio):
    if name == "Stub":
        return Stub(ratio)
    package = pytest.importorskip("kvpress")
    return getattr(package, name)(compression_ratio=ratio)


def model_of(**changes):
    return tiny("llama", dtype=torch.float32, num_key_value_heads=2, **changes)


def prompt(model):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, TOKENS, model.config.hidden_size, generator=draw)


def by_kvpress(model, press):
    """For each layer the keys that its press keeps of the prompt, by its own code."""
    found, rotary = [], model.model.rotary_emb

    def hook(module, args, kwargs, output):
        module.rotary_emb = rotary
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append(press.compress(module, hidden, layer.keys, layer.values, None, kwargs)[0])
        del module.rotary_emb

    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        for layer in model.model.layers
    ]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs_embeds=prompt(model), past_key_values=cache)
    for one in hooks:
        one.remove()
    return found, [layer.keys for layer in cache.layers]


def numbers(some, keys):
    """Which tokens of one head's keys (T, D) these are."""
    apart = torch.cdist(some.double(), keys.double())
    assert apart.amin(dim=1).max() < 1e-4
    return sorted(apart.argmin(dim=1).tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Stub", "KnormPress", "SnapKVPress", "ExpectedAttentionPress"])
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_the_tokens_that_kvpress_keeps(name, ratio):
    model = model_of()
    press = press_of(name, ratio)
    wanted, keys = by_kvpress(model, press)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    swap(model, cache=effattn.kvpress(press))
    cache = new_cache(model)
    model(inputs_embeds=prompt(model), past_key_values=cache)
    for layer, (want, all_keys) in zip(cache.layers, zip(wanted, keys), strict=True):  # noqa: B905
        kept, heads = layer.state.kept, want.shape[1]
        assert layer.state.newest.k.shape[2] == 0
        edges = kept.edges()
        for row in range(2):
            for head in range(heads):
                at = row * heads + head
                own = kept.k[edges[at] : edges[at + 1]]
                assert numbers(own, all_keys[row, head]) == numbers(
                    want[row, head], all_keys[row, head]
                )
    for key, module in restore(model).named_modules():  # nothing is left on the model's modules
        assert "rotary_emb" not in vars(module) or "rotary_emb" in before[key]
        assert not key.endswith("self_attn.rotary_emb")


OURS = {
    "KnormPress": "norm",
    "SnapKVPress": "snapkv",
    "ExpectedAttentionPress": "expected",
}


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_our_own_policies_are_the_same(name):
    """Of the same paper, in the first layer, whose inputs are the same to the bit."""
    press, kept = press_of(name, 0.5), []
    sinks = 4 if name == "ExpectedAttentionPress" else 0
    recent = 64 if name == "SnapKVPress" else 0
    for cache in (
        effattn.kvpress(press),
        f"evict(policy={OURS[name]!r}, keep=0.5, sinks={sinks}, recent={recent}, every=None)",
    ):
        model = swap(model_of(), cache=cache)
        held = new_cache(model)
        model(inputs_embeds=prompt(model), past_key_values=held)
        state = held.layers[0].state
        parts = state.kept.k.split(list(state.kept.lengths))
        newest = state.newest.k.flatten(0, 1)
        kept.append([torch.cat([a, b]) for a, b in zip(parts, newest, strict=True)])
    for one, other in zip(*kept, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def test_generate_and_what_is_refused(tmp_path):
    model = model_of()
    swap(model, cache={"0": effattn.kvpress(Stub(0.5), recent=4), "1": "int8(group=16)"})
    told = describe(model).layers[0]
    assert told["cache"] == "kvpress(Stub, compression_ratio=0.5)"
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = model.generate(IDS, **how)
    assert tokens.shape == (2, 98)
    assert torch.equal(model.generate(IDS, num_beams=2, **how)[:, :90], IDS)
    ahead = model.generate(IDS[:1], prompt_lookup_num_tokens=3, **how)
    assert ahead.shape == (1, 98)
    with pytest.raises(Unsupported, match=r"save: layer 0: cache kvpress.*made of an object"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    for bad in (dict(attention_mask=mask), dict(prefill_chunk_size=40)):
        with pytest.raises(Unsupported, match="kvpress: presses score prompts in one piece"):
            model.generate(IDS, **how, **bad)


def test_a_ratio_of_numpy():
    made = effattn.kvpress(Stub(np.float64(0.25)))
    assert (made.keep, type(made.keep)) == (0.75, float)
    assert made.spec == "kvpress(Stub, compression_ratio=0.25)"


def test_it_is_not_imported():
    import sys

    importlib.import_module("effattn.hf.presses")
    assert "kvpress" not in sys.modules or pytest.importorskip("kvpress")


@pytest.mark.parametrize(
    ("press", "said"),
    [
        ("SnapKVPress", "press: got str, valid is a ScorerPress"),
        (Stub, "press: got Stub, valid is a ScorerPress"),
        (Stub(0.0), r"compression_ratio of Stub: got 0\.0, valid is a share above 0 and below 1"),
        (Stub(None), "compression_ratio of Stub: got None"),
        (Stub(float("nan")), "compression_ratio of Stub: got nan"),
    ],
)
def test_bad_presses(press, said):
    with pytest.raises(ValueError, match=said):
        effattn.kvpress(press)
