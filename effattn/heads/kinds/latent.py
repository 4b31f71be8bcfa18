"""`latent(rank=...)`: of a token, r numbers are remembered, of which keys and values come."""

from __future__ import annotations

from functools import partial

from effattn.heads.kinds.base import Change, Kind, check_options, register

APART = ("model", "calibration", "bos", "progress")


@register("latent")
class LatentHeads(Kind):
    """`rank`, `bytes`, `ratio` or `energy` says how much is remembered."""

    @classmethod
    def change(cls, parts, spec, options):
        # at its use: what it imports is heavy, and most swaps have nothing to do with heads
        from effattn.heads.latent.convert import check_latent, convert_weights, job

        check_options(cls.name, options, convert_weights, *APART)
        check_latent(parts, **options)
        convert, walked = partial(convert_weights, **options), partial(job, **options)
        return Change(convert, walked, latent=True)
