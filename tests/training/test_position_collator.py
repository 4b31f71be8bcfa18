"""The collator for training at short length with long positions."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import Trainer

from effattn.position_sampling import SampledPositions
from effattn.surgery.swapping import swap
from effattn.training.lending import TokenWindows, arguments


def rows(count=3, length=16):
    return [
        {"input_ids": torch.arange(length) + row, "labels": torch.arange(length)}
        for row in range(count)
    ]


@pytest.mark.parametrize("method", ["pose", "random"])
def test_positions_ascend_below_the_target(method):
    torch.manual_seed(0)
    collator = SampledPositions(64, method)
    met = torch.zeros(64, dtype=torch.bool)
    for _ in range(100):
        batch = collator(rows())
        ids = batch["position_ids"]
        assert ids.shape == batch["input_ids"].shape == batch["labels"].shape == (3, 16)
        assert batch["attention_mask"].all()
        assert (ids.diff(dim=1) >= 1).all()
        assert ids.min() >= 0
        assert ids.max() < 64
        met[(ids[:, :, None] - ids[:, None]).clamp(min=0)] = True
        if method == "pose":
            assert (ids[:, 0] == 0).all()
            assert ((ids.diff(dim=1) > 1).sum(dim=1) <= 1).all()  # two runs
    assert met.float().mean() > 0.9  # nearly every distance
    assert not torch.equal(collator(rows())["position_ids"], ids)


def test_more_runs_and_no_room():
    torch.manual_seed(0)
    jumps = [(SampledPositions(10_000, chunks=4).positions(32).diff() > 1).sum() for _ in range(50)]
    assert max(jumps) == 3
    for method in ("pose", "random"):
        assert SampledPositions(8, method).positions(8).tolist() == list(range(8))
        assert SampledPositions(8, method).positions(1).shape == (1,)


def test_padding_has_no_positions():
    row = {"input_ids": torch.arange(6), "attention_mask": torch.tensor([0, 0, 1, 1, 1, 1])}
    ids = SampledPositions(100)([row])["position_ids"][0]
    assert ids[:3].tolist() == [0, 0, 0]
    assert (ids[2:].diff() >= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target: got 0"),
        ({"target": 8, "method": "pos"}, "did you mean 'pose'"),
        ({"target": 8, "chunks": 0}, "chunks: got 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        SampledPositions(**options)
    with pytest.raises(ValueError, match="target: got 15, shorter than a row of 16 tokens"):
        SampledPositions(15)(rows())
    with pytest.raises(ValueError, match=r"rows: got lengths \[8, 16\]"):
        SampledPositions(64)(rows(1) + rows(1, length=8))


def test_a_plain_model_reads_the_positions():
    """A rule in the config: transformers turns by position_ids, and does not take their jumps for
    packed documents.
    """
    model = swap(tiny("llama", dtype=torch.float32), positions="yarn(factor=8)")
    torch.manual_seed(0)
    batch = SampledPositions(1024)(rows())
    with torch.no_grad():
        jumping = model(**batch).logits
        plain = model(batch["input_ids"]).logits
    assert not torch.allclose(jumping, plain, atol=1e-3)
    first = int((batch["position_ids"][0].diff() > 1).nonzero()[0]) + 1
    torch.testing.assert_close(jumping[0, :first], plain[0, :first], rtol=1e-4, atol=1e-4)
    seen = model.model.layers[0].self_attn
    inputs = {}
    seen.register_forward_pre_hook(lambda _, __, kwargs: inputs.update(kwargs), with_kwargs=True)
    model(**batch)
    # the last token sees them all
    assert inputs["attention_mask"] is None or inputs["attention_mask"][:, :, -1].all()


def test_training_with_the_trainer(tmp_path, tokens):
    model = swap(tiny("llama", dtype=torch.float32), positions="ntk(factor=4)")
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    settings = arguments(
        tmp_path,
        steps=2,
        batch=2,
        lr=1e-2,
        warmup=0,
        save_every=10,
        use_cpu=True,
        disable_tqdm=True,
    )
    windows = TokenWindows(tokens, 16, 8)
    trainer = Trainer(model, settings, train_dataset=windows, data_collator=SampledPositions(512))
    trainer.train()
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize("method", ["pose", "random"])
def test_numbered_rows_get_the_positions_of_their_number(method):
    """Whatever was drawn before: a resumed training sees what an undisturbed one sees."""
    collator = SampledPositions(500, method)
    rows = [{"input_ids": torch.arange(20), "draw": number} for number in range(4)]
    whole = collator(rows)
    assert "draw" not in whole
    torch.rand(7)
    for number, row in enumerate(rows):
        assert torch.equal(collator([row])["position_ids"][0], whole["position_ids"][number])
    assert len({tuple(row.tolist()) for row in whole["position_ids"]}) == 4
