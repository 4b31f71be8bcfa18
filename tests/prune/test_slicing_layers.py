"""A layer stays what it is when others go, whatever its config says by its number."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

from effattn.hf import anatomy as hf
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CASES = {
    "dense_first": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "dense_middle": ("qwen3_moe", {"mlp_only_layers": [1, 2]}),
    "every_second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "both": ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "no_rope": ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}),
    "interval": ("smollm3", {"no_rope_layer_interval": 2}),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "types": ("cohere2", {"layer_types": SLIDING, "sliding_window": 8}),
    "pattern": ("exaone4", {"layer_types": None, "sliding_window": 8, "sliding_window_pattern": 3}),
    "two_ropes": ("gemma3_text", {"layer_types": SLIDING, "sliding_window": 8}),
    "sinks": (
        "gpt_oss",
        {"layer_types": SLIDING, "sliding_window": 8, "num_local_experts": 4, "head_dim": 8},
    ),
}


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[:96].view(2, 48), use_cache=False).logits


@pytest.mark.parametrize(
    "kept",
    [
        [0, 2],
        [1, 3],
        [2, 3],
        [3],
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_layers_that_stay_compute_what_they_did(case, kept, tokens, tmp_path):
    kind, settings = CASES[case]
    model = tiny(kind, dtype=torch.float32, **{"num_hidden_layers": 4, **settings})
    small = slice_model(model, Keep(layers=torch.tensor(kept)))
    for layer in hf.of(model):
        if layer.index not in kept:
            layer.block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(small, tokens), expected, rtol=0, atol=1e-5)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, tokens), expected, rtol=0, atol=1e-5)
