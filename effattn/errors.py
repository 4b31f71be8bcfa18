"""Errors that name the argument, what it got, what is valid, and the nearest valid name."""

from __future__ import annotations

from effattn.kernels.errors import check_choice

__all__ = ["Unsupported", "check_choice"]


class Unsupported(ValueError):
    """What was asked is well formed, but this model or method cannot do it. Says why and what can
    be done.
    """
