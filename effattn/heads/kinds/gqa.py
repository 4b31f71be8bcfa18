"""Key/value heads that query heads share: `mha`, `gqa(kv_heads=...)` and `mqa`."""

from __future__ import annotations

from functools import partial

from effattn.heads.kinds.base import Change, Kind, check_options, register

APART = ("model", "calibration", "bos", "progress")


@register("gqa")
class Gqa(Kind):
    """`kv_heads` of them, each for as many query heads."""

    @classmethod
    def change(cls, parts, spec, options):
        # at its use: what it imports is heavy, and most swaps have nothing to do with heads
        from effattn.heads.gqa import check_kv_heads, convert_gqa, job

        if cls.name == "gqa" and "kv_heads" not in options:
            raise ValueError(
                f"heads: got {spec!r}, kv_heads must be given, for example gqa(kv_heads=2)"
            )
        if cls.name != "gqa" and "kv_heads" in options:
            raise ValueError(f"heads: got {spec!r}, {cls.name} takes no kv_heads")
        if cls.name == "mha" and parts.kv_heads == parts.heads:
            return None
        check_options(cls.name, options, convert_gqa, *APART)
        given = {"kv_heads": 1 if cls.name == "mqa" else parts.heads, **options}
        check_kv_heads(given["kv_heads"], parts.kv_heads)
        parts.check_kv_heads(given["kv_heads"])
        convert, walked = partial(convert_gqa, **given), partial(job, **given)
        return Change(convert, walked, kv_heads=given["kv_heads"])


@register("mqa")
class Mqa(Gqa):
    """One for all query heads."""


@register("mha")
class Mha(Gqa):
    """One for each query head."""
