"""Rules that turn positions into rotations: what a backend's `rotary=` takes."""

from effattn.positions.rope import Rope

__all__ = ["Rope"]
