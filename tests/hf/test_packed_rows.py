"""Packed documents in a live model: a batch whose position_ids restart gives what its documents
give one by one, forward and backward, for every pattern and position rule, and in a Trainer."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.surgery.swapping import restore, swap

LENGTHS = (7, 1, 12, 7, 3)
IDS = torch.randint(3, 96, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
# of a causal model: every pattern, position rules of all kinds, and layers that keep what they had
AXES = {
    "dense": {"pattern": "dense"},
    "window": {"pattern": "sliding(window=4)"},
    "sinks": {"pattern": "sliding(window=4, sinks=2)"},
    "block": {"pattern": "block(block=4)"},
    "global": {"pattern": "longformer(window=3, global_tokens=2)"},
    "fixed": {"pattern": "fixed(stride=4)"},
    "linear": {"pattern": "linear"},
    "performer": {"pattern": "performer(features=16)"},
    "lsh": {"pattern": "lsh(rounds=2, buckets=4, chunk=4)"},
    "one layer": {"pattern": {"0": "sliding(window=4)"}},
    "rerope": {"positions": "rerope(window=4)"},
    "alibi": {"positions": "alibi"},
    "dynamic ntk": {"positions": "dynamic_ntk(factor=4)"},
    "xpos": {"positions": "xpos"},
}


def swapped(axis: str, kind: str = "llama"):
    return swap(tiny(kind, max_position_embeddings=16).double(), **AXES[axis])


def both_ways(model, ids, **given):
    """Logits, and the gradients of all weights."""
    model.zero_grad()
    logits = model(ids, **given).logits
    weight = torch.randn(96, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits.tanh() * weight).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def one_by_one(model):
    parts = [both_ways(model, ids, use_cache=False) for ids in IDS.split(LENGTHS, dim=1)]
    logits = torch.cat([logits for logits, _ in parts], dim=1)
    return logits, [sum(each) for each in zip(*(grads for _, grads in parts), strict=True)]


def close(got, want):
    """To what transformers' norms and angles leave, which are in fp32."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_packed_documents_are_the_documents_one_by_one(axis):
    model = swapped(axis)
    want = one_by_one(model)
    close(both_ways(model, IDS, position_ids=POSITIONS), want)
    close(both_ways(model, IDS, cu_seq_lens_q=BORDERS, cu_seq_lens_k=BORDERS), want)


@pytest.mark.parametrize("kind", ["gemma2", "opt", "gpt_neox"])
def test_other_architectures(kind):
    model = swapped("one layer", kind)
    close(both_ways(model, IDS, position_ids=POSITIONS), one_by_one(model))


def test_collators_borders_positions_and_what_is_left_out():
    model, rows = swapped("sinks"), [{"input_ids": ids[0]} for ids in IDS.split(LENGTHS, dim=1)]
    want = both_ways(model, IDS, position_ids=POSITIONS)
    for options in ({"return_flash_attn_kwargs": True}, {"position_ids_start": 2}):
        batch = transformers.DataCollatorWithFlattening(**options)(rows, return_tensors="pt")
        assert batch.pop("labels").shape == IDS.shape
        close(both_ways(model, batch.pop("input_ids"), **batch), want)


def test_padded_tails_and_several_rows():
    """A second row of other documents, and padding behind, between and in documents."""
    model = swapped("sinks")
    mask = torch.ones(2, 34, dtype=torch.int64)
    mask[0, 30:] = mask[1, :2] = mask[1, 9:11] = mask[1, 20:23] = 0
    ids = torch.randint(3, 96, mask.shape, generator=torch.Generator().manual_seed(2))
    positions, documents = torch.zeros_like(mask), []
    for row, cuts in ((0, (11, 12)), (1, (6, 14))):
        at = mask[row].nonzero()[:, 0]
        for part in at.tensor_split(cuts):
            positions[row, part] = torch.arange(len(part))
            documents.append((row, part))
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, part in documents:
        alone = model(ids[row : row + 1, part]).logits[0]
        torch.testing.assert_close(logits[row, part], alone, rtol=1e-9, atol=1e-9)
    # one set of position_ids is for all rows
    both = model(IDS.expand(2, -1), position_ids=POSITIONS).logits
    torch.testing.assert_close(both[:1], both[1:])


def test_past_the_models_own_hook():
    """Adapters call the model's `forward`, which hooks do not see; a part may be called alone."""
    base = swapped("sinks")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    close(both_ways(model, IDS, position_ids=POSITIONS), one_by_one(model))
    body = base.model
    want = base(IDS, position_ids=POSITIONS, output_hidden_states=True).hidden_states[-1]
    got = body(input_ids=IDS, position_ids=POSITIONS).last_hidden_state
    torch.testing.assert_close(got, want)


def test_checkpointing_and_the_same_tensors_again():
    model = swapped("window")
    want = both_ways(model, IDS, position_ids=POSITIONS)
    model.train().gradient_checkpointing_enable()
    close(both_ways(model, IDS, position_ids=POSITIONS), want)
    # the caller's own tensor, written to: one document
    positions = POSITIONS.clone()
    model.eval()(IDS, position_ids=positions)
    positions.copy_(torch.arange(IDS.shape[1])[None])
    alone = model(IDS).logits
    torch.testing.assert_close(model(IDS, position_ids=positions).logits, alone)


def test_training_with_the_trainer_packs(tmp_path):
    """Rows of documents in a Trainer, with its own collator, against the sum of the documents'
    losses by hand: the same step."""
    rows = [{"input_ids": ids[0].tolist()} for ids in IDS.split(LENGTHS, dim=1) if ids.shape[1] > 1]
    model = swapped("sinks")
    settings = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        learning_rate=0.5,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    twin = swapped("sinks")
    twin.load_state_dict(model.state_dict())
    losses = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        logits = twin(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    (sum(losses) / sum(len(row["input_ids"]) - 1 for row in rows)).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.5 * p.grad
    transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithFlattening(),
    ).train()
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)


def test_what_is_refused():
    model = swapped("sinks")
    cached = r"packed documents: a cache holds one document a row; valid is use_cache=False"
    with pytest.raises(Unsupported, match=cached):
        model(IDS, position_ids=POSITIONS, use_cache=True)
    with pytest.raises(Unsupported, match=cached):
        model(IDS, position_ids=POSITIONS, past_key_values=effattn.new_cache(model))
    assert model(IDS, position_ids=POSITIONS).past_key_values is None
    cache = model(IDS).past_key_values
    with pytest.raises(Unsupported, match="packed documents: position_ids restart behind a cache"):
        model(IDS, position_ids=POSITIONS, past_key_values=cache)
    jump = POSITIONS.clone()
    jump[0, 12:] += 3
    with pytest.raises(Unsupported, match="position_ids leave out numbers inside of packed"):
        model(IDS, position_ids=jump)
    for borders in (BORDERS + 1, BORDERS[:-1], BORDERS.flip(0), BORDERS[None]):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q: got .* valid are numbers from 0"):
            model(IDS, cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="got other borders than cu_seq_lens_k"):
        model(IDS, cu_seq_lens_q=BORDERS, cu_seq_lens_k=BORDERS[1:])
    assert not torch.allclose(
        restore(model)(IDS, use_cache=False).logits,
        model(IDS, position_ids=POSITIONS, use_cache=False).logits,
    )
    assert not model.model._forward_pre_hooks
