"""Re-hosting: another class, the same logits, and every method of heads after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported
from effattn.rehosting.base import HOSTS
from effattn.rehosting.rehosted import compared
from tests.conftest import tiny

ROPE = {"rope_type": "default", "rope_theta": 5000.0}
CASES = {
    "pythia": ("gpt_neox", {}),
    "neox, tied, no biases, half turned": (
        "gpt_neox",
        {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "neox, all turned": ("gpt_neox", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gptj, all turned": ("gptj", {"rotary_dim": 8, "n_inner": 96}),
    "gptj, a share that floats round down": ("gptj", {"rotary_dim": 6, "n_head": 8}),
    "opt": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96}),
    "opt, untied, without biases and gains": (
        "opt",
        {
            "word_embed_proj_dim": 64,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}


def model_of(case: str):
    """A tiny random model, its norms' gains far from one."""
    kind, options = CASES[case]
    model = tiny(kind, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 1:
                parameter.normal_(1, 0.3)
    return model


@pytest.fixture
def ids():
    return torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, ids, **given):
    return model(ids, use_cache=False, **given).logits


def test_every_host_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(HOSTS.members())


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits(case, ids, tmp_path):
    model = model_of(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model, ids)
    new = effattn.rehost(model)
    # GPT-J and Phi turn in fp32
    close = 1e-6 if CASES[case][0] == "gptj" else 1e-13
    torch.testing.assert_close(logits(new, ids), plain, rtol=0, atol=close)
    assert new.dtype == torch.float64
    assert not new.training
    assert new.config.tie_word_embeddings == model.config.tie_word_embeddings
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    ours, theirs = (logits(one, ids, **given)[0, 5:] for one in (new, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=close)
    # nothing of the old model is in the new one
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["pythia", "gptj", "opt", "gpt2"])
def test_a_plain_checkpoint_that_generates_the_same(case, ids, tmp_path):
    model = model_of(case).float()
    new = effattn.rehost(model)
    new.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again).__name__ == type(new).__name__
    kept = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(again.generate(ids, **kept), model.generate(ids, **kept))


@pytest.mark.parametrize("case", ["pythia", "gptj", "opt", "gpt2"])
def test_heads_are_converted_after_it(case, tmp_path):
    tokens = torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
    new = effattn.rehost(model_of(case))
    fewer = 2 if case in ("pythia", "gptj") else 1
    report = effattn.convert_gqa(new, fewer, tokens, length=64)
    assert report.data["model"]["kv_heads_after"] == fewer
    new.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    ids = tokens[None, :32]
    torch.testing.assert_close(logits(again, ids), logits(new, ids))
    with torch.no_grad():
        keys = again(ids, use_cache=True).past_key_values.layers[0].keys
    assert keys.shape[1] == fewer


def test_planted_heads_survive_mqa():
    """All heads have the same keys and values: one is enough."""
    tokens = torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
    model = tiny("opt", word_embed_proj_dim=64)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for tensor in part.parameters():
                    heads = tensor.view(8, 8, -1)
                    heads.copy_(heads[:1].expand_as(heads).clone())
    new = effattn.rehost(model)
    plain = logits(new, tokens[None, :40])
    effattn.convert_gqa(new, 1, tokens, length=64)
    torch.testing.assert_close(logits(new, tokens[None, :40]), plain, rtol=1e-6, atol=1e-6)


def test_half_precision_is_rounded_once():
    model = model_of("pythia")
    wide, half = effattn.rehost(model), effattn.rehost(model.to(torch.bfloat16))
    weight = wide.model.layers[0].self_attn.q_proj.weight
    stored = half.model.layers[0].self_attn.q_proj.weight.detach()
    assert stored.dtype == torch.bfloat16
    # once by the weights and gains, and once by their product
    assert float(((stored - weight) / weight).abs().max()) < 3 * 2**-8


def test_other_logits_are_an_error(ids):
    model = model_of("pythia")
    new = effattn.rehost(model)
    found = compared(model, new, ids.flatten(), 32)
    assert found["max_difference"] < 1e-12
    assert 0 <= found["kl"] < 1e-12
    with torch.no_grad():
        new.model.layers[1].mlp.fc2.bias[3] += 1
    with pytest.raises(RuntimeError, match="other logits"):
        compared(model, new, ids.flatten(), 32)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {}, r"LlamaForCausalLM \(llama\) has no other class; those that have: gpt2"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual=False"),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 64}, "norms come after"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32"),
        ("gpt2", {"add_cross_attention": True}, "half of a pair"),
    ],
)
def test_what_cannot_be_rehosted(kind, options, message):
    with pytest.raises(Unsupported, match=message):
        effattn.rehost(tiny(kind, **options))


def test_swapped_models_and_parts_are_refused():
    model = tiny("gpt_neox")
    with pytest.raises(Unsupported, match="valid is the causal LM, GPTNeoXForCausalLM"):
        effattn.rehost(model.gpt_neox)
    effattn.swap(model, "sliding", window=8)
    with pytest.raises(Unsupported, match="is swapped"):
        effattn.rehost(model)


def test_refusals_name_it():
    for kind, options in (("gpt_neox", {}), ("opt", {"word_embed_proj_dim": 64}), ("gpt2", {})):
        with pytest.raises(Unsupported, match=r"effattn\.rehost\(model\) is the same model as"):
            effattn.convert_gqa(tiny(kind, **options), 1)
    with pytest.raises(Unsupported, match=r"effattn\.rehost\(model\) is the same model as Phi"):
        effattn.swap(tiny("gptj", rotary_dim=4), "dense")


@pytest.mark.parametrize("case", ["pythia", "gptj"])
def test_latents_of_what_is_hosted(case, ids):
    """Of as many numbers as the hidden size has, nothing is lost; half of them decode as they
    prefill."""
    new = effattn.rehost(model_of(case))
    plain = logits(new, ids)
    tokens = torch.randint(1, 96, (1024,), generator=torch.Generator().manual_seed(6))
    effattn.swap(new, heads="latent(ratio=0.5, length=64)", calibration=tokens)
    torch.testing.assert_close(logits(new, ids), plain, rtol=0, atol=1e-6)
    half = effattn.rehost(model_of(case))
    effattn.swap(half, heads="latent(ratio=0.25, length=64)", calibration=tokens)
    found = logits(half, ids)
    assert not torch.allclose(found, plain, atol=1e-3)
    cache = effattn.new_cache(half)
    with torch.no_grad():
        pieces = [half(part, past_key_values=cache).logits for part in ids.split([30, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), found)


@pytest.mark.parametrize("case", ["opt", "gpt2"])
def test_latents_of_fused_hosts_are_refused_by_name(case, ids):
    new = effattn.rehost(model_of(case))
    plain = logits(new, ids)
    tokens = torch.randint(1, 96, (1024,), generator=torch.Generator().manual_seed(6))
    with pytest.raises(Unsupported, match=r"GPTBigCodeForCausalLM .* one module \(c_attn\), valid"):
        effattn.swap(new, heads="latent(ratio=0.25, length=64)", calibration=tokens)
    assert torch.equal(logits(new, ids), plain)
