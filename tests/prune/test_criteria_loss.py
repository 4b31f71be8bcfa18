"""Criteria that take gradients need a loss on next tokens; the others rank every model."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.prune import Target, shear, structured
from effattn.prune.structural import criteria

GRADIENTS = {"taylor", "michel"}
ENCODER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
)
DECODER = ENCODER | {"pad_token_id": 0}
MODELS = [
    ("BertForMaskedLM", transformers.BertConfig, ENCODER),
    ("BertForSequenceClassification", transformers.BertConfig, ENCODER),
    ("BertForTokenClassification", transformers.BertConfig, ENCODER),
    ("BertForQuestionAnswering", transformers.BertConfig, ENCODER),
    ("BertModel", transformers.BertConfig, ENCODER),
    # which sees later tokens, unless is_decoder is set
    ("BertLMHeadModel", transformers.BertConfig, ENCODER),
    ("RobertaForMaskedLM", transformers.RobertaConfig, ENCODER),
    ("LlamaForSequenceClassification", transformers.LlamaConfig, DECODER),
    ("LlamaForTokenClassification", transformers.LlamaConfig, DECODER),
]


def model_of(name: str, config, sizes: dict):
    torch.manual_seed(0)
    return getattr(transformers, name)(config(**sizes)).eval()


@pytest.mark.parametrize(("name", "config", "sizes"), MODELS)
@pytest.mark.parametrize("criterion", sorted(GRADIENTS))
def test_no_loss_is_refused_by_name(name, config, sizes, criterion, tokens):
    with pytest.raises(
        Unsupported,
        match=f"{criterion!r} needs the loss on next tokens, which {name} does not.*'obs'",
    ):
        structured(model_of(name, config, sizes), tokens, ffn=24, length=64, criterion=criterion)


@pytest.mark.parametrize(("name", "config", "sizes"), [MODELS[0], MODELS[1], MODELS[4], MODELS[7]])
@pytest.mark.parametrize("criterion", [name for name in criteria.CRITERIA if name not in GRADIENTS])
def test_the_others_need_none(name, config, sizes, criterion, tokens):
    target = {"layers": 1} if criterion == "block_influence" else {"ffn": 24}
    small, _ = structured(
        model_of(name, config, sizes), tokens[:512], **target, length=64, criterion=criterion
    )
    assert type(small).__name__ == name
    assert small.num_parameters() < model_of(name, config, sizes).num_parameters()


def test_decoders_have_one(tokens):
    model = model_of("BertLMHeadModel", transformers.BertConfig, ENCODER | {"is_decoder": True})
    for one in (model, tiny("llama", dtype=torch.float32)):
        small, _ = structured(one, tokens, ffn=24, length=64, criterion="taylor")
        assert type(small) is type(one)


@pytest.mark.parametrize(
    ("name", "config", "sizes"), [*MODELS, ("LlamaModel", transformers.LlamaConfig, DECODER)]
)
def test_perplexity_is_of_next_tokens(name, config, sizes, tokens):
    """A masked LM sees the token that it is asked for: what it would get is no perplexity."""
    with pytest.raises(Unsupported, match=f"got {name}, valid is a causal LM"):
        effattn.perplexity(model_of(name, config, sizes), tokens[:64], 32)


def test_decoders_have_a_perplexity(tokens):
    for model in (
        model_of("BertLMHeadModel", transformers.BertConfig, ENCODER | {"is_decoder": True}),
        tiny("gpt2"),
    ):
        assert 1 < effattn.perplexity(model, tokens[:64], 32) < 1e6


def test_shearing_learns_next_tokens(tokens):
    with pytest.raises(Unsupported, match="model: got BertForMaskedLM, valid is a causal LM"):
        shear(model_of(*MODELS[0]), Target(ffn=24), tokens, length=64)
