"""Loading a checkpoint: the class that was saved, and every weight of it from the files, or one
line saying why not.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from conftest import SMALL
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

import effattn
from effattn.errors import Unsupported
from effattn.hf.weight_files import INDEX, SINGLE, stored
from effattn.recipes.cli import app
from effattn.surgery import checkpoint

IDS = torch.arange(3, 23).view(2, 10)


def new(name: str, **more) -> PreTrainedModel:
    """A tiny random model of a class of transformers."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    labels = 2 if name.endswith("QuestionAnswering") else 3
    return cls(cls.config_class(**{**SMALL, "num_labels": labels, **more})).eval()


def outputs(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)[0]


CLASSES = [
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "MistralModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertModel",
    "RobertaForSequenceClassification",
    "ElectraForPreTraining",
    "BertForNextSentencePrediction",
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_saved_class_comes_back_with_its_head(name, tmp_path):
    model = new(name)
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded), outputs(model))
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_multiple_choice_comes_back(tmp_path):
    model = new("BertForMultipleChoice")
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert torch.allclose(outputs(loaded, IDS[None]), outputs(model, IDS[None]))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_swapped_classifier_comes_back(name, tmp_path):
    model = effattn.swap(new(name), "sliding(window=4)")
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "LlamaModel", "BertForMaskedLM"]
)
def test_flows_of_causal_models_refuse_another_class_by_name(name, tmp_path):
    new(name).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=f"is a {name}, and no causal language model"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["LlamaForGoats"], "got 'LlamaForGoats', which transformers does not have"),
        (["BertForMaskedLM"], "no class for model_type 'llama'"),
        (["AutoModelForCausalLM"], "which transformers does not have"),
        ("LlamaForCausalLM", "valid is a list of names"),
        ([3], "valid is a list of names"),
    ],
)
def test_classes_that_cannot_be(classes, message, tmp_path):
    new("LlamaForCausalLM").save_pretrained(tmp_path)
    edit(tmp_path, architectures=classes)
    with pytest.raises(ValueError, match=message):
        effattn.load(tmp_path)


def test_without_a_class_the_weights_decide(tmp_path):
    new("LlamaForCausalLM").save_pretrained(tmp_path / "causal")
    new("LlamaForSequenceClassification").save_pretrained(tmp_path / "reward")
    edit(tmp_path / "causal", architectures=None)
    edit(tmp_path / "reward", architectures=None)
    assert type(effattn.load(tmp_path / "causal")).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match=r"missing keys: lm_head.weight"):
        effattn.load(tmp_path / "reward")


def edit(folder, **fields) -> None:
    """Changes entries of a config.json; None takes one out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def without(name):
    return lambda weights: weights.pop(name)


def reshaped(name):
    return lambda weights: weights.update({name: torch.ones(3, 5)})


def added(name):
    return lambda weights: weights.update({name: torch.ones(2)})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(UP), f"missing keys: {UP}$"),
        (without("model.norm.weight"), "missing keys: model.norm.weight$"),
        (without("model.embed_tokens.weight"), "missing keys: model.embed_tokens.weight"),
        (reshaped(UP), rf"mismatched keys: {UP} \(got \(3, 5\), expected \(96, 64\)\)$"),
        (added("score.weight"), "unexpected keys: score.weight$"),
        (
            added("model.layers.1.self_attn.q_proj.bias"),
            "unexpected keys: model.layers.1.self_attn.q_proj.bias$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, sharded, tmp_path):
    model = new("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        effattn.load(tmp_path)


def change_weights(folder, change) -> None:
    """Changes the tensors of a checkpoint, one file or shards."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    change(weights)
    if not (folder / INDEX).exists():
        save_file(weights, folder / SINGLE, {"format": "pt"})
        return
    names = sorted(weights)
    half = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in half.items():
        save_file({name: weights[name] for name in inside}, folder / file, {"format": "pt"})
    placed = {name: file for file, inside in half.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"missing keys: model.layers.2.input_layernorm.weight, .* and 3 more",
        ),
        ({"num_hidden_layers": 1}, r"unexpected keys: model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 900}, r"num_hidden_layers: got 900, the weights are"),
        ({"intermediate_size": 128}, r"mismatched keys: .*mlp.*got .*96.*expected .*128"),
        (
            {"vocab_size": 10**15},
            r"mismatched keys: lm_head.weight \(got \(96, 64\), expected \(1000000000000000, 64",
        ),
        ({"tie_word_embeddings": True}, None),
        ({"attention_bias": True}, r"missing keys: model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_that_asks_for_another_model(fields, message, tmp_path):
    new("LlamaForCausalLM").save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    if message is None:
        effattn.load(tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        effattn.load(tmp_path)


def test_what_transformers_leaves_out_on_purpose_is_no_fault(tmp_path):
    tied = new("LlamaForCausalLM", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    change_weights(tmp_path / "tied", added("model.layers.0.self_attn.rotary_emb.inv_freq"))
    assert "lm_head.weight" not in stored(tmp_path / "tied")
    assert torch.equal(outputs(effattn.load(tmp_path / "tied")), outputs(tied))
    bert = new("BertForMaskedLM")
    bert.save_pretrained(tmp_path / "bert")
    # as bert-base-uncased is published
    change_weights(tmp_path / "bert", added("cls.seq_relationship.bias"))
    assert torch.equal(outputs(effattn.load(tmp_path / "bert")), outputs(bert))
    change_weights(tmp_path / "bert", added("bert.encoder.layer.7.output.dense.bias"))
    with pytest.raises(ValueError, match=r"unexpected keys: bert.encoder.layer.7"):
        effattn.load(tmp_path / "bert")


def test_fused_weights_of_files_are_split_by_transformers(tmp_path):
    model = new("MixtralForCausalLM", num_local_experts=2, num_key_value_heads=4)
    loaded = effattn.load(effattn.save(model, tmp_path / "out"))
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_in_its_dtype(dtype, tmp_path):
    model = new("LlamaForCausalLM")
    model.config.dtype = torch.bfloat16  # another one than it has
    loaded = effattn.load(effattn.save(model.to(dtype), tmp_path / "out"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.config.dtype == dtype
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_generation_settings_and_the_chat_template_come_back(tmp_path):
    model, tokenizer = new("LlamaForCausalLM"), effattn.embedded.tokenizer()
    model.generation_config.repetition_penalty, model.generation_config.max_new_tokens = 1.25, 7
    tokenizer = transformers.AutoTokenizer.from_pretrained(effattn.embedded.directory())
    tokenizer.chat_template = "{{ messages[0].content }}!"
    loaded, again = checkpoint.load_model(effattn.save(model, tmp_path / "out", tokenizer))
    assert loaded.generation_config.repetition_penalty == 1.25
    assert loaded.generation_config.max_new_tokens == 7
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def folder_with_tokenizer(tmp_path):
    new("LlamaForCausalLM", vocab_size=3072).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(effattn.embedded.directory()).save_pretrained(
        tmp_path
    )
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe{}", "half"], ids=repr)
def test_a_broken_tokenizer_is_named(name, content, tmp_path):
    file = folder_with_tokenizer(tmp_path) / name
    file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content
    )
    with pytest.raises(ValueError, match=name) as caught:
        checkpoint.load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_empty_tokenizer_is_named(tmp_path):
    file = folder_with_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer.json cannot be read"):
        checkpoint.load_model(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer: .* has none"):
        checkpoint.load_model(tmp_path)


def test_a_truncated_weight_file_is_named(tmp_path):
    model = new("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    for file in (tmp_path / "one" / SINGLE, shard):
        whole = file.read_bytes()
        for part in (b"", whole[:5], whole[:200], whole[:-1], b"PK" + whole):
            file.write_bytes(part)
            with pytest.raises(
                ValueError, match=rf"weights: .*{file.name} cannot be read"
            ) as caught:
                effattn.load(file.parent)
            assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_by_name(tmp_path):
    new("LlamaForCausalLM").save_pretrained(tmp_path)
    weights = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(
        ValueError, match=r"has neither model.safetensors.index.json nor model.safetensors"
    ):
        effattn.load(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"has pytorch_model.bin and no model.safetensors: pickled weights"
    ):
        effattn.load(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map: got"),
        ({}, "weight_map: got"),
        ({"a": 3}, "valid is the name of a .safetensors file"),
        ({"a": "/etc/model.safetensors"}, "valid is the name of a .safetensors file"),
        ({"a": "../model.safetensors"}, "valid is the name of a .safetensors file"),
        ({"a": "pytorch_model.bin"}, "valid is the name of a .safetensors file"),
        ({"a": "gone.safetensors"}, "lacks gone.safetensors"),
        ({"a": "loop.safetensors"}, "lacks loop.safetensors"),
        ({"a": "folder.safetensors"}, "lacks folder.safetensors"),
        ({"a": "other.safetensors"}, "promises a, which its files do not have"),
        (
            {"b": "other.safetensors", "c": "twice.safetensors"},
            "b is both in other.safetensors and in twice",
        ),
    ],
    ids=str,
)
def test_an_index_points_to_files_beside_it(weight_map, message, tmp_path):
    folder = tmp_path / "model"
    new("LlamaForCausalLM").save_pretrained(folder)
    (folder / SINGLE).rename(tmp_path / SINGLE)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    save_file({"b": torch.ones(1)}, folder / "other.safetensors")
    save_file({"b": torch.ones(1), "c": torch.ones(1)}, folder / "twice.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        effattn.load(folder)
    assert os.path.exists(tmp_path / SINGLE)


def test_weights_that_are_quantized_while_they_are_read_are_checked_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    new("LlamaForSequenceClassification").save_pretrained(tmp_path / "reward")
    with pytest.raises(Unsupported, match="is a LlamaForSequenceClassification"):
        effattn.quant.load_weights(tmp_path / "reward")
    new("LlamaForCausalLM").save_pretrained(tmp_path / "cut")
    change_weights(tmp_path / "cut", without(UP))
    with pytest.raises(ValueError, match=f"missing keys: {UP}"):
        effattn.quant.load_weights(tmp_path / "cut")


@pytest.mark.parametrize("flow", ["convert-gqa", "oneshot", "measure"])
@pytest.mark.parametrize("kind", ["cut", "reward", "corrupt", "pickled", "no tokenizer"])
def test_commands_end_in_one_line_and_write_nothing(flow, kind, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    folder_with_tokenizer(folder)
    message = {
        "cut": UP,
        "reward": "LlamaForSequenceClassification",
        "corrupt": "model.safetensors cannot be read",
        "pickled": "pytorch_model.bin",
        "no tokenizer": "tokenizer: ",
    }[kind]
    if kind == "cut":
        change_weights(folder, without(UP))
    elif kind == "reward":
        new("LlamaForSequenceClassification", vocab_size=3072).save_pretrained(folder)
    elif kind == "corrupt":
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-9])
    elif kind == "pickled":
        torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
        (folder / SINGLE).unlink()
    else:
        (folder / "tokenizer.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    arguments = {
        "convert-gqa": ["convert-gqa", "--kv-heads", "4", "--output", tmp_path / "out"],
        "oneshot": ["prune", "oneshot", "--output", tmp_path / "out"],
        "measure": ["measure", "--contexts", "64", "--steps", "1"],
    }[flow]
    done = CliRunner().invoke(app, [*map(str, arguments), "--model", str(folder)])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
