"""The old name of `effattn.training.uptrain`, for scripts that import it from here."""

from effattn.training.uptrain import uptrain

__all__ = ["uptrain"]
