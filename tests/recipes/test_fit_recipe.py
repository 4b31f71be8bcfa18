"""What `effattn fit` refuses before it loads anything."""

from __future__ import annotations

import pytest

from effattn.recipes.fit import Settings, check


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"bytes": "60%", "kv_bytes_per_token": "50%", "frontier": True},
            "frontier: got limits of bytes, kv_bytes_per_token; a curve goes along one, valid is",
        ),
        ({"tokens_per_s": "120%", "frontier": True}, "frontier: got limits of tokens_per_s; "),
        ({"bytes": "60%", "frontier": True, "recover_tokens": 9}, "recover_tokens: got 9 with"),
        ({}, "budget: got no limit"),
        ({"bytes": "60%", "allow": ("head",)}, "allow: got 'head'.*heads"),
        ({"bytes": "60%", "forbid": ("cach",)}, "forbid: got 'cach'.*cache"),
        ({"bytes": "60%", "allow": ("cache",), "keep": "cache"}, "no axis is left to search"),
        ({"bytes": "60%", "keep": "wieghts"}, "keep: got 'wieghts'.*weights"),
        ({"bytes": "60 gigs"}, "bytes: unit: got 'gigs'"),
        ({"bytes": "60%", "context": 0}, "context: got 0"),
        ({"bytes": "60%", "batch": 0}, "batch: got 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        check(Settings(output=tmp_path / "out", **given))
    assert not list(tmp_path.iterdir())


def test_one_limit_makes_a_curve(tmp_path):
    for name in ("bytes", "kv_bytes_per_token", "weight_bytes", "parameters"):
        assert check(Settings(output=tmp_path / "out", frontier=True, **{name: "60%"})).given
