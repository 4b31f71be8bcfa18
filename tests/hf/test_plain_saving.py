"""What plain `save_pretrained` and a Trainer write of a swapped model: `effattn.load` restores it,
plain transformers refuses it, and after `restore` every byte is what it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import SMALL
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import effattn
from effattn.surgery import checkpoint

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}  # of 16 dimensions, which caches pack
IDS = torch.arange(3, 23).view(2, 10)

SWAPS = {
    "window": {"pattern": "sliding(window=4, sinks=1)"},
    "learned sinks": {"pattern": {"1": "sliding(window=4, sink_logits=True)"}},
    "global projections": {"pattern": "longformer(window=4, global_tokens=2)"},
    "tied across layers": {
        "pattern": "linformer_blockwise(k=8, max_length=32, block=8, share='across')"
    },
    "codebook": {"pattern": "vq(codes=8, block=4)"},
    "features": {"pattern": "performer(features=16)"},
    "learned features": {"pattern": "linear(feature_map='hedgehog')"},
    "positions": {"positions": "rerope(window=4)+logn"},
    "learned positions": {"positions": "kerple"},
    "dynamic": {"positions": "dynamic_ntk(factor=4)"},
    "cache": {"cache": "int4(group=16, residual=16)"},
    "all": {
        "pattern": {"0": "sliding(window=4)"},
        "positions": {"1": "alibi"},
        "cache": {"1": "int8(group=16)"},
    },
    "projections": {"projections": "monarch(blocks=8, rank=4)"},
    "low rank": {"projections": "lowrank(rank=8, method='svd')"},
    "projections and pattern": {
        "projections": {"1": "monarch(blocks=8, rank=4)"},
        "pattern": "sliding(window=4)",
    },
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **HEADS})).eval()


def swapped(name: str) -> LlamaForCausalLM:
    """Swapped, and what it learned moved away from where it began."""
    model = effattn.swap(llama(), **copy.deepcopy(SWAPS[name]))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "effattn" in key:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def refused_by_transformers(folder) -> None:
    with pytest.raises(ValueError, match="effattn"):
        AutoModelForCausalLM.from_pretrained(folder)(IDS)


SHARDED = ("learned sinks", "tied across layers", "projections and pattern")


@pytest.mark.parametrize(
    ("name", "size"), [*((name, "1GB") for name in SWAPS), *((name, "60KB") for name in SHARDED)]
)
def test_save_pretrained_is_restored_or_refused(name, size, tmp_path):
    model = swapped(name)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "60KB")
    loaded = effattn.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [layer for layer in effattn.describe(loaded).layers] == [
        layer for layer in effattn.describe(model).layers
    ]
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    refused_by_transformers(tmp_path)


@pytest.mark.parametrize("name", SWAPS)
def test_what_effattn_saves_does_not_change_by_the_mark(name, tmp_path):
    model = swapped(name)
    effattn.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "attn_implementation" not in config
    assert torch.equal(logits(effattn.load(tmp_path / "out")), logits(model))
    assert model.config.attn_implementation == "effattn"  # saving changes nothing


@pytest.mark.parametrize("name", [name for name in SWAPS if "projections" not in SWAPS[name]])
def test_after_restore_every_byte_is_what_it_was(name, tmp_path):
    llama().save_pretrained(tmp_path / "before")
    model = effattn.restore(swapped(name))
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes(), file.name
    assert "effattn" not in vars(model.config)


@pytest.mark.parametrize(
    "spec", [{"pattern": "dense"}, {"positions": "yarn(factor=4)"}, {"cache": "full"}], ids=str
)
def test_what_plain_transformers_can_say_stays_plain(spec, tmp_path):
    model = effattn.swap(llama(), **spec)
    model.save_pretrained(tmp_path)
    assert "effattn" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_a_later_swap_changes_what_is_said():
    model = effattn.swap(llama(), "sliding(window=4)")
    assert model.config.effattn == {"pattern": {"0": "sliding(window=4)", "1": "sliding(window=4)"}}
    effattn.swap(model, {"0": "dense"}, cache={"1": "int8(group=16)"})
    assert model.config.effattn == {
        "pattern": {"1": "sliding(window=4)"},
        "cache": {"1": "int8(group=16)"},
    }
    effattn.swap(model, "dense", cache="full")
    assert not hasattr(model.config, "effattn")
    assert not hasattr(model.config, "attn_implementation")


def test_a_config_alone_says_it(tmp_path):
    model = effattn.swap(llama(), "sliding(window=4)")
    copy.deepcopy(model).config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).effattn["pattern"]["0"] == "sliding(window=4)"


def test_a_packed_model(tmp_path):
    model = llama()
    effattn.prune.oneshot(
        model, torch.randint(0, 96, (256,)), method="magnitude", sparsity="2:4", length=32
    )
    effattn.prune.pack(model)
    model.save_pretrained(tmp_path)
    loaded = effattn.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.effattn["packed"] == model.config.effattn["packed"]
    refused_by_transformers(tmp_path)


def test_quantized_weights_and_what_was_learned(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = swapped("learned sinks")
    effattn.quant.quantize_weights(model, "int8")
    model.save_pretrained(tmp_path / "out")
    loaded = effattn.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    sinks = "model.layers.1.self_attn.effattn_pattern.sink_logits"
    assert torch.equal(loaded.state_dict()[sinks], model.state_dict()[sinks])


CLASSES = {
    "BertForSequenceClassification": "sliding(window=5)",
    "BertForMaskedLM": "longformer(window=5, global_tokens=1)",
    "LlamaForTokenClassification": "longformer(window=4, global_tokens=2)",
    "GPTNeoXForCausalLM": "sliding(window=4, sink_logits=True)",
    "MixtralForCausalLM": "sliding(window=4, sink_logits=True)",
}


@pytest.mark.parametrize("name", CLASSES)
def test_other_classes_too(name, tmp_path):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = effattn.swap(
        cls(cls.config_class(**{**SMALL, **HEADS, "num_local_experts": 2})).eval(), CLASSES[name]
    )
    model.save_pretrained(tmp_path)
    loaded = effattn.load(tmp_path)
    assert type(loaded) is cls
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="effattn"):
        cls.from_pretrained(tmp_path)(IDS)


def test_a_state_dict_without_what_was_learned_is_refused(tmp_path):
    model = swapped("learned sinks")
    own = {name: weight for name, weight in model.state_dict().items() if "effattn" not in name}
    model.save_pretrained(tmp_path, state_dict=own)
    with pytest.raises(
        ValueError, match=r"does not fit the swap in config.json, missing: .*sink_logits"
    ):
        effattn.load(tmp_path)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["effattn"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attn_implementation: got 'effattn'"):
        effattn.load(tmp_path)
    del config["attn_implementation"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected keys: .*sink_logits"):
        effattn.load(tmp_path)


def test_learned_weights_without_their_swap_are_refused(tmp_path):
    effattn.save(swapped("learned sinks"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    del config["effattn"], config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"effattn.safetensors does not fit the swap in config.json, unexpected: .*sink",
    ):
        effattn.load(tmp_path / "out")


def test_an_older_save_beside_a_newer_one_is_refused(tmp_path):
    model = swapped("learned sinks")
    effattn.save(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds what a swap added in effattn.safetensors and in model.safetensors"
    ):
        effattn.load(tmp_path / "out")


def test_learned_numbers_that_are_none_are_refused(tmp_path):
    model = swapped("learned sinks")
    with torch.no_grad():
        model.model.layers[1].self_attn.effattn_pattern.sink_logits[2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sink_logits holds NaN or Inf .1 of 4"):
        effattn.load(tmp_path)


def trainer(model, folder, steps: int) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 96, (64, 12))]
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=settings, train_dataset=rows)


@pytest.mark.parametrize("name", ["tied across layers", "projections"])
def test_a_trainer_writes_it_and_goes_on_from_it(name, tmp_path):
    torch.manual_seed(1)
    model = swapped(name)
    whole = trainer(model, tmp_path / "whole", 4)
    rows = whole.train_dataset
    whole.train()
    model.eval()
    loaded = effattn.load(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model))
    refused_by_transformers(tmp_path / "whole" / "checkpoint-4")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    other = swapped(name)
    again = trainer(other, tmp_path / "again", 4)
    again.train_dataset = rows
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    other.eval()
    assert torch.equal(logits(other), logits(model))
    started = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in started.values())
    checkpoint.save(loaded, tmp_path / "saved")
    assert torch.equal(logits(effattn.load(tmp_path / "saved")), logits(model))


def test_a_hub_name_is_as_good_as_a_folder(tmp_path):
    """In the layout of the hub's cache, read by a process without a network."""
    model = swapped("learned sinks")
    for name, write in (
        ("ours", effattn.save),
        ("plain", lambda model, folder: model.save_pretrained(folder)),
    ):
        repository = tmp_path / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("1" * 40)
        (repository / "snapshots").mkdir()
        write(model, repository / "snapshots" / ("1" * 40))
    code = """
import effattn
from safetensors.torch import save_file
for name in ("ours", "plain"):
    save_file(effattn.load(f"owner/{name}").state_dict(), f"{name}.safetensors")
"""
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=300
    )
    for name in ("ours", "plain"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
