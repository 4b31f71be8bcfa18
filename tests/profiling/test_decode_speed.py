"""Decoding speed: every timed step starts from the declared cache, rows are exact where they can
be.
"""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from effattn.errors import Unsupported
from effattn.profiling import decode
from effattn.profiling.decode import decode_speed
from effattn.profiling.environment import environment

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
)


def llama(kv_heads: int, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=kv_heads, max_position_embeddings=64, **more)
    )


def watch(model, name: str, calls: list) -> None:
    """Notes (name, lengths of all layers' caches, tokens) before every forward that gets a
    cache.
    """

    def note(_, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            lengths = {layer.get_seq_length() for layer in kwargs["past_key_values"].layers}
            calls.append((name, lengths, tuple(kwargs["input_ids"].shape)))

    model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_exact_and_steps_alternate_at_the_declared_length(batch):
    models, calls, progress = {"before": llama(4), "after": llama(2)}, [], []
    for name, model in models.items():
        watch(model, name, calls)
    rows = decode_speed(
        models,
        [5, 200],
        batch=batch,
        steps=4,
        repeats=2,
        progress=lambda done, of: progress.append((done, of)),
    )
    assert [(row["context"], row["model"]) for row in rows] == [
        (5, "before"),
        (5, "after"),
        (200, "before"),
        (200, "after"),
    ]
    for row in rows:
        kv_heads = {"before": 4, "after": 2}[row["model"]]
        # K and V, layers, head_dim, fp32
        assert row["kv_bytes"] == 2 * 3 * batch * kv_heads * row["context"] * 8 * 4
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["tokens_per_s"] == pytest.approx(1000 * batch / row["ms_p50"])
        assert row["batch"] == batch
        assert row["alternated"]
    each = 2 * (4 + 1)  # repeats x (steps + a warm-up)
    assert calls == [(n, {c}, (batch, 1)) for c in (5, 200) for _ in range(each) for n in models]
    assert progress == [(1, 2), (2, 2)]
    json.dumps(rows, allow_nan=False)


def test_a_dtype_halves_the_bytes_and_training_mode_comes_back():
    model = llama(2).to(torch.bfloat16).train()
    (row,) = decode_speed({"m": model}, [7], steps=1, repeats=1)
    assert row["kv_bytes"] == 2 * 3 * 2 * 7 * 8 * 2
    assert model.training
    assert not row["alternated"]


def test_a_sliding_window_model_keeps_its_window_at_every_step():
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16)
    model, calls = MistralForCausalLM(config), []
    watch(model, "m", calls)
    rows = decode_speed({"m": model}, [8, 100], steps=3, repeats=1)
    assert [row["kv_bytes"] for row in rows] == [2 * 3 * 2 * 8 * 4 * held for held in (8, 15)]
    assert calls == [("m", {c}, (1, 1)) for c in (8, 100) for _ in range(4)]


def test_the_step_sees_the_whole_cache():
    """The keys attention gets are the context plus the new token: the timed work is the declared
    one.
    """
    model, seen = llama(2), []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        seen.append(k.shape[-2])
        return original(q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        decode_speed({"m": model}, [50], steps=2, repeats=1)
    assert [length for length in seen if length > 1] == [51] * 3 * 3


def test_a_cache_that_does_not_fit_is_reported_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(decode, "available_bytes", lambda device: 1_000_000)
    rows = decode_speed(
        {"before": llama(4), "after": llama(1)},
        [10, 1500],
        steps=1,
        repeats=1,
    )
    fits = {(row["context"], row["model"]): row for row in rows}
    lost = fits.pop((1500, "before"))
    assert lost["kv_bytes"] == 2 * 3 * 4 * 1500 * 8 * 4
    assert lost["does_not_fit"] > lost["kv_bytes"]
    assert "ms_p50" not in lost
    assert all("ms_p50" in row and "does_not_fit" not in row for row in fits.values())


def test_caches_that_fit_only_one_at_a_time_are_timed_so(monkeypatch):
    one = 2 * 3 * 4 * 100 * 8 * 4
    monkeypatch.setattr(decode, "available_bytes", lambda device: int(3.2 * one))
    rows = decode_speed(
        {"a": llama(4), "b": llama(4)},
        [100],
        steps=1,
        repeats=1,
    )
    assert [row["alternated"] for row in rows] == [False, False]
    assert all(row["ms_p50"] > 0 for row in rows)


def test_bad_arguments_and_unknown_caches_are_refused():
    model = llama(2)
    for arguments in (
        {"contexts": []},
        {"contexts": [0]},
        {"contexts": [4], "steps": 0},
        {"contexts": [4], "batch": 0},
    ):
        with pytest.raises(ValueError, match="at least 1"):
            decode_speed({"m": model}, **arguments)
    with pytest.raises(ValueError, match="models"):
        decode_speed({}, [4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "PLAIN_LAYERS", ())
        with pytest.raises(Unsupported, match="DynamicLayer"):
            decode_speed({"m": model}, [4])


def test_environment_is_json_and_names_the_versions():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert {
        "device",
        "transformers",
        "triton",
        "python",
        "threads",
        "platform",
        "date",
        "effattn",
    } <= set(found)
