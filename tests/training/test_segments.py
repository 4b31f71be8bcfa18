"""Segment recurrence: gradients are those of one long call that are cut at the borders; a killed
run goes on as if it had not been."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from transformers import AttentionInterface, Trainer, TrainerCallback

import effattn
from effattn.errors import Unsupported
from effattn.hf import cache_files
from effattn.hf.cache import new_cache
from effattn.training.lending import arguments, train
from effattn.training.segments import CarriedMemory, Segments, stacked

LENGTH, ROWS, STEPS = 8, 2, 4
BLOCK = "block(block=8, look_back=1)"


def slow(spec):
    return pytest.param(spec, marks=pytest.mark.slow)


def segments(tokens, **options):
    return Segments(tokens, **({"length": LENGTH, "rows": ROWS, "steps": STEPS} | options))


def batches(rows):
    items = [rows[at] for at in range(len(rows))]
    return [stacked(items[at : at + rows.rows]) for at in range(0, len(items), rows.rows)]


def cut(module, q, k, v, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention, pair by pair: the keys and values of earlier segments have no gradient."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    at = torch.arange(q.shape[2])
    i, j = at[:, None], at
    same = i // LENGTH == j // LENGTH
    scores = torch.where(same, q @ k.mT, q @ k.detach().mT) * scaling
    seen = (j <= i) & cut.sees(i, j)
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    out = (shares * same) @ v + (shares * ~same) @ v.detach()
    return out.transpose(1, 2), None


AttentionInterface.register("cut", cut)
CASES = {
    BLOCK: lambda i, j: i // 8 - j // 8 <= 1,
    "sliding(window=11, sinks=0)": lambda i, j: i - j < 11,
    "block(block=4, look_back=2)": lambda i, j: i // 4 - j // 4 <= 2,
    None: lambda i, j: j <= i,
}


@pytest.mark.parametrize(
    "spec", [BLOCK, None, *(slow(spec) for spec in CASES if spec not in (BLOCK, None))]
)
def test_gradients_are_those_of_one_call_cut_at_the_borders(spec, tokens):
    model = tiny("llama", num_key_value_heads=2).train()
    whole = copy.deepcopy(model)
    rows = segments(tokens[: ROWS * STEPS * LENGTH], carry=STEPS if spec is None else None)
    if spec is not None:
        effattn.swap(model, spec)
    memory = CarriedMemory(model, rows)
    memory.begin()
    total = 0.0
    for batch in batches(rows):
        logits = model(**batch).logits  # whose own loss is in fp32
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        total += loss.item()
    memory.end()

    whole.set_attn_implementation("cut")
    cut.sees = CASES[spec]
    ids = tokens[: ROWS * STEPS * LENGTH].view(ROWS, -1)
    logits = whole(input_ids=ids, use_cache=False).logits.unflatten(1, (STEPS, LENGTH))
    targets = ids.unflatten(1, (STEPS, LENGTH))
    losses = [
        F.cross_entropy(logits[:, s, :-1].flatten(0, 1), targets[:, s, 1:].flatten())
        for s in range(STEPS)
    ]
    sum(losses).backward()
    assert total == pytest.approx(sum(losses).item(), rel=1e-9)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=name)


def test_rows_go_on_where_they_ended(tokens):
    rows = segments(tokens[:100], steps=14, bos=7)  # 6 segments a row
    found = batches(rows)
    assert [int(batch["segment"][0]) for batch in found] == [0, 1, 2, 3, 4, 5] * 2 + [0, 1]
    read = torch.cat([batch["input_ids"] for batch in found[:6]], dim=1)
    assert (read[:, 0] == 7).all()
    assert torch.equal(read[:, 1:], tokens[:96].view(2, 48)[:, 1:])
    numbers = [int(one["segment"][0]) for one in batches(segments(tokens, carry=3))]
    assert numbers == [0, 1, 2, 0]


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trained(folder, tokens, spec="sliding(window=12, sinks=2)", kill=None, **options):
    model = tiny("llama", dtype=torch.float32)
    effattn.swap(model, spec)
    rows = segments(tokens, steps=4, **options)
    settings = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    trainer = Trainer(
        model=model,
        args=arguments(folder, steps=4, batch=2, lr=1e-2, warmup=0, save_every=2, **settings),
        train_dataset=rows,
        data_collator=stacked,
        callbacks=[CarriedMemory(model, rows)] + ([KillAt(kill)] if kill else []),
    )
    train(trainer)
    return model


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(tokens, tmp_path):
    whole = trained(tmp_path / "whole", tokens)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", tokens, kill=3)
    memory = tmp_path / "killed" / "memory-2-0.safetensors"
    kept = memory.read_bytes()
    memory.unlink()
    with pytest.raises(ValueError, match="is missing: the run of step 2"):
        trained(tmp_path / "killed", tokens)
    memory.write_bytes(kept)
    again = trained(tmp_path / "killed", tokens)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(again._forward_pre_hooks) == 1  # the swap's
    left = sorted(file.name for file in (tmp_path / "killed").glob("memory-*"))
    assert left == ["memory-2-0.safetensors", "memory-4-0.safetensors"]


@pytest.mark.parametrize(
    "spec",
    [
        "sliding(window=6, sinks=2)",
        "sliding(window=[6, 3, 6, 3, 6, 3, 6, 3], sinks=2)",
        slow(None),
        slow("linear()"),
    ],
)
def test_a_cache_in_a_file(spec, tokens, tmp_path):
    model = tiny("llama") if spec else tiny("mistral", sliding_window=6)
    if spec:
        effattn.swap(model, spec)
    cache, other = new_cache(model), new_cache(model)
    with torch.no_grad():
        model(tokens[:60].view(2, 30), past_key_values=cache, use_cache=True)
        cache_files.write(cache, tmp_path / "cache.safetensors", {"segment": 3})
        assert cache_files.read(other, tmp_path / "cache.safetensors") == {"segment": 3}
        assert other.get_seq_length() == 30
        for start in (60, 64):
            ids = tokens[start : start + 4].view(2, 2)
            ours, theirs = (
                model(ids, past_key_values=one, use_cache=True).logits for one in (other, cache)
            )
            assert torch.equal(ours, theirs)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("kind", ["int8", "paged(page=4)", "evict(policy='snapkv', keep=80)"])
def test_a_cache_that_no_file_takes_is_refused(kind, tokens, tmp_path):
    model = effattn.swap(tiny("llama"), "dense", cache=kind)
    cache = new_cache(model)
    with torch.no_grad():
        model(tokens[:180].view(2, 90), past_key_values=cache, use_cache=True)
    with pytest.raises(Unsupported, match=r"cache: layer 0 holds a .*; valid are full"):
        cache_files.write(cache, tmp_path / "cache.safetensors", {})
    assert not [*tmp_path.iterdir()]


def test_what_is_refused(tokens):
    model = tiny("llama").train()
    with pytest.raises(ValueError, match="carry: layer 0 remembers every token"):
        CarriedMemory(model, segments(tokens))
    with pytest.raises(ValueError, match="length: got 1, valid is a whole number of at least 2"):
        segments(tokens, length=1)
    with pytest.raises(ValueError, match="tokens: got 15, 2 rows of segments of 8 need at least"):
        segments(tokens[:15])
    with pytest.raises(ValueError, match="carry: 32 segments of 8 tokens, but the model has learn"):
        CarriedMemory(tiny("gpt2"), segments(tokens, carry=32))
    rows = segments(tokens, carry=STEPS)
    with pytest.raises(ValueError, match=r"rows: got segments \[0, 1\] in one batch"):
        stacked([rows[0], rows[2]])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        stacked([{"input_ids": tokens[:8]}])
    memory = CarriedMemory(model, rows)
    memory.begin()
    first, second, third, _ = batches(rows)
    model(**first)
    with pytest.raises(ValueError, match="segment: got 2 after 0, valid is the next one, or 0"):
        model(**third)
    with pytest.raises(ValueError, match="segment: missing in a training batch"):
        model(input_ids=second["input_ids"])
    model.eval()
    model(**second)  # no memory, and no number is asked for
    memory.end()
    model(input_ids=second["input_ids"])
