"""A model's own windows, in every way its config can say them: `dense` is the plain model past
them, cached or not.
"""

import inspect

import pytest
import torch
import transformers
from conftest import EXTRA, tiny

from effattn.errors import Unsupported
from effattn.hf.anatomy import of
from effattn.hf.families import FAMILIES, sliding_window
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import restore, swap

FULL, SLIDING = "full_attention", "sliding_attention"
FIRST, LAST, ALL, NONE = [SLIDING, FULL], [FULL, SLIDING], [SLIDING] * 2, [FULL] * 2
USED = {"use_sliding_window": True, "sliding_window": 8}
CONFIGS = [  # (model type, settings, the layers that have a window)
    ("mistral", {"sliding_window": 8}, [0, 1]),
    ("mistral", {"sliding_window": None}, []),
    ("mistral", {"sliding_window": 8, "max_position_embeddings": 8}, [0, 1]),
    ("phi3", {"sliding_window": 8, "max_position_embeddings": 4}, [0, 1]),
    ("starcoder2", {"sliding_window": 8}, [0, 1]),
    ("mixtral", {"sliding_window": 8}, [0, 1]),
    ("qwen2", {**USED, "max_window_layers": 1}, [1]),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, []),
    ("qwen2", {**USED, "layer_types": FIRST}, [0]),
    ("qwen3", {**USED, "max_window_layers": 0}, [0, 1]),
    ("qwen2_moe", {**USED, "max_window_layers": 2}, [0]),
    ("qwen3_moe", USED, [0, 1]),
    ("gemma2", {"sliding_window": 8, "layer_types": ALL}, [0, 1]),
    ("gemma2", {"sliding_window": 8, "layer_types": FIRST, "max_position_embeddings": 8}, [0]),
    ("gemma3_text", {"sliding_window": 8, "layer_types": LAST}, [1]),
    ("gpt_oss", {"sliding_window": 8, "layer_types": FIRST}, [0]),
    ("olmo3", {"sliding_window": 8, "layer_types": NONE}, []),
    ("cohere2", {"sliding_window": 8, "layer_types": LAST}, [1]),
    ("exaone4", {"sliding_window": 8, "layer_types": FIRST}, [0]),
    ("smollm3", {**USED, "no_rope_layers": [1, 0]}, [1]),
    ("smollm3", {"use_sliding_window": False, "sliding_window": 8, "layer_types": FIRST}, [0]),
]
# transformers' sdpa has neither a softcap nor sinks, and eager's softmax is in fp32
EAGER = ("gemma2", "gpt_oss")
SINGLE = ("mixtral", "qwen2_moe", "qwen3_moe", *EAGER)  # experts run in fp32 or less


def model_of(kind, **settings):
    if "layer_types" in EXTRA.get(kind, {}):
        settings = {"layer_types": None, **settings}
    model = tiny(kind, dtype=torch.float32 if kind in SINGLE else torch.float64, **settings)
    if kind in EAGER:
        model.set_attn_implementation("eager")
    return model


def outputs(model):
    """Logits without a cache, with padding, and in chunks with a cache that goes past every
    window.
    """
    tokens = torch.randint(1, 96, (2, 26), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    whole = model(tokens, use_cache=False).logits
    padded = model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    first = model(tokens[:, :14], use_cache=True)
    chunks, cache = [first.logits], first.past_key_values
    for start, stop in ((14, 17), (17, 18), (18, 19), (19, 26)):
        chunks.append(model(tokens[:, start:stop], past_key_values=cache).logits)
    return whole, padded, torch.cat(chunks, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "settings", "windowed"), CONFIGS)
def test_dense_is_the_plain_model_past_its_windows(kind, settings, windowed):
    model = model_of(kind, **settings)
    layers = of(model).layers
    assert [layer.index for layer in layers if layer.own_window is not None] == windowed
    plain = outputs(model)
    error = 1e-4 if kind in SINGLE else 1e-9
    close = {"rtol": error, "atol": error}
    for swapped, expected in zip(outputs(swap(model, "dense")), plain, strict=True):
        torch.testing.assert_close(swapped, expected, **close)
    swap(restore(model), {"1": "dense"})  # beside a layer that keeps its own
    for swapped, expected in zip(outputs(model), plain, strict=True):
        torch.testing.assert_close(swapped, expected, **close)
    assert torch.equal(outputs(restore(model))[0], plain[0])


@torch.no_grad()
def test_saved_and_loaded_with_a_window_no_trained_sequence_exceeds(tmp_path):
    model = model_of("mistral", sliding_window=8, max_position_embeddings=8)
    plain = outputs(model)
    assert describe(swap(model, "dense")).layers[0]["pattern"] == "dense"
    save(model, tmp_path / "saved")
    for swapped, expected in zip(outputs(load(tmp_path / "saved")), plain, strict=True):
        torch.testing.assert_close(swapped, expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_table_of_windows_is_what_the_classes_do(kind):
    model = transformers.MODEL_MAPPING[type(transformers.AutoConfig.for_model(kind))]
    names = inspect.unwrap(model.forward).__code__.co_names
    own = (
        ""
        if "create_sliding_window_causal_mask" not in names
        else "layer_types"
        if "layer_types" in names
        else "all"
    )
    assert FAMILIES[kind].windows == own


def test_what_else_a_config_can_ask_for_is_refused():
    model = model_of("qwen3", **USED, layer_types=FIRST)
    model.config.layer_types = ["chunked_attention", FULL]
    with pytest.raises(Unsupported, match="layer 0: its own attention is 'chunked_attention'"):
        sliding_window(model.model.layers[0].self_attn, model.config)
    # transformers' cache obeys it, the model's mask does not
    ignored = model_of("llama", sliding_window=8)
    with pytest.raises(
        Unsupported, match=r"layers 0, 1: it has config.sliding_window=8.*sliding_window = None"
    ):
        swap(ignored, "dense")
    ignored.config.sliding_window = None
    swap(ignored, "dense")
