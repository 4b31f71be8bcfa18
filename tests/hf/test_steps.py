"""Steps of `generate`: what is known of padding and positions goes with a call's arguments, is
asked once, and is asked again where anything could have changed it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import tiny

from effattn import padding
from effattn.errors import Unsupported
from effattn.hf import position_ids
from effattn.hf.cache import new_cache
from effattn.surgery.swapping import restore, swap

UPDATE = "_update_model_kwargs_for_generation"
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
PADDED = {"left": (0, 0, 4), "right": (0, 9, 12), "middle": (1, 3, 6)}  # row, from, to
SWAPS = {
    "sinks": {"pattern": "sliding(window=5, sinks=3)"},
    "alibi": {"positions": "alibi"},
    "sums": {"pattern": "linear"},
    "packed": {"cache": "int8(group=16, residual=16, first=2)"},
}


def model_of(name: str = "sinks"):
    return swap(tiny("llama", num_hidden_layers=1), **SWAPS[name])


def mask_of(where: str):
    mask = torch.ones_like(IDS)
    if where in PADDED:
        row, low, high = PADDED[where]
        mask[row, low:high] = 0
    return mask


@pytest.fixture
def looks(monkeypatch):
    """How often masks and position_ids are looked at."""
    seen = []
    of, check = padding.Mask.of.__func__, position_ids.check
    monkeypatch.setattr(
        padding.Mask, "of", classmethod(lambda cls, mask: (seen.append("mask"), of(cls, mask))[1])
    )
    monkeypatch.setattr(position_ids, "check", lambda *args: (seen.append("ids"), check(*args))[1])
    return seen


@pytest.mark.parametrize("where", ["nowhere", *PADDED])
@pytest.mark.parametrize("name", SWAPS)
def test_a_generation_looks_once(name, where, looks):
    if where == "right" and name in ("sinks", "alibi"):
        pytest.skip("generate() goes on from the position_ids of padding, which is refused")
    model, options = model_of(name), dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    for more in ({}, {"num_beams": 2}):
        looks.clear()
        got = model.generate(IDS, attention_mask=mask_of(where), **options, **more)
        assert looks.count("mask") <= 1
        assert looks.count("ids") <= 1 + (where == "right")  # whose last token has no number
        if where == "right":  # where generate() itself numbers tokens otherwise without a cache
            continue
        plain = model.generate(
            IDS, attention_mask=mask_of(where), **options, **more, use_cache=False
        )
        assert torch.equal(got, plain)


@torch.no_grad()
def test_a_mask_that_was_written_to_is_looked_at_again(looks):
    model, mask = model_of(), mask_of("left")
    for _ in range(2):
        model(IDS, attention_mask=mask)
    assert looks.count("mask") == 1
    mask[0, 4] = 0
    want = model(IDS, attention_mask=mask.clone()).logits
    assert torch.equal(model(IDS, attention_mask=mask).logits, want)
    with torch.inference_mode():  # nothing counts writes there
        mask = mask.clone()
        model(IDS, attention_mask=mask)
        mask[0, :5] = 1
        assert torch.equal(model(IDS, attention_mask=mask).logits, model(IDS).logits)


@torch.no_grad()
def test_a_step_of_ones_own_is_looked_at(looks):
    """A mask that `generate` did not make may say anything of the tokens before."""
    model, mask = model_of("sums"), mask_of("left")
    cache = new_cache(model)
    model(IDS, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
    model(IDS[:, :1], attention_mask=longer, past_key_values=cache)
    assert looks.count("mask") == 2
    wrong = torch.ones(2, 14, dtype=torch.int64)
    wrong[0, 2] = 0
    with pytest.raises(ValueError, match="it says otherwise of the state's 13 tokens"):
        model(IDS[:, :1], attention_mask=wrong, past_key_values=cache)


@torch.no_grad()
def test_a_grown_mask_of_another_call_is_refused():
    """Between two steps of `generate`, rows change places that are padded differently."""
    mask = mask_of("left")
    for name in ("sums", "sinks"):
        model = model_of(name)
        cache, ids = new_cache(model), (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": ids, "past_key_values": cache}
        given = getattr(model, UPDATE)(model(IDS, **given), given)
        ids = given.pop("position_ids")[:, -1:]
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="it says otherwise of the state's 12 tokens"):
            model(IDS[:, :1], position_ids=ids, **given)
        cache.layers[0]._waiting = False
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(Unsupported, match="goes on at a number that is 2 more"):
        model(IDS[:, :1], position_ids=ids + 2, **given)


@torch.no_grad()
def test_a_call_that_fails_leaves_no_check_out(monkeypatch):
    """The hook has looked at a call, and attention never sees it: the next one is looked at."""
    model = model_of()
    cache, embed = new_cache(model), model.get_input_embeddings()
    model(IDS, past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "forward", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(Unsupported, match="goes on at a number that is 40 more"):
        model(IDS[:, :1], position_ids=torch.tensor([[52], [52]]), past_key_values=cache)
    # past the model's own hook, attention looks by itself
    ids = torch.tensor([[52], [52]])
    with pytest.raises(Unsupported, match="goes on at a number that is 40 more"):
        model.model(input_ids=IDS[:, :1], position_ids=ids, past_key_values=cache)
    jumps = torch.arange(12)[None].clone()
    jumps[0, 6:] += 6
    with pytest.raises(Unsupported, match="packed documents"):
        model(IDS, position_ids=jumps, use_cache=False)


@torch.no_grad()
def test_arguments_by_place():
    model, mask = model_of(), mask_of("left")
    ids = (mask.cumsum(-1) - 1).clamp(min=0)
    want = model(input_ids=IDS, attention_mask=mask, position_ids=ids).logits
    assert torch.equal(model(IDS, mask, ids).logits, want)
    with pytest.raises(Unsupported, match="position_ids"):
        model(IDS, mask, ids * 2)


def test_what_follows_a_model_is_copied_and_goes_with_it():
    model = model_of()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert getattr(twin, UPDATE).model() is twin
    gone = weakref.ref(twin)
    del twin
    assert gone() is None or gc.collect()
    assert gone() is None
    restore(model)
    assert UPDATE not in vars(model)
