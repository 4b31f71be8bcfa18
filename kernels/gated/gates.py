"""How far a gate may go, which the fast paths' products rely on."""

from __future__ import annotations

LOWEST = -5.0  # log of the strongest decay of a step
CHUNK = 64  # tokens that are seen at once, where a head has one decay
BY_FEATURE = 16  # the same where each feature has its own
# Within such a chunk e^G_i is e^-80 at least and e^-G_j e^80 at most; fp32 ends at e^-87 and e^88.
# With half of that taken from each there is room for features of any size. A power of two, so that
# nothing is rounded: a middle of the chunk's own gates would let the future into the rounding.
HALF = 2.0**58
