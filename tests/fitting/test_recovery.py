"""What can be trained back of a plan, and what not."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny

from effattn.fitting.building import finish
from effattn.fitting.plan import Plan
from effattn.fitting.recovery import NOTHING, recover, trainable
from effattn.fitting.speed import mock
from effattn.hf import anatomy
from effattn.projections.packed import layers_of
from effattn.surgery.swapping import active


@pytest.fixture(scope="module")
def parent():
    return tiny("llama", dtype=torch.float32)


@pytest.mark.parametrize(
    ("field", "value", "seen"),
    [
        ("kv_heads", 2, True),
        ("kv_heads", 0, True),
        ("latent", 16, True),
        ("window", 32, True),
        ("ffn", 48, True),
        ("ffn_weights", "lowrank(ratio=0.5)", True),
        ("ffn_weights", "2:4", True),
        ("ffn_weights", "nf4", False),
        ("attention_weights", "int8", False),
        ("cache", "int8", False),
    ],
)
def test_what_training_sees(parent, field, value, seen):
    plan = Plan.of(anatomy.of(parent))
    assert trainable(plan.with_field(field, value, [1]), plan) is seen


def test_nothing_to_recover_is_said(parent):
    own = Plan.of(anatomy.of(parent))
    plan = own.with_field("cache", "int8(group=16)").with_field("ffn_weights", "nf4")
    student, told = recover(parent, plan, own, lambda *_: pytest.fail("trained"))
    assert student is parent
    assert told == {"tokens": 0, "reason": NOTHING}


def test_the_student_has_the_windows_and_its_own_weights(parent):
    """Packed values do not train; what is hung on for training is taken off again."""
    parts = anatomy.of(parent)
    own = Plan.of(parts)
    plan = own.with_field("window", 32, [0]).with_field("ffn_weights", "2:4", [1])
    ledger = type("Ledger", (), {"parts": parts, "parent": own})
    shaped = mock(ledger, plan.with_field("window", None))
    before = copy.deepcopy(parent.state_dict())

    def train(student, parameters):
        assert set(active(student).specs) == {0}
        values = {id(one.values) for one in layers_of(student).values()}
        assert len(values) == 3
        assert values.isdisjoint(map(id, parameters))
        with torch.no_grad():
            for one in parameters:
                one.add_(1)
        return {"tokens": 5}

    student, told = recover(shaped, plan, own, train)
    assert told == {"tokens": 5}
    assert active(student) is None
    assert all(torch.equal(one, before[name]) for name, one in parent.state_dict().items())
    assert set(active(finish(student, plan, own)).specs) == {0}
