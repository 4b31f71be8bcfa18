"""LongLoRA as a setting of `extend`: trained with shifted blocks and few weights, and afterwards a
plain, dense checkpoint."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

import effattn
from effattn.extending import tuning
from effattn.hf import hooks
from effattn.recipes import extend
from effattn.recipes.extend import Settings
from effattn.surgery.swapping import active, swap
from effattn.training.lora import adapters, norms_and_embeddings

BLOCK = "s2(block=32)"


def small(**given):
    """A random model with grouped heads and the embedded model's vocabulary, made for 128
    tokens."""
    return tiny("llama", dtype=torch.float32, vocab_size=3072, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    effattn.save(small(), path, effattn.embedded.tokenizer())
    return path


def job(folder, output, **given) -> Settings:
    usual = dict(
        model=str(folder),
        to=256,
        rule="pi(length=256)",
        output=output,
        tune_tokens=2 * 256,
        sampling="none",
        train_pattern=BLOCK,
        sequences=0,
        lr=1e-2,
    )
    return Settings(**usual | given)


def test_the_pattern_is_there_while_it_trains_and_gone_afterwards(folder, tmp_path, monkeypatch):
    own, seen = tuning.NextTokenTrainer.compute_loss, []

    def look(self, model, inputs, **rest):
        seen.append({row["pattern"] for row in effattn.describe(self.model).layers})
        return own(self, model, inputs, **rest)

    monkeypatch.setattr(tuning.NextTokenTrainer, "compute_loss", look)
    report = extend.run(job(folder, tmp_path / "far"))
    assert seen == [{BLOCK}] * 2
    assert report.data["tuning"]["train_pattern"] == BLOCK
    assert report.data["tuning"]["speed"]["cpu_seconds"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "far")
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert not hasattr(model.config, "effattn")
    ids = torch.arange(200)[None]
    dense = effattn.load(tmp_path / "far")
    assert active(dense) is None
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_the_gradient_is_that_of_shifted_blocks(tmp_path):
    """One step of SGD by `tune` is a step on the loss whose attention is masked by hand."""
    model, window = small(attention_dropout=0.0), 128
    expected, ids = copy.deepcopy(model), torch.randint(0, 3072, (512,))
    windows = tuning.training.TokenWindows(ids, window, 1)
    row = windows[0]["input_ids"]
    at = torch.arange(window)
    masks = [(at[:, None] + s) // 32 == (at + s) // 32 for s in (0, 16)]
    heads = model.config.num_attention_heads
    seen = torch.stack([masks[head >= heads // 2] for head in range(heads)]) & (at[:, None] >= at)
    added = torch.zeros(1, heads, window, window).masked_fill(~seen, float("-inf"))
    expected.set_attn_implementation("eager")
    loss = expected(input_ids=row[None], attention_mask=added, labels=row[None]).loss
    loss.backward()
    swap(model, BLOCK)
    given = {"optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False}
    tuning.tune(
        model,
        ids,
        target=window,
        window=window,
        train_tokens=window,
        folder=tmp_path,
        sampling=None,
        lr=0.5,
        overrides=given,
    )
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            ours,
            theirs - 0.5 * theirs.grad,
            rtol=1e-3,
            atol=2e-5,
            msg=lambda text, n=name: n + text,
        )


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16],
    ids=["fp32", "bf16"],
)
def test_lora_plus_trains_norms_and_embeddings_and_nothing_else(tmp_path, dtype):
    pytest.importorskip("peft")
    model = tiny("llama", dtype=dtype, vocab_size=96)
    swap(model, "s2(block=16)", positions="pi(length=256)")
    before = copy.deepcopy(model.state_dict())
    tuning.tune(
        model,
        (torch.arange(1024) * 7) % 90,
        target=64,
        window=64,
        train_tokens=4 * 64,
        folder=tmp_path,
        sampling=None,
        lr=3e-2,
        lora=2,
        lora_plus=True,
    )
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {dtype}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {
        name
        for name in before
        if "norm" in name or "embed_tokens" in name or ("_proj" in name and "mlp" not in name)
    }
    assert changed == wanted
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "qwen3", "olmo2"])
def test_norms_are_found_in_every_architecture(kind):
    pytest.importorskip("peft")
    model = tiny(kind)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(one)] for one in norms_and_embeddings(model)}
    gains = {name for name, one in model.named_parameters() if one.dim() == 1}
    gains -= {name for name in gains if name.endswith("bias") and "norm" not in name}
    assert found == gains | {names[id(model.get_input_embeddings().weight)]}
    with adapters(model, 2, plus=True) as trained:
        lora = [one for name, one in model.named_parameters() if "lora_" in name]
        assert {id(one) for one in trained} >= {id(one) for one in lora}
        assert len(trained) == len(lora) + len(found)
    assert not any(hooks.PATTERN in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_pattern": "blok(block=32)"}, "did you mean 'block'"),
        ({"train_pattern": "s2(block=33)"}, "train_pattern: s2: block: got 33"),
        ({"train_pattern": "linear"}, "train_pattern: got 'linear', and dense attention is to"),
        ({"train_pattern": "sliding(window=32, sink_logits=True)"}, "train_pattern: got"),
        ({"sampling": "pose"}, "sampling: got 'pose' with train_pattern"),
        ({"tune_tokens": 0}, "train_pattern: got 's2.block=32.' without tune_tokens"),
        ({"lora_plus": True}, "lora_plus: given without lora"),
        ({"memory": "block(block=32)"}, "memory: got 'block.block=32.' with train_pattern="),
    ],
)
def test_what_cannot_be_trained_so_is_refused_before_anything(folder, tmp_path, change, message):
    given = dataclasses.replace(job(folder, tmp_path / "out"), **change)
    with pytest.raises(ValueError, match=message):
        extend.run(given)
    assert list(tmp_path.iterdir()) == []


def test_only_layers_with_full_attention_are_blocked(tmp_path):
    model, tokenizer = tiny("gemma3_text", vocab_size=3072), effattn.embedded.tokenizer()
    effattn.save(model, tmp_path / "model", tokenizer)
    plan = extend.load(
        job(tmp_path / "model", None, to=512, rule="pi(length=512)", tune_tokens=512),
        extend.Quiet(),
    )[2]
    assert extend.training_pattern(job("", None), plan) == {"1": BLOCK}


@pytest.mark.parametrize("spec", ["linear", "sliding(window=8, sink_logits=True)"])
def test_a_memory_is_of_what_dense_attention_takes_over(spec):
    with pytest.raises(ValueError, match=r"memory: got .*, and dense attention is to take over"):
        tuning.check_memory(spec, None)


@pytest.mark.parametrize("sampling", [None, "pose"])
def test_a_memory_that_is_no_pattern_is_named(sampling):
    with pytest.raises(ValueError, match=r"memory: backend: got 'slidin' .did you mean 'sliding'"):
        tuning.check_memory("slidin", sampling)
