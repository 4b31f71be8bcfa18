"""Recurrent memory (RMT): vectors that a model hands on from segment to segment, and what they
learn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.training.recurrent_memory import RecurrentMemory, train_memory

S, M = 6, 3


def reader(kind="llama", dtype=torch.float64, **options):
    return RecurrentMemory(tiny(kind, dtype=dtype), memory=M, segment=S, **options)


def by_hand(own, ids, cut=None):
    """Mean loss of ids (B, T): every segment between two copies of the memory, one call each."""
    model, memory, losses = own.model, own.memory.expand(len(ids), M, -1), []
    for number, part in enumerate(ids.split(S, dim=1)):
        if cut is not None and number and number % cut == 0:
            memory = memory.detach()
        x = torch.cat([memory, model.get_input_embeddings()(part), memory], dim=1)
        found = model(inputs_embeds=x, output_hidden_states=True, use_cache=False)
        logits = found.logits[:, M : M + part.shape[1]]
        losses.append(F.cross_entropy(logits[:, :-1].mT, part[:, 1:], reduction="none"))
        memory = found.hidden_states[-1][:, -M:]
    return torch.cat(losses, dim=1).mean()


@pytest.mark.parametrize(
    "kind",
    ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "gpt_neox"))],
)
@pytest.mark.parametrize("through", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_the_papers(kind, through, tokens):
    own = reader(kind, through=through)
    ids = tokens[:40].view(2, 20)  # three segments, and two tokens
    grads = []
    for loss in (own(input_ids=ids)["loss"], by_hand(own, ids, through)):
        own.zero_grad()
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in own.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert own.memory.grad.abs().max() > 0
    for name, ours in grads[0].items():
        torch.testing.assert_close(ours, grads[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_what_was_read_is_remembered(tokens):
    """The third segment's loss depends on the first one, which no attention reaches."""
    own, ids = reader(), tokens[:18][None]
    other = ids.clone()
    other[0, :4] = (other[0, :4] + 1) % 96
    a, b = own.losses(ids), own.losses(other)
    assert not torch.equal(a[2], b[2])
    torch.testing.assert_close(own.read(ids[:, :S])[0], next(own.segments(ids))[1])


def test_generation_goes_through_the_memory(tokens):
    own, ids = reader().eval(), tokens[:32].view(2, 16)
    found = own.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found.shape == (2, 21)
    assert torch.equal(found[:, :16], ids)
    # the first new tokens by hand: two whole segments, and four tokens
    memory = None
    for part in (ids[:, :S], ids[:, S : 2 * S]):
        _, memory = own.read(part, memory)
    hidden, _ = own.read(ids[:, 2 * S :], memory)
    assert torch.equal(own.model.lm_head(hidden[:, -1]).argmax(-1), found[:, 16])
    sampled = own.generate(ids, max_new_tokens=3, do_sample=True, top_k=5)
    assert sampled.shape[0] == 2
    end = int(found[0, 17])
    stopped = own.generate(ids[:1], max_new_tokens=9, do_sample=False, eos_token_id=end)
    assert int(stopped[0, -1]) == end
    assert stopped.shape[1] <= 18


def test_saved_and_loaded(tokens, tmp_path):
    own = reader(dtype=torch.float32)
    own.memory.data.mul_(2)
    effattn.save(own.model, tmp_path)
    own.save(tmp_path)
    again = RecurrentMemory.load(effattn.load(tmp_path), tmp_path)
    ids = tokens[:18][None]
    assert torch.equal(again(ids)["loss"], own(ids)["loss"])
    assert (again.segment, again.through) == (S, 2)
    with pytest.raises(ValueError, match=r"has no recurrent_memory\.safetensors"):
        RecurrentMemory.load(own.model, tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"the memory is \(3, 64\), and the model's vectors have 3"
    ):
        RecurrentMemory.load(tiny("llama", hidden_size=32), tmp_path)


def trained(own, tokens, folder, **options):
    settings = {"train_tokens": 4 * 2 * 2 * S, "segments": 2, "lr": 1e-2, "save_every": 2}
    return train_memory(own, tokens, folder=folder, **(settings | options))


@pytest.mark.slow
def test_training_goes_on_exactly_and_ties_are_kept(tokens, tmp_path):
    def fresh():
        model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
        return RecurrentMemory(model, memory=M, segment=S)

    whole, again = fresh(), fresh()
    told = trained(whole, tokens, tmp_path / "whole")
    assert told["tokens"] == 96

    def kill(done, steps):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(fresh(), tokens, tmp_path / "killed", progress=kill)
    trained(again, tokens, tmp_path / "killed")
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


@pytest.mark.slow
def test_the_memory_alone(tokens, tmp_path):
    own = reader(dtype=torch.bfloat16)
    before = copy.deepcopy(own.state_dict())
    trained(own, tokens, tmp_path, trainable="memory")
    changed = {name for name, x in own.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"memory"}
    assert own.memory.dtype == torch.bfloat16


def test_mistakes(tokens, tmp_path):
    with pytest.raises(ValueError, match="memory: got 0, valid is a whole number of at least 1"):
        RecurrentMemory(tiny("llama"), memory=0)
    with pytest.raises(ValueError, match="has learned 128 positions; valid is at most 112"):
        RecurrentMemory(tiny("gpt2"), segment=120)
    own = reader()
    with pytest.raises(Unsupported, match="num_beams: got 2, valid is 1"):
        own.generate(tokens[:8][None], 2, num_beams=2)
    with pytest.raises(Unsupported, match="attention_mask: padding"):
        own.generate(tokens[:8][None], 2, attention_mask=torch.arange(8)[None] > 2)
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        own.generate(tokens[:8][None], 0)
    with pytest.raises(ValueError, match="did you mean 'memory'"):
        trained(own, tokens, tmp_path, trainable="memories")


@pytest.mark.parametrize("given", [{"segments": 0}, {"batch": 0}])
def test_sizes_of_a_training_that_mean_nothing(given, tmp_path):
    reader, ids = RecurrentMemory(tiny("llama"), 2, 8), torch.arange(90)
    with pytest.raises(ValueError, match=f"{next(iter(given))}: got 0, valid is a whole"):
        train_memory(reader, ids, train_tokens=64, folder=tmp_path, **given)
    with pytest.raises(ValueError, match="return_dict_in_generate: got True"):
        reader.generate(ids[None, :9], 2, return_dict_in_generate=True)
