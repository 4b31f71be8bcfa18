"""The backend `gated`: what its gates do, inside of models, and bad input.

The properties that every backend has are in test_conformance.py, where gates say what they begin
with; here they have learned. The kernel's are in test_gated_kernel.py."""

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import check, inputs
from effattn.errors import Unsupported

SPECS = (
    "gated",
    "gated(gate='feature', feature_map='exp', features=12)",
    "gated(delta=True)",
    "gated(delta=True, gate='feature')",
    "gated(delta=True, gate=None)",
)


NAMES = ("gate_weight", "gate_bias", "write_weight", "write_bias")


def learned(attn, q, k, v):
    """`attn` with gates of all strengths."""
    attn(q, k, v)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            if name.startswith(("gate", "write")):
                parameter.copy_(
                    2 * torch.randn(parameter.shape, generator=draw),
                )
    return attn


@pytest.mark.parametrize(
    "spec",
    [
        *SPECS[:1],
        SPECS[3],
        *(pytest.param(x, marks=pytest.mark.slow) for x in (SPECS[1], SPECS[2], SPECS[4])),
    ],
)
def test_learned_gates_have_every_property(spec):
    attn = effattn.backend(
        spec,
        impl="torch",
    )
    learned(
        attn,
        *inputs(5),
    )
    some = ("accuracy", "future", "padding", "decode", "gradients", "state_moves", "documents")
    check(
        attn,
        properties=some,
        lengths=(1, 35),
    )


def test_gates_that_have_not_learned_are_a_decay():
    q, k, v = inputs(
        70,
        torch.float64,
    )
    for options in ({}, {"normalize": False}, {"feature_map": "elu"}):
        options = {"feature_map": "hedgehog", "decay": [0.9, 0.5]} | options
        expected = effattn.backend("linear", **options)(q, k, v)
        for gate in ("head", "feature"):
            got = effattn.backend("gated", gate=gate, **options)(q, k, v)
            torch.testing.assert_close(
                got,
                expected,
                rtol=1e-6,
                atol=1e-7,
            )


def test_gates_tell_tokens_apart():
    """A token whose gate closes hides what was before it from what comes."""
    attn, (q, k, v) = effattn.backend("gated"), inputs(12, torch.float64)
    attn(q, k, v)
    with torch.no_grad():
        attn.gate_weight[:, 0, 0] = 1e3
        attn.gate_bias.fill_(-1e3)
    v[..., 0] = 0
    kept = attn(q, k, v)[:, :, 6:]
    v[:, :, 5, 0] = 2
    forgot = attn(
        q,
        k,
        v,
    )
    alone = attn(
        q[:, :, 6:],
        k[:, :, 5:],
        v[:, :, 5:],
    )
    assert (kept - forgot[:, :, 6:])[..., 1:].abs().max() > 0.1
    # e^-5 of five old keys beside the new ones
    assert (alone - forgot[:, :, 6:])[..., 1:].abs().max() < 0.05


def test_the_delta_rule_recalls_what_was_written():
    """Keys at right angles, written wholly: each gives its own value back, bit by bit further."""
    attn = effattn.backend(
        "gated",
        feature_map="identity",
        delta=True,
        gate=None,
    )
    k, v = torch.eye(16)[None, None], torch.randn(1, 1, 16, 8)
    attn(k, k, v)
    with torch.no_grad():
        attn.write_bias.fill_(40.0)
    torch.testing.assert_close(
        attn(3 * k, 5 * k, v),
        v,
    )


@pytest.mark.parametrize("spec", [*SPECS[2:3], pytest.param(SPECS[0], marks=pytest.mark.slow)])
def test_generation_in_a_model(spec, tokens):
    """Greedy, beams and left padding with a cache give what the whole sequence gives."""
    model = effattn.swap(
        tiny("llama"),
        spec,
    )
    prompt = tokens[:42].clamp(min=1).view(1, 42)
    options = dict(
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    cached = model.generate(
        prompt,
        **options,
    )
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    beams = model.generate(
        prompt,
        **options,
        num_beams=2,
    )
    assert torch.equal(beams, model.generate(prompt, **options, num_beams=2, use_cache=False))
    padded = torch.cat(
        [torch.zeros(1, 9, dtype=torch.long), prompt],
        dim=1,
    )
    mask = (torch.arange(51) >= 9).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 9:], cached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_and_training(dtype, tokens, tmp_path):
    """Gradients reach the gates, and what they learned comes back bit for bit."""
    model = effattn.swap(
        tiny("llama", dtype=dtype),
        {"0": "gated(delta=True)"},
    )
    model.train()(tokens[None, :60], labels=tokens[None, :60]).loss.backward()
    gates = {n: p for n, p in model.named_parameters() if n.split(".")[-1] in NAMES}
    assert len(gates) == 4
    assert all(p.grad.abs().sum() > 0 for p in gates.values())
    with torch.no_grad():
        for parameter in gates.values():
            parameter.normal_()
    effattn.save(
        model.eval(),
        tmp_path / "out",
    )
    again = effattn.load(tmp_path / "out")
    assert torch.equal(again(tokens[None, :30]).logits, model(tokens[None, :30]).logits)


def test_twice_the_heads_are_the_same():
    q, k, v = inputs(20)
    attn = learned(
        effattn.backend("gated", delta=True),
        q,
        k,
        v,
    )
    wide = attn.repeated(2)
    twice = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(
        wide(q, *twice),
        attn(q, k, v),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "heads"}, "gated: gate: .*did you mean 'head'"),
        ({"gate": None}, "gated: gate: got None, valid without delta=True are"),
        ({"delta": 1}, "gated: delta: got 1, valid are True and False"),
        ({"delta": True, "normalize": True}, "gated: normalize: got True"),
        ({"decay": None}, "gated: decay: got None"),
        ({"decay": 1.5}, "gated: decay: got 1.5"),
        ({"decay": 0}, "gated: decay: got 0, valid are 'retnet', a number"),
        ({"feature_map": "identity"}, "gated: feature_map='identity' has weights of either sign"),
        ({"feature_map": "elu", "features": 3}, "gated: features: only a learned map"),
        ({"feature_map": "hedgehg"}, "gated: feature_map: .*did you mean 'hedgehog'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend("gated", **options)


def test_bad_calls():
    q, k, v = inputs(6)
    with pytest.raises(Unsupported, match="causal=False"):
        effattn.backend("gated")(q, k, v, causal=False)
    with pytest.raises(ValueError, match="decay: got 3 values, k has 2"):
        effattn.backend("gated", decay=[0.9, 0.8, 0.7])(q, k, v)
    attn = effattn.backend("gated")
    attn(q, k, v)
    with pytest.raises(ValueError, match="v: gate_weight has learned"):
        attn(
            q,
            k,
            v[..., :8],
        )
