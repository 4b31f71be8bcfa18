"""Exports that are plain checkpoints: windows by a class that has them; what is said of vLLM."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import SMALL

import effattn
from effattn import embedded
from effattn.errors import Unsupported
from effattn.exporting import capabilities
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

IDS = torch.arange(3, 63).view(
    2,
    30,
)
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3072}


def tiny(kind: str, **settings):
    torch.manual_seed(0)
    config = getattr(
        transformers,
        f"{kind}Config",
    )(**SMALL | SHAPE | settings)
    return getattr(
        transformers,
        f"{kind}ForCausalLM",
    )(config).eval()


def exported(model, tmp_path, to="transformers", **options):
    effattn.save(
        model,
        tmp_path / "model",
        embedded.tokenizer(),
    )
    return effattn.export(
        tmp_path / "model",
        to=to,
        output=tmp_path / "out",
        **options,
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("sliding(window=4)", marks=pytest.mark.slow),
        {"1": "sliding(window=8)"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "becomes"), [("Llama", "Ministral"), ("Qwen2", "Qwen2"), ("Qwen3", "Qwen3")]
)
def test_windows_are_a_classs_own(kind, becomes, pattern, tmp_path):
    model = effattn.swap(
        tiny(kind),
        pattern,
    )
    report = exported(
        model,
        tmp_path,
        check=True,
    )
    assert f"{becomes}ForCausalLM's own" in report.data["notes"][0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded).__name__ == f"{becomes}ForCausalLM"
    assert torch.allclose(
        logits(loaded),
        logits(model),
        atol=1e-5,
    )
    assert not torch.allclose(
        logits(effattn.restore(model)),
        logits(loaded),
        atol=1e-3,
    )
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = loaded.generate(
        IDS,
        use_cache=False,
        **options,
    )
    assert torch.equal(
        loaded.generate(IDS, **options),
        whole,
    )


@pytest.mark.parametrize(
    "swap",
    [
        {"pattern": "sliding(window=4, sinks=1)"},
        {"pattern": {"0": "sliding(window=4)", "1": "sliding(window=8)"}},
        {"pattern": "sliding(window=4)", "cache": "int8(group=16)"},
    ],
    ids=str,
)
def test_what_no_class_does_is_refused_and_never_dense(swap, tmp_path):
    with pytest.raises(
        Unsupported,
        match=r"transformers cannot express",
    ):
        exported(
            effattn.swap(tiny("Llama"), **swap),
            tmp_path,
        )
    assert not (tmp_path / "out").exists()


def test_windows_of_a_llama_with_biases_are_refused(tmp_path):
    model = effattn.swap(
        tiny("Llama", attention_bias=True),
        "sliding(window=4)",
    )
    with pytest.raises(
        Unsupported,
        match=r"sliding\(window=4\) in layers 0, 1",
    ):
        exported(model, tmp_path)


def test_layers_that_differ_are_not_for_transformers_alone(tmp_path):
    keep = Keep(ffn=[torch.arange(32), torch.arange(64)])
    small = slice_model(
        tiny("Llama"),
        keep,
        uniform=False,
    )
    with pytest.raises(
        Unsupported,
        match="layers that differ",
    ):
        exported(small, tmp_path)


def test_zeros_are_unpacked(tmp_path):
    model = tiny("Llama")
    effattn.prune.oneshot(
        model,
        torch.arange(3000),
        method="magnitude",
        sparsity=0.7,
    )
    expected = logits(model)
    effattn.prune.pack(
        model,
        format="bitmask",
    )
    report = exported(
        model,
        tmp_path,
        check=True,
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(
        logits(loaded),
        expected,
    )
    assert report.data["check"]["max_logit_difference"] < 1e-4
    assert "effattn" not in (tmp_path / "out" / "config.json").read_text()


def test_vllm_is_told_and_not_run(tmp_path):
    report = exported(
        tiny("Llama"),
        tmp_path,
        to="vllm",
    )
    assert report.data["check"] is None
    assert "no server was run" in report.data["notes"][0]
    assert "not run in vLLM here" in report.headline
    assert "no multiple of 256" in " ".join(report.data["notes"])


def test_a_class_that_vllm_has_not(tmp_path):
    with pytest.raises(
        Unsupported,
        match="none of the classes that vLLM's sources list",
    ):
        exported(
            tiny("Helium", head_dim=16),
            tmp_path,
            to="vllm",
        )


def test_the_table_answers_for_every_engine_and_is_in_every_report(tmp_path):
    assert all(len(row) == 1 + len(capabilities.ENGINES) for row in capabilities.table())
    report = exported(tiny("Llama"), tmp_path)
    shown = report.to_markdown()
    assert all(part.said in shown for part in capabilities.PARTS)
