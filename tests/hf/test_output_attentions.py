"""`output_attentions=True` after a swap: the weights of the pattern, from the reference."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

from effattn.errors import Unsupported
from effattn.hf import live
from effattn.surgery.swapping import swap

IDS = torch.randint(3, 96, (2, 14), generator=torch.Generator().manual_seed(0))


def eager(kind="llama"):
    model = tiny(kind)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_dense_weights_are_those_of_plain_transformers(kind):
    mask = torch.ones_like(IDS)
    mask[1, 10:] = 0  # on the right: with none to see, eager gives NaN
    given = dict(attention_mask=mask, output_attentions=True)
    plain, model = eager(kind), swap(tiny(kind), "dense")
    model.load_state_dict(plain.state_dict())
    want, got = plain(IDS, **given).attentions, model(IDS, **given).attentions
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        real = mask[:, None, :, None].bool()  # what padding sees is nobody's business
        shown = (torch.where(real, x, 0.0) for x in (ours, theirs))
        torch.testing.assert_close(*shown, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "pattern",
    ["sliding(window=4)", "sliding(window=4, sinks=2)", "longformer(window=3, global_tokens=2)"],
)
def test_weights_of_a_pattern_give_its_output(pattern):
    model, seen = swap(tiny("llama"), pattern), []
    module = model.model.layers[1].self_attn
    handle = module.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    values = []
    other = module.v_proj.register_forward_hook(lambda _, __, out: values.append(out))
    weights = model(IDS, output_attentions=True).attentions[1]
    handle.remove(), other.remove()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert not weights.triu(1).any()
    if "longformer" not in pattern:
        i = torch.arange(14)
        near = (i[:, None] - i < 4) | (i < (2 if "sinks" in pattern else 0))
        assert not weights[..., ~near].any()
        v = values[0].unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        out = weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
        torch.testing.assert_close(seen[0], out.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_documents_have_weights_of_their_own():
    model, lengths = swap(tiny("llama"), "sliding(window=4, sinks=1)"), (5, 1, 8)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(IDS[:1], position_ids=places, output_attentions=True).attentions
    parts = [model(ids, output_attentions=True).attentions for ids in IDS[:1].split(lengths, 1)]
    for layer, whole in enumerate(got):
        want = torch.stack(
            [
                torch.block_diag(*(part[layer][0, h] for part in parts))
                for h in range(whole.shape[1])
            ]
        )
        torch.testing.assert_close(whole[0], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_has_no_weights(monkeypatch):
    with pytest.raises(Unsupported, match=r"linear.* has no softmax weights; valid is an exact"):
        swap(tiny("llama"), "linear")(IDS, output_attentions=True)
    model = swap(tiny("llama"), "sliding(window=4)")
    cache = model(IDS).past_key_values
    with pytest.raises(Unsupported, match="the cache holds 14 tokens already"):
        model(IDS[:, :1], past_key_values=cache, output_attentions=True)
    monkeypatch.setattr(live, "MOST_WEIGHTS", 13)
    with pytest.raises(Unsupported, match="got 14 tokens; valid is at most 13"):
        model(IDS, output_attentions=True)
