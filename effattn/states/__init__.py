"""What a backend remembers between calls: everything, a ring, sums, buckets, summaries.

`base` is what every state can do (its tokens, rows, sizes and owner); a member of the family is one
file.
"""

from effattn.states.base import State
from effattn.states.full import FullState, RingState, first_positions

__all__ = ["FullState", "RingState", "State", "first_positions"]
