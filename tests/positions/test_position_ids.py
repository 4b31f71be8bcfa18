"""position_ids of a swapped model: those of a row's real tokens are honoured by every rule and
cache, whatever the padding, and what cannot be is refused by name."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.surgery.swapping import swap

AXES = {
    "dense": {"pattern": "dense"},
    "sinks": {"pattern": "sliding(window=5, sinks=3)"},
    "window": {"pattern": "sliding(window=5)"},
    "summaries": {"pattern": "fixed(stride=8)"},
    "first tokens": {"pattern": "longformer(window=5, global_tokens=2)"},
    "sums": {"pattern": "linear"},
    "buckets": {"pattern": "lsh(rounds=2, buckets=4, chunk=4)"},
    "blocks": {"pattern": "topk(window=5, block=4, blocks=2)"},
    "rerope": {"positions": "rerope(window=8)"},
    "leaky": {"positions": "leaky_rerope(window=8, k=4)"},
    "logn": {"positions": "logn"},
    "xpos": {"positions": "xpos"},
    "alibi": {"positions": "alibi"},
    "kerple": {"positions": "kerple"},
    "sandwich": {"positions": "sandwich"},
    "t5": {"positions": "t5"},
    "dynamic ntk": {"positions": "dynamic_ntk(factor=4)"},
    "dynamic yarn": {"positions": "dynamic_yarn"},
    "packed": {"cache": "int8(residual=16, group=16)"},
    "packed before its turn": {"cache": "int8(residual=16, group=16, pre_rope=True)"},
    "packed first tokens": {"cache": "int8(residual=0, group=16, first=3)"},
    "packed ring": {
        "pattern": "sliding(window=5, sinks=3)",
        "cache": "int8(residual=16, group=16)",
    },
}
OWN = (
    "sinks",
    "rerope",
    "logn",
    "xpos",
    "alibi",
    "dynamic ntk",
    "dynamic yarn",
    "packed before its turn",
)


def swapped(axis: str):
    model = tiny("llama", max_position_embeddings=16)
    try:
        return swap(model, **AXES[axis])
    except (ValueError, Unsupported) as error:
        pytest.fail(str(error))


def batch():
    """Two rows of 30 tokens: one padded on the left, in the middle and on the right, and one in the
    middle.
    """
    tokens = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :2] = mask[0, 12:20] = mask[0, 27:] = mask[1, 14:18] = 0
    return tokens.masked_fill(mask == 0, 0), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def close(axis: str, got, want):
    """Packed numbers are rounded by the place of their group, which padding moves."""
    atol = 2e-2 if "packed" in axis else 1e-5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("chunks", [(30,), (12, 9, 1, 1, 1, 1, 5)])
def test_padding_anywhere_changes_nothing(axis, chunks):
    if axis.startswith("dynamic") and len(chunks) > 1:
        pytest.skip("its angles depend on how long the sequence is at each call")
    model = swapped(axis)
    tokens, mask, ids = batch()
    alone = [
        model(tokens[row : row + 1, mask[row].bool()], use_cache=False).logits[0]
        for row in range(2)
    ]
    cache, parts, at = effattn.new_cache(model), [], 0
    for size in chunks:
        new = slice(at, at + size)
        at += size
        out = model(
            tokens[:, new],
            attention_mask=mask[:, :at],
            position_ids=ids[:, new],
            past_key_values=cache,
        )
        parts.append(out.logits)
    for row, want in enumerate(alone):
        close(axis, torch.cat(parts, dim=1)[row, mask[row].bool()], want)


@torch.no_grad()
@pytest.mark.parametrize("axis", OWN)
def test_the_same_number_more_for_all_of_a_row(axis):
    """Rules that go by distance; in one call, and in one that goes on."""
    model = swapped(axis)
    tokens, mask, ids = batch()
    tokens, mask, ids = tokens[1:, :14], mask[1:, :14], ids[1:, :14]
    want = model(tokens, attention_mask=mask, position_ids=ids).logits
    cache = effattn.new_cache(model)
    calls = (
        (slice(0, 9), slice(9, 14))
        if model.config.num_hidden_layers and axis not in ("logn", "alibi")
        else (slice(0, 14),)
    )
    parts = [
        model(
            tokens[:, one],
            attention_mask=mask[:, : one.stop],
            position_ids=ids[:, one] + 7,
            past_key_values=cache,
        )
        for one in calls
    ]
    close(axis, torch.cat([part.logits for part in parts], dim=1), want)


@torch.no_grad()
@pytest.mark.parametrize("axis", OWN)
@pytest.mark.parametrize("how", ["gap", "swapped", "twice", "restart"])
def test_other_numbers_are_refused(axis, how):
    model = swapped(axis)
    tokens, mask, ids = batch()
    ids = ids.clone()
    if how == "gap":
        ids[1, 5:] += 3
    elif how == "swapped":
        ids[1, [4, 5]] = ids[1, [5, 4]]
    elif how == "twice":
        ids[1, 5] = ids[1, 4]
    else:
        ids[1, 18:] -= ids[1, 18].item()
    with pytest.raises(Unsupported, match="position_ids"):
        model(tokens, attention_mask=mask, position_ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("axis", OWN)
@pytest.mark.parametrize("size", [1, 4])
def test_going_on_at_another_number_is_refused(axis, size):
    model = swapped(axis)
    tokens, _, _ = batch()
    cache = effattn.new_cache(model)
    model(tokens[:, :8], past_key_values=cache)
    ids = torch.arange(8, 8 + size)[None]
    with pytest.raises(
        Unsupported, match="position_ids: row 0 goes on at a number that is 40 more"
    ):
        model(tokens[:, 8 : 8 + size], position_ids=ids + 40, past_key_values=cache)
    assert cache.get_seq_length() == 8
    model(tokens[:, 8 : 8 + size], position_ids=ids, past_key_values=cache)


@torch.no_grad()
def test_ids_that_a_model_makes_by_default_count_padding_in_the_middle():
    model = swapped("rerope")
    tokens, mask, _ = batch()
    with pytest.raises(Unsupported, match=r"valid are attention_mask.cumsum\(-1\) - 1"):
        model(tokens, attention_mask=mask)
    left = torch.ones_like(mask)
    left[0, :5] = 0
    torch.testing.assert_close(
        model(tokens, attention_mask=left).logits[left.bool()],
        model(tokens, attention_mask=left, position_ids=(left.cumsum(-1) - 1).clamp(min=0)).logits[
            left.bool()
        ],
    )
