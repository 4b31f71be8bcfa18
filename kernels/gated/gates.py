"""How far a gate may go, which the fast paths' products rely on."""

from __future__ import annotations

# Log of the strongest decay of a step. Within a chunk of 16 tokens the products of e^G_i and e^-G_j
# are made around its middle, so that no factor is beyond e^(8 * 5): fp32 ends at e^88.
LOWEST = -5.0
CHUNK = 64  # tokens that are seen at once, where a head has one decay
BY_FEATURE = 16  # the same where each feature has its own
