"""Where norms and clips stand between projections and attention: what is merged is what attention
gets.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from effattn.calibration.attended import attended, is_linear
from effattn.errors import Unsupported
from effattn.heads.gqa import convert_gqa
from effattn.heads.judged import errors
from effattn.hf import anatomy as hf
from effattn.quant.rotation import fold_values

# GPTBigCode holds all heads, or one: tests/surgery/test_rehost.py
KINDS = [
    (kind, {})
    for kind, family in sorted(hf.FAMILIES.items())
    if not family.gqa and family.fused != "multi_query"
]
BETWEEN = [
    ("qwen3", {}),
    ("olmo2", {}),
    ("gemma3_text", {}),
    ("exaone4", {}),
    ("stablelm", {"qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("phi", {"qk_layernorm": True}),
    ("olmo", {"clip_qkv": 0.7}),
    ("olmoe", {"clip_qkv": 0.7}),
]


def model_of(kind: str, extra: dict):
    """A tiny model with gains that differ from dimension to dimension. Experts do not run in
    fp64.
    """
    dtype = torch.float64 if hf.FAMILIES[kind].ffn_in else torch.float32
    model = tiny(kind, dtype=dtype, **extra)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.add_(0.3 * noise)
    return model


@torch.no_grad()
def seen_by_attention(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The first attention module's inputs (N, D), and q, k, v as attention gets them without RoPE:
    (N, heads, d).
    """
    found, inputs = {}, []
    own = model.config._attn_implementation

    def note(module, q, k, v, mask, **more):
        if module.layer_idx == 0:
            found.update(
                {
                    name: x[0].transpose(0, 1).clone()
                    for name, x in zip("qkv", (q, k, v), strict=True)
                }
            )
        return torch.zeros_like(q).transpose(1, 2), None

    def no_rope(module, args, kwargs):
        if kwargs.get("position_embeddings") is None:
            return None
        cos, sin = kwargs["position_embeddings"]
        return args, {
            **kwargs,
            "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin)),
        }

    AttentionInterface.register("note", note)
    AttentionMaskInterface.register("note", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("note")
    layer = hf.of(model).layers[0]
    handles = [
        layer.k.module.register_forward_hook(lambda _, args, __: inputs.append(args[0][0])),
        layer.attention.register_forward_pre_hook(no_rope, with_kwargs=True),
    ]
    model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(own)
    return inputs[0], found


@pytest.mark.parametrize(("kind", "extra"), [*KINDS, *(case for case in BETWEEN if case[1])])
def test_attended_is_what_attention_gets(kind, extra, tokens):
    model = model_of(kind, extra)
    x, seen = seen_by_attention(model, tokens[:40])
    layer = hf.of(model).layers[0]
    for name, states in seen.items():
        torch.testing.assert_close(attended(layer, name, x), states, rtol=1e-5, atol=1e-5)
    raw = layer.k.with_bias @ torch.cat([x, x.new_ones(len(x), 1)], dim=1).double().T
    unchanged = torch.allclose(raw.permute(2, 0, 1), seen["k"].double(), rtol=1e-4, atol=1e-4)
    assert is_linear(layer) == unchanged


@pytest.mark.parametrize("method", ["optimal", "mean"])
@pytest.mark.parametrize(("kind", "extra"), BETWEEN)
def test_reported_errors_are_those_of_what_attention_gets(kind, extra, method, tokens):
    tokens = tokens[:1024]
    model = model_of(kind, extra)
    _, old = seen_by_attention(model, tokens)
    outputs = hf.of(model).layers[0].o.by_head.clone()
    report = convert_gqa(model, 2, tokens, method=method, refit=False, length=1024 // 8, batch=1)
    _, new = seen_by_attention(model, tokens)
    found = errors_by_hand(old, new, outputs, hf.of(model).layers[0].o.by_head)
    row = report.layers[0]
    made = report.data["model"]["key_method"].split(", ")
    named = (
        {"aligned", "mean"}
        if hf.of(model).layers[0].k_norm is not None
        else {"optimal", "aligned", "mean"}
    )
    assert set(made) <= (named if method == "optimal" else {"mean"})
    # windows of 128 see other contexts
    assert [row["k_error"], row["v_error"]] == pytest.approx(found, rel=0.1)
    assert 1e-3 < found[0] < 2
    assert 1e-3 < found[1] < 2


def errors_by_hand(old, new, outputs, new_outputs):
    """Scores of all pairs of tokens, and outputs of all tokens, query head by query head."""
    heads = old["q"].shape[1]
    lost, whole = [0.0, 0.0], [0.0, 0.0]
    for head in range(heads):
        mine = {
            "q": head,
            "k": head * old["k"].shape[1] // heads,
            "v": head * old["v"].shape[1] // heads,
        }
        theirs = {
            "q": head,
            "k": head * new["k"].shape[1] // heads,
            "v": head * new["v"].shape[1] // heads,
        }
        q, k, v = (old[name][:, mine[name]].double() for name in "qkv")
        q2, k2, v2 = (new[name][:, theirs[name]].double() for name in "qkv")
        pairs = (
            (q @ k.T, q2 @ k2.T),
            (v @ outputs[head].double().T, v2 @ new_outputs[head].double().T),
        )
        for number, (before, after) in enumerate(pairs):
            lost[number] += float((before - after).square().sum())
            whole[number] += float(before.square().sum())
    return [a / b for a, b in zip(lost, whole, strict=True)]


@pytest.mark.parametrize(
    ("kind", "extra", "method", "grouping"),
    [
        *((*case, method, "contiguous") for case in BETWEEN for method in ("optimal", "aligned")),
        *((*case, "first", "similarity") for case in BETWEEN),
        *(
            (kind, extra, "optimal", "contiguous")
            for kind, extra in KINDS
            if (kind, extra) not in BETWEEN
        ),
    ],
)
def test_equal_heads_are_merged_without_loss(kind, extra, method, grouping, tokens):
    model = model_of(kind, extra)
    with torch.no_grad():
        for layer in hf.of(model):
            for part in (layer.k, layer.v):
                for rows in (part.by_head, part.bias_by_head):
                    if rows is not None:
                        rows.copy_(rows[::2].repeat_interleave(2, 0).clone())
            if layer.k_norm is not None:
                share_gains(layer.k_norm, layer.kv_heads)
    ids = tokens[None, :64]
    with torch.no_grad():
        before = model(ids).logits
        report = convert_gqa(
            model, 4, tokens, method=method, grouping=grouping, refit=False, length=64
        )
        after = model(ids).logits
    assert float((after - before).norm() / before.norm()) < 1e-5
    for row in report.layers:
        assert row["k_error"] < 1e-9
        assert row["v_error"] < 1e-9


def share_gains(norm, heads: int) -> None:
    """The same gains for both heads of a pair, where each has its own."""
    if hasattr(norm, "norms"):
        for even, odd in zip(norm.norms[::2], norm.norms[1::2], strict=True):
            odd.load_state_dict(even.state_dict())
        return
    for gain in norm.parameters():
        if gain.numel() > 8:  # the head size: shared by all heads
            rows = gain.detach().view(heads, -1)
            rows.copy_(rows[::2].repeat_interleave(2, 0).clone())


def test_turned_heads_behind_gains_are_no_equal_heads(tokens):
    """A turn commutes with an RMS norm without gains only: the report says what is lost, and no
    less than is.
    """
    model = model_of("qwen3", {})
    layer = hf.of(model).layers[0]
    with torch.no_grad():
        for part in (layer.k, layer.q):
            half = part.by_head[1::2].clone()
            part.by_head[1::2] = torch.cat([half[:, 4:], -half[:, :4]], dim=1)
    report = convert_gqa(model, 4, tokens, method="aligned", refit=False, length=64)
    assert report.layers[0]["k_error"] > 1e-3


def test_a_clip_that_never_binds_costs_nothing(tokens):
    found = [
        convert_gqa(tiny("olmo", clip_qkv=clip), 2, tokens, refit=False, length=64).layers[0]
        for clip in (None, 1e3)
    ]
    for error in ("k_error", "v_error"):
        assert found[1][error] == pytest.approx(found[0][error], rel=1e-6)


def test_a_model_is_no_error_of_itself(tokens):
    layer = hf.of(model_of("olmoe", {"clip_qkv": 0.7})).layers[0]
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert errors(layer, layer, [[head] for head in range(8)], x) == pytest.approx(
        (0, 0), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["olmo", "olmoe"])
def test_a_clip_refuses_turned_values(kind):
    with pytest.raises(Unsupported, match="clip_qkv"):
        fold_values(tiny(kind, dtype=torch.float32, clip_qkv=0.7))
