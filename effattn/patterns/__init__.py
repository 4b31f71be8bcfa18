"""The backends, one file each. Importing this package registers them all."""

from effattn.patterns import dense

__all__ = ["dense"]
