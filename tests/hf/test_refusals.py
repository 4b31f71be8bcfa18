"""Models that cannot be swapped as they stand: each refusal says the true reason, and what it
advises works.
"""

import re
from operator import attrgetter
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from conftest import SMALL, tiny
from torch import nn

from effattn.errors import Unsupported
from effattn.surgery.swapping import active, restore, swap

TOKENS = torch.arange(1, 25)[None]
PATTERN = "sliding(window=4)"


def lora(model):
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )


WRAPPED = {
    "PEFT": (lora, lambda model: model.get_base_model(), r"model\.get_base_model\(\)"),
    "compiled": (torch.compile, attrgetter("_orig_mod"), r"model\._orig_mod; compile last$"),
    "DataParallel": (nn.DataParallel, attrgetter("module"), r"model\.module$"),
    "in a Sequential": (
        nn.Sequential,
        lambda model: model.get_submodule("0"),
        r"model\.get_submodule\('0'\)",
    ),
    "pipeline": (lambda model: SimpleNamespace(model=model), attrgetter("model"), r"its \.model$"),
}


@torch.no_grad()
@pytest.mark.parametrize("wrap", WRAPPED)
def test_the_model_inside_a_wrapper_is_named(wrap):
    make, inside, message = WRAPPED[wrap]
    wrapped = make(tiny("llama"))
    with pytest.raises(Unsupported, match=message):
        swap(wrapped, PATTERN)
    assert active(swap(inside(wrapped), PATTERN)) is not None
    if wrap in ("PEFT", "DataParallel"):
        expected = inside(wrapped)(TOKENS).logits
        assert torch.equal(wrapped(TOKENS).logits, expected)
        assert not torch.allclose(restore(inside(wrapped))(TOKENS).logits, expected)


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=vision
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


PARTS = {
    "llama without a head": (lambda: tiny("llama").model, "it has no output head"),
    "gpt_neox without a head": (lambda: tiny("gpt_neox").gpt_neox, "it has no output head"),
    "opt without a head": (lambda: tiny("opt").model, "it has no output head"),
    "LLaVA": (llava, "its language model is one part of it"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PARTS)
def test_a_model_that_is_no_causal_lm_can_be_put_into_one(name):
    make, reason = PARTS[name]
    model = make()
    plain = model(TOKENS, use_cache=False)[0]
    with pytest.raises(Unsupported, match=reason) as refusal:
        swap(model, PATTERN)
    attribute, path = re.search(r"lm\.(\w+) = model\.?(\S*);", str(refusal.value)).groups()
    lm = transformers.AutoModelForCausalLM.from_config(model.config.get_text_config())
    setattr(lm, attribute, model.get_submodule(path))
    swap(lm, PATTERN)
    assert not torch.allclose(model(TOKENS, use_cache=False)[0], plain)
    swap(lm, "dense")
    torch.testing.assert_close(model(TOKENS, use_cache=False)[0], plain, rtol=1e-4, atol=1e-4)
    restore(lm)
    assert torch.equal(model(TOKENS, use_cache=False)[0], plain)


def test_true_reasons():
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=32, add_cross_attention=True
        )
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
    )
    for model, reason in (
        (gpt2, "attends to an encoder"),
        (t5, "encoder-decoder"),
        (nn.Linear(2, 2), "valid is a transformers causal LM"),
        ("embedded", "effattn.load"),
        (
            tiny(
                "gemma3_text", use_bidirectional_attention=True, layer_types=["full_attention"] * 2
            ),
            "bidirectional",
        ),
    ):
        with pytest.raises(Unsupported, match=reason):
            swap(model, PATTERN)


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "bloom", "mpt", "codegen", "xglm", "falcon"])
def test_classes_that_compute_attention_by_themselves_really_do(kind):
    module = transformers.AutoModelForCausalLM._model_mapping[
        type(transformers.AutoConfig.for_model(kind))
    ].__module__
    assert not hasattr(__import__(module, fromlist=["x"]), "ALL_ATTENTION_FUNCTIONS")
