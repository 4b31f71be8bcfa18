"""What learns after a swap: gradients, checkpointing, the Trainer, and parameters that a method
brings along.
"""

import copy

import pytest
import torch
import transformers
from test_swap import assert_untouched, batch, logits, tiny

from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap


def training_batch():
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def gradients(model, **options):
    model.zero_grad()
    model(**training_batch(), **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_training():
    expected = gradients(tiny().train())
    torch.testing.assert_close(gradients(swap(tiny().train(), "dense")), expected)


LEARNING = [
    "dense",
    "sliding(window=4)",
    "sliding(window=4, sinks=2)",
    "sliding(window=4, sink_logits=True)",
    "longformer(window=4, global_tokens=2)",
]


@pytest.mark.parametrize("spec", LEARNING)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(spec, reentrant):
    model = swap(tiny("qwen3").train(), spec)
    expected = gradients(model, use_cache=False)
    # the states pass gradients on
    torch.testing.assert_close(gradients(model, use_cache=True), expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("spec", ["dense", "sliding(window=4, sink_logits=True)"])
def test_the_trainer(spec, tmp_path):
    rows = [
        {name: tensor[row] for name, tensor in training_batch().items()} for row in range(3)
    ] * 2
    trained = []
    for checkpointing in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        model = swap(tiny(), spec)
        args = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.05,
            optim="sgd",
            seed=1,
            gradient_checkpointing=bool(checkpointing),
            gradient_checkpointing_kwargs=checkpointing or None,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        before = {name: p.clone() for name, p in model.named_parameters()}
        transformers.Trainer(model=model, args=args, train_dataset=rows).train()
        trained.append(dict(model.named_parameters()))
        assert all(
            not torch.equal(p, before[name]) for name, p in trained[-1].items() if "sink" in name
        )
    torch.testing.assert_close(trained[1], trained[0])
    torch.testing.assert_close(trained[2], trained[0])


def test_what_a_method_learns_is_a_part_of_the_model():
    model = tiny("phi3")
    before, keys = logits(model, batch()), list(model.state_dict())
    swap(
        model,
        {
            "0": "sliding(window=5, sink_logits=True)",
            "1": "longformer(window=5)",
            "2": "longformer(window=5)",
        },
    )
    first = model.model.layers
    learned = {name for name, _ in model.named_parameters()} - set(keys)
    assert learned == {
        "model.layers.0.self_attn.effattn_pattern.sink_logits",
        "model.layers.1.self_attn.effattn_global.qkv_proj_weight",
        "model.layers.2.self_attn.effattn_global.qkv_proj_weight",
    }
    assert first[0].self_attn.effattn_pattern is first[0].self_attn._effattn.backend
    assert torch.equal(
        first[1].self_attn.effattn_global.qkv_proj_weight, first[1].self_attn.qkv_proj.weight
    )
    assert all(model.get_parameter(name).requires_grad for name in learned)
    at_first = logits(model, batch())
    with torch.no_grad():
        for name in sorted(learned):
            p, old = model.get_parameter(name), logits(model, batch())
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            assert not torch.allclose(logits(model, batch()), old)
    described = [layer["projections"] for layer in describe(model).layers]
    assert described == ["dense", "dense, global separate", "dense, global separate", "dense"]
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch()), logits(model, batch()))
    swap(model, {"0": "sliding(window=5, sink_logits=True)", "1-2": "longformer(window=5)"})  # anew
    assert torch.equal(logits(model, batch()), at_first)
    for swapped in (model, twin):
        assert list(restore(swapped).state_dict()) == keys
        assert torch.equal(logits(swapped, batch()), before)
        assert_untouched(swapped)


def test_global_tokens_as_tensors():
    model, inputs = tiny(), batch(False)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[[0, 5]] = True
    found = [
        logits(swap(model, "longformer", window=3, global_tokens=t), inputs)
        for t in (mask, torch.tensor([0, 5]))
    ]
    assert active(model).specs[0] == "longformer(window=3, global_tokens=[0, 5])"
    assert torch.equal(*found)
    assert "effattn_pattern" not in str(model.state_dict().keys())  # a mask is no weight
