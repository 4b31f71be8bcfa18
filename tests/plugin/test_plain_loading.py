"""`import effattn`, and then plain transformers loads whatever `effattn.save` wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import effattn
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

IDS = torch.arange(3, 23).view(
    2,
    10,
)
CALIBRATION = torch.randint(
    0,
    SMALL["vocab_size"],
    (4000,),
    generator=torch.manual_seed(1),
)

MADE = {
    "window": lambda model: effattn.swap(
        model,
        "sliding(window=4, sinks=1)",
    ),
    "learned": lambda model: effattn.swap(
        model,
        {"1": "sliding(window=4, sink_logits=True)"},
    ),
    "tied": lambda model: effattn.swap(
        model, "linformer_blockwise(k=8, max_length=32, block=8, share='across')"
    ),
    "positions": lambda model: effattn.swap(
        model,
        positions="rerope(window=4)+logn",
    ),
    "scaled": lambda model: effattn.swap(
        model,
        positions="dynamic_ntk(factor=4)",
    ),
    "cache": lambda model: effattn.swap(
        model,
        cache="int8(group=16)",
    ),
    "monarch": lambda model: effattn.swap(
        model,
        projections="monarch(blocks=8, rank=4)",
    ),
    "low rank": lambda model: effattn.swap(
        model, "sliding(window=4)", projections="lowrank(rank=8, method='svd')"
    ),
    "latent": lambda model: effattn.convert_latent(
        model,
        CALIBRATION,
        ratio=0.5,
    ),
    "2:4": lambda model: packed(
        model,
        "2:4",
        "2:4",
    ),
    "bitmask": lambda model: packed(
        model,
        0.7,
        "bitmask",
    ),
}


def packed(model, sparsity, kind) -> None:
    effattn.prune.oneshot(
        model,
        CALIBRATION,
        method="magnitude",
        sparsity=sparsity,
    )
    effattn.prune.pack(
        model,
        format=kind,
    )


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | settings)).eval()


def made(name: str, **settings) -> LlamaForCausalLM:
    """Swapped, and what it learned moved away from where it began."""
    model = llama(
        num_attention_heads=4,
        num_key_value_heads=4,
        **settings,
    )
    MADE[name](model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "effattn" in key:
                weight.add_(
                    torch.randn_like(weight),
                    alpha=0.2,
                )
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in MADE), ("window", True), ("monarch", True), ("2:4", True)],
)
def test_plain_loading_restores_what_was_saved(name, tied, tmp_path):
    model = made(name, tie_word_embeddings=tied)
    effattn.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(
        logits(loaded),
        logits(model),
    )
    assert effattn.describe(loaded).layers == effattn.describe(model).layers
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    # a swapped model like any other: nothing of the method stays on it
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    # and saved again it is the same, byte for byte
    effattn.save(loaded, tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        if file.name == "README.md":  # of which it says what it was made of
            continue
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    "name",
    ["learned", "scaled", "monarch", "bitmask"],
)
def test_dtype_and_device_map_are_honoured(name, tmp_path):
    effattn.save(
        made(name),
        tmp_path / "out",
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, device_map="auto"
    )
    ours = effattn.load(
        tmp_path / "out",
        dtype=torch.bfloat16,
    )
    found, expected = loaded.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(
            found[key],
            expected[key],
        )
        for key in expected
    )
    assert [one.dtype for one in found.values()] == [one.dtype for one in expected.values()]
    assert torch.equal(
        logits(loaded),
        logits(ours),
    )


def test_an_attention_of_ones_own_beside_the_swap(tmp_path):
    effattn.save(
        made("window"),
        tmp_path / "out",
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        attn_implementation="eager",
    )
    assert effattn.restore(loaded).config._attn_implementation == "eager"


def test_generation_of_the_restored_model(tmp_path):
    model = made("cache")
    effattn.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(IDS, **options),
        model.generate(IDS, **options),
    )


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """Such as were written before transformers was told of the method."""
    model = made("monarch")
    effattn.save(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    for load in (effattn.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(
            logits(load(tmp_path / "out")),
            logits(model),
        )


def test_what_is_plain_names_no_method(tmp_path):
    effattn.save(
        effattn.swap(llama(), positions="yarn(factor=4)"),
        tmp_path / "out",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"effattn", "quantization_config"} & config.keys()


def test_a_record_that_no_save_writes_is_refused(tmp_path):
    effattn.save(
        made("window"),
        tmp_path / "out",
    )
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["effattn"]["pattern"]["0"] = "slidin(window=4)"
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"effattn: pattern: 0: .*did you mean 'sliding'",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    del config["effattn"]
    file.write_text(json.dumps(config))
    for load in (effattn.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError,
            match="the entry 'effattn'",
        ):
            load(tmp_path / "out")


CODE = """
{first}
from transformers import AutoModelForCausalLM
{second}
import torch
from safetensors.torch import save_file
model = AutoModelForCausalLM.from_pretrained({folder!r})
save_file({{"logits": model(torch.arange(3, 23).view(2, 10)).logits.detach()}}, {out!r})
"""


def fresh(folder, out, first="", second="") -> subprocess.CompletedProcess:
    code = CODE.format(
        folder=str(folder),
        out=str(out),
        first=first,
        second=second,
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "where",
    ["first", "second"],
)
def test_the_import_may_come_before_or_after_that_of_transformers(where, tmp_path):
    from safetensors.torch import load_file

    model = made("monarch")
    effattn.save(model, tmp_path / "out")
    done = fresh(
        tmp_path / "out",
        tmp_path / "logits",
        **{where: "import effattn"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(
        load_file(tmp_path / "logits")["logits"],
        logits(model),
    )


def test_without_effattn_weights_that_are_not_plain_are_refused_by_name(tmp_path):
    effattn.save(
        made("monarch"),
        tmp_path / "out",
    )
    done = fresh(
        tmp_path / "out",
        tmp_path / "logits",
    )
    assert done.returncode != 0
    assert "model type `effattn`" in done.stderr


def test_without_effattn_plain_weights_load_as_the_model_before_the_swap(tmp_path):
    """With a warning that names the method."""
    from safetensors.torch import load_file

    model = made("window")
    effattn.save(model, tmp_path / "out")
    done = fresh(
        tmp_path / "out",
        tmp_path / "logits",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unknown quantization type, got effattn" in done.stderr
    assert torch.equal(
        load_file(tmp_path / "logits")["logits"],
        logits(effattn.restore(model)),
    )


NAME = "effattn:sliding(window=4, sinks=1)"


@pytest.mark.quick
def test_an_attention_by_name_at_loading_and_after(tmp_path):
    llama().save_pretrained(tmp_path)
    expected = logits(
        effattn.swap(
            llama(),
            "sliding(window=4, sinks=1)",
        )
    )
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        assert torch.equal(
            logits(load(tmp_path, attn_implementation=NAME)),
            expected,
        )
    config = AutoConfig.from_pretrained(
        tmp_path,
        attn_implementation=NAME,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        config=config,
    )
    assert torch.equal(
        logits(loaded),
        expected,
    )
    model = llama()
    model.set_attn_implementation(NAME)
    assert torch.equal(
        logits(model),
        expected,
    )
    assert torch.equal(
        logits(effattn.restore(model)),
        logits(llama()),
    )


def test_an_attention_by_a_wrong_name_is_refused_before_anything_is_loaded(tmp_path):
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match="did you mean 'sliding'",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="effattn:slidin")
    model = llama()
    with pytest.raises(
        ValueError,
        match="did you mean 'window'",
    ):
        model.set_attn_implementation("effattn:sliding(windo=4)")
    assert torch.equal(
        logits(model),
        logits(llama()),
    )


def test_layers_that_differ_load_as_save_pretrained_wrote_them(tmp_path):
    """transformers' own saving names no method that would build them."""
    keep = Keep(heads=[*map(torch.arange, (4, 2))], ffn=[*map(torch.arange, (64, 0))])
    model = slice_model(llama(num_attention_heads=4, num_key_value_heads=4), keep, uniform=False)
    model.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert torch.equal(logits(again), logits(model))
    assert getattr(again.config, "quantization_config", None) is None
    # the class by itself reads the configuration too late to be told
    by_class = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(by_class), logits(model))
    assert getattr(by_class.config, "quantization_config", None) is None
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(effattn.load(tmp_path / "again")), logits(model))


def test_another_libraries_names_go_through(tmp_path):
    model = llama()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(
        ValueError,
        match="is not supported",
    ):
        model.set_attn_implementation("effattn-sliding")


def test_loading_takes_no_second_copy_and_little_time(tmp_path):
    """Of a model whose weights are plain, against transformers' own way."""
    model = llama(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
    )
    model.save_pretrained(tmp_path / "plain")
    effattn.save(
        effattn.swap(model, "sliding(window=4)"),
        tmp_path / "ours",
    )

    def seconds(folder) -> float:
        begun = time.process_time()
        AutoModelForCausalLM.from_pretrained(folder)
        return time.process_time() - begun

    seconds(tmp_path / "plain"), seconds(tmp_path / "ours")  # what is imported and made once
    pairs = [(seconds(tmp_path / "plain"), seconds(tmp_path / "ours")) for _ in range(5)]
    plain, ours = (
        min(times)
        for times in zip(
            *pairs,
            strict=True,
        )
    )
    assert ours <= 1.5 * plain + 0.1, (plain, ours)
