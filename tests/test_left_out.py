"""Methods that are left out on purpose say so by name, and what to take is there."""

from __future__ import annotations

import pytest

import effattn
from effattn.errors import Unsupported
from effattn.left_out import LEFT_OUT, left_out
from effattn.specs import parse_spec

ASK = {"backend": effattn.backend, "positions": effattn.positions.parse}
MEMBERS = {"backend": effattn.backends(), "positions": effattn.positions.rules()}
ROWS = [(axis, name) for axis, members in LEFT_OUT.items() for name in members]


@pytest.mark.parametrize(("axis", "name"), ROWS)
def test_asking_for_it_says_why(axis, name):
    one = left_out(axis, name)
    with pytest.raises(Unsupported) as refusal:
        ASK[axis](name)
    said = str(refusal.value)
    assert said.startswith(f"{axis}: {one.title} (")
    assert one.reason in said
    assert "\n" not in said


@pytest.mark.parametrize(("axis", "name"), ROWS)
def test_what_to_take_is_there_and_it_is_not(axis, name):
    assert name not in MEMBERS[axis]
    if instead := left_out(axis, name).instead:
        first = instead.split(",")[0].split(" ")[0]
        assert parse_spec(first.partition("(")[0])[0] in MEMBERS[axis]


def test_names_that_nobody_published_are_unknown():
    assert left_out("backend", "lunar") is None
    with pytest.raises(ValueError, match="did you mean"):
        effattn.backend("sldng")
