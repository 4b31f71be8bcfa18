"""What loading costs is measured of every form, each in a process of its own."""

from __future__ import annotations

import pytest

from bench import loading


@pytest.mark.slow
def test_every_form_is_loaded_beside_the_plain_class(tmp_path, monkeypatch):
    monkeypatch.setitem(loading.SIZES, "large", loading.SIZES["small"])
    found = loading.measure(tmp_path, 1)
    assert list(found["rows"]) == ["the plain class", *loading.FORMS]
    for row in found["rows"].values():
        assert row["seconds"] > 0
        assert row["weights"] > 0
    assert found["rows"]["packed 2:4"]["weights"] < found["rows"]["plain"]["weights"]
    assert found["rows"]["the plain class"]["time_beside_plain"] == 0


@pytest.mark.slow
def test_a_form_that_does_not_load_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was not loaded"):
        loading.load(tmp_path / "nothing", tmp_path / "nothing", "plain")
