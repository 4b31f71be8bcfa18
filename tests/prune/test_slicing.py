"""What is masked and what is sliced compute the same, for every class that can; the rest is refused
by name.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM, GenerationConfig

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.sliced_config import reachable_heads, sliced_config
from effattn.prune.structural.slicing import slice_model

CLASSES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "cohere",
    "phi",
    "starcoder2",
]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MORE = {
    "gemma2": {"layer_types": SLIDING},
    "gemma3_text": {"layer_types": SLIDING},
    "opt": {"ffn_dim": 96},
    "cohere": {"use_qk_norm": True},
}


def model_of(kind: str, **overrides):
    return tiny(
        kind, dtype=torch.float32, **{"num_hidden_layers": 3, **MORE.get(kind, {}), **overrides}
    )


def picks(size: int, keep: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randperm(size, generator=generator)[:keep] for _ in range(count)]


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[:96].view(2, 48), use_cache=False).logits


class KeptNorm(torch.nn.Module):
    """A norm that takes its mean over the dimensions that stay, and leaves 0 in the others."""

    def __init__(self, norm, index):
        super().__init__()
        self.norm, self.index = copy.deepcopy(norm), index
        for name, parameter in norm.named_parameters(recurse=False):
            setattr(
                self.norm,
                name,
                torch.nn.Parameter(parameter.detach()[..., index]),
            )
        if hasattr(norm, "normalized_shape"):
            self.norm.normalized_shape = (len(index),)

    def forward(self, x):
        kept = self.norm(x[..., self.index])
        return torch.zeros_like(x, dtype=kept.dtype).index_copy(-1, self.index, kept)


def replace_module(model, old, new):
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


@torch.no_grad()
def mask(model, keep: Keep):
    """Zeros, in place, what `keep` lets go, without making anything smaller."""
    parts = hf.of(model)
    staying = (
        list(range(len(parts.layers))) if keep.layers is None else sorted(keep.layers.tolist())
    )
    own = []
    for layer in parts:
        if layer.index not in staying:
            layer.block.register_forward_hook(lambda _, args, output: args[0])
            continue
        if keep.heads is not None:
            groups = keep.heads[staying.index(layer.index)].sort().values
            share = layer.heads // layer.kv_heads
            queries = torch.tensor(
                [group * share + i for group in groups.tolist() for i in range(share)]
            )
            gone = [head for head in range(layer.heads) if head not in queries]
            layer.o.by_head[gone] = 0
            for norm, heads, size in (
                (layer.q_norm, queries, layer.heads),
                (layer.k_norm, groups, layer.kv_heads),
            ):
                if (
                    norm is not None
                    and norm.weight.numel() == size * layer.head_dim
                    and norm.weight.dim() == 1
                ):
                    new = KeptNorm(
                        norm, torch.arange(norm.weight.numel()).view(size, -1)[heads].flatten()
                    )
                    replace_module(model, norm, new)
                    own.append(new)
        if keep.ffn is not None:
            output = layer.feed_forward.output.weight
            gone = torch.ones(output.shape[1], dtype=torch.bool)
            gone[keep.ffn[staying.index(layer.index)]] = False
            output[:, gone] = 0
    if keep.hidden is not None:
        zero = torch.zeros(parts.embeddings.weight.shape[1])
        zero[keep.hidden] = 1
        hook = lambda _, args, output: output * zero  # noqa: E731
        for table in filter(None, (parts.embeddings, parts.positions)):
            table.register_forward_hook(hook)
        for layer in parts:
            for module in (layer.o.module, layer.feed_forward.output):
                module.register_forward_hook(hook)
            inside = [
                m
                for norm in (layer.q_norm, layer.k_norm, *own)
                if norm is not None
                for m in norm.modules()
            ]
            for norm in layer.norms:
                if not any(norm is m for m in inside):
                    replace_module(model, norm, KeptNorm(norm, keep.hidden.sort().values))
        replace_module(
            model, parts.final_norm, KeptNorm(parts.final_norm, keep.hidden.sort().values)
        )
    return model


def check(model, keep: Keep, tokens, folder):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = slice_model(model, keep)
    assert type(small) is type(model)
    expected = logits(small, tokens)
    assert torch.isfinite(expected).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(folder / "old")
    masked = mask(model, keep)
    torch.testing.assert_close(logits(masked, tokens), expected, rtol=0, atol=1e-5)
    assert (
        expected - logits(type(model).from_pretrained(folder / "old"), tokens)
    ).abs().max() > 1e-2
    small.save_pretrained(folder / "new")
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("old", "new")]
    assert sizes[1] < sizes[0]
    again, found = AutoModelForCausalLM.from_pretrained(folder / "new", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again, tokens), expected, rtol=0, atol=1e-6)
    cache = again(input_ids=tokens[None, :4], use_cache=True).past_key_values
    assert len(cache.layers) == len(hf.of(small).layers)
    return small, cache


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("kind", CLASSES)
def test_masked_is_sliced(kind, kv_heads, tokens, tmp_path):
    model = model_of(kind, num_key_value_heads=kv_heads)
    keep = Keep(
        heads=picks(kv_heads, 2, 2),
        ffn=picks(96, 60, 2),
        layers=torch.tensor([2, 0]),
    )
    small, cache = check(model, keep, tokens, tmp_path)
    layer = hf.of(small).layers[0]
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.feed_forward.size) == (
        16 // kv_heads,
        2,
        hf.of(model).head_dim,
        60,
    )
    assert all(one.keys.shape[1] == 2 for one in cache.layers)
    if getattr(model.config, "layer_types", None):
        assert small.config.layer_types == [
            model.config.layer_types[0],
            model.config.layer_types[2],
        ]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma3_text", "phi3", "olmo2", "phi"])
def test_hidden_dimensions(kind, tokens, tmp_path):
    keep = Keep(hidden=picks(64, 48, 1)[0], heads=picks(4, 3, 3))
    small, _ = check(model_of(kind, num_key_value_heads=4), keep, tokens, tmp_path)
    assert small.config.hidden_size == 48


@pytest.mark.parametrize("kind", ["gpt_neox", "opt"])
def test_classes_whose_heads_make_up_the_hidden_size(kind, tokens, tmp_path):
    check(
        model_of(kind),
        Keep(ffn=picks(96, 50, 2), layers=torch.tensor([0, 1])),
        tokens,
        tmp_path / "ffn",
    )
    keep = Keep(
        hidden=picks(64, 32, 1)[0],
        heads=picks(8, 4, 3),
        ffn=picks(96, 50, 3),
    )
    check(model_of(kind), keep, tokens, tmp_path / "hidden")
    with pytest.raises(
        Unsupported, match=r"4 heads of 8 with hidden size 64.*with 4 heads, hidden has to be 32"
    ):
        slice_model(model_of(kind), Keep(heads=picks(8, 4, 3)))
    assert reachable_heads(model_of(kind).config) == [8]


def test_norms_that_are_a_module_for_each_head(tokens, tmp_path):
    model = model_of("stablelm", qk_layernorm=True)
    with torch.no_grad():
        for norm in hf.of(model).layers[0].q_norm.norms:
            norm.weight.normal_()
    keep = Keep(hidden=torch.arange(32), heads=picks(8, 4, 3))
    small = slice_model(model, keep)
    order = keep.heads[0].sort().values
    found = torch.stack([norm.weight for norm in hf.of(small).layers[0].q_norm.norms])
    old = torch.stack([norm.weight for norm in hf.of(model).layers[0].q_norm.norms])
    assert torch.equal(found, old[order])


def test_sinks_and_experts(tokens):
    model = tiny(
        "gpt_oss", dtype=torch.float32, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    small = slice_model(model, Keep(heads=[torch.tensor([1, 6])] * 2))
    assert torch.equal(hf.of(small).layers[0].sinks, hf.of(model).layers[0].sinks[[1, 6]])
    with pytest.raises(Unsupported, match="gpt_oss has experts"):
        slice_model(model, Keep(ffn=picks(96, 50, 2)))


def test_tied_embeddings_dtype_mode_and_generation_settings_stay(tokens):
    model = tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=True).train()
    model.generation_config = GenerationConfig(max_new_tokens=7)
    small = slice_model(model, Keep(hidden=torch.arange(32)))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight.shape == (96, 32)
    assert small.training
    assert small.dtype == torch.bfloat16
    assert small.generation_config.max_new_tokens == 7
    same = slice_model(model, Keep())
    assert same.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(logits(same.eval(), tokens), logits(model.eval(), tokens))


def test_targets_that_a_class_cannot_hold_say_which_can():
    model = tiny("llama")  # LlamaConfig wants hidden_size to be a multiple of the number of heads
    with pytest.raises(Unsupported, match=r"hidden size \(64\).*heads can be 1, 2, 4, 8"):
        slice_model(model, Keep(heads=picks(8, 6, 2)))
    assert reachable_heads(model.config) == [1, 2, 4, 8]
    assert reachable_heads(tiny("mistral").config) == list(range(1, 9))
    assert reachable_heads(tiny("llama", num_key_value_heads=4).config) == [1, 2, 4]
    assert (
        sliced_config(model.config, Keep(heads=picks(8, 2, 2), hidden=torch.arange(48))).head_dim
        == 8
    )


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            Keep(heads=[torch.tensor([0])]),
            r"keep.heads: got 1 tensors, valid is one for each of 2 layers",
        ),
        (
            Keep(heads=[torch.tensor([0]), torch.tensor([0, 1])]),
            r"keep.heads: got 1, 2 by layer; a config holds one",
        ),
        (
            Keep(ffn=[torch.tensor([96])] * 2),
            r"keep.ffn\[0\]: indices run from 96 to 96, valid are 0 to 95",
        ),
        (
            Keep(layers=torch.tensor([], dtype=torch.int64)),
            r"keep.layers: got torch.int64 \(0,\), valid is",
        ),
        (Keep(hidden=torch.rand(3)), r"keep.hidden: got torch.float32 \(3,\)"),
        ({"heads": 3}, "keep: got dict, valid is"),
    ],
)
def test_bad_indices(keep, message):
    with pytest.raises(ValueError, match=message):
        slice_model(tiny("llama"), keep)


def test_models_that_are_not_plain_are_refused(tokens):
    with pytest.raises(Unsupported, match="is swapped: effattn"):
        slice_model(effattn.swap(tiny("llama"), "block(block=16)"), Keep())
    monarch = effattn.swap(tiny("llama"), projections="monarch(blocks=4)", calibration=tokens)
    with pytest.raises(Unsupported, match="structured projections"):
        slice_model(monarch, Keep())
