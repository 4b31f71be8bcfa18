"""Variants of the embedded model: what they are made of, and that pretraining makes, keeps and
resumes them."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import effattn
from effattn.embedded import corpus, making
from effattn.recipes import pretrain_embedded
from effattn.recipes.pretrain_embedded import Settings
from effattn.surgery.describing import describe

SMALL = dict(
    tokens=6 * 64,
    hidden=32,
    layers=3,
    vocabulary=300,
    length=32,
    batch=2,
    overrides={"disable_tqdm": True, "use_cpu": True, "bf16": False},
)


@pytest.fixture
def texts(monkeypatch):
    found = {
        "train": [("a.py", "import os\nprint(os.getcwd())\n" * 200)],
        "validation": [("b.py", "import sys\nprint(sys.path, [1, 2])\n" * 150)],
    }
    monkeypatch.setattr(corpus, "documents", found.__getitem__)


def test_windows_reach_three_quarters_of_the_training_length():
    assert making.window_of(4, 512) == 128
    for layers, length in ((4, 512), (3, 32), (2, 64), (6, 2048)):
        window = making.window_of(layers, length)
        reach = (window - 1) * (layers - 1) + 1
        assert reach <= 3 * length // 4 < reach + layers - 1
    assert making.axes_of("dense", 4, 512) == {}
    assert making.axes_of("hwfa", 4, 512, 64)["pattern"] == {"0-2": "sliding(window=64)"}


@pytest.mark.parametrize("variant", [pytest.param("logn", marks=pytest.mark.slow), "hwfa"])
def test_a_variant_is_trained_saved_and_loaded_as_what_it_is(texts, tmp_path, variant):
    card = pretrain_embedded.run(Settings(tmp_path / "out", variant=variant, **SMALL))
    assert card["variant"] == variant
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    losses = [one["loss"] for one in card["loss_curve"] if "loss" in one]
    assert losses[-1] < losses[0]
    model = effattn.load(tmp_path / "out")
    rows = [(row["pattern"], row["positions"]) for row in describe(model).layers]
    own = {"logn": "logn(trained=True)", "hwfa": "nope+logn(trained=True)"}[variant]
    assert rows[-1] == ("dense", own)
    if variant == "logn":
        assert rows == [("dense", own)] * 3
    else:
        assert {pattern for pattern, _ in rows[:-1]} == {"sliding(window=12)"}
        assert {rule for _, rule in rows[:-1]} & {own} == set()
    ids = torch.arange(60)[None]
    found = effattn.perplexity(model, ids[0].repeat(3), context=32)
    assert found > 0
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(variant\)"):
        pretrain_embedded.run(Settings(tmp_path / "out", **SMALL))
    assert {one.name for one in (tmp_path / "out").iterdir()} >= {"model.safetensors", "run"}


def test_the_last_layer_of_hwfa_scales_by_log_n_and_does_not_turn():
    """Its attention as the article writes it, on the layer's own queries and keys."""
    settings = Settings("unused", variant="hwfa", **SMALL)
    model = pretrain_embedded.model_of(settings, effattn.embedded.tokenizer()).double().eval()
    layer, seen = model.model.layers[-1].self_attn, {}
    layer.register_forward_hook(
        lambda module, args, given, out: seen.update(x=given["hidden_states"], y=out[0]),
        with_kwargs=True,
    )
    model(torch.arange(50)[None])
    q, k, v = (
        project(seen["x"]).view(1, 50, 8, 4).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q = (
        q
        * (
            torch.log(torch.arange(50.0, dtype=torch.float64) + 1)
            / torch.log(torch.tensor(32.0).double())
        )[:, None]
    )
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = layer.o_proj(expected.transpose(1, 2).reshape(1, 50, 32))
    torch.testing.assert_close(seen["y"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "hwaf"}, "did you mean 'hwfa'"),
        ({"variant": "hwfa", "layers": 1}, "layers: got 1, valid for hwfa is at least 2"),
        ({"variant": "logn", "window": 8}, "window: got 8 with variant 'logn'"),
    ],
)
def test_what_is_no_variant_is_refused_before_anything(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain_embedded.run(Settings(tmp_path / "out", **SMALL | change))
    assert list(tmp_path.iterdir()) == []
