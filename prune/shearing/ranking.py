"""The ranking of gates by a criterion, before they are learned, and the text that it looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from effattn.calibration.layerwise import windows
from effattn.hf import anatomy as hf
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.masks import Masks
from effattn.prune.structural import criteria

WINDOWS = 64  # of text, at least: what criteria look at, and output modules are solved on


def ranked_by(criterion: str, axes: Iterable[str]) -> dict[str, str]:
    """Axis -> the criterion that ranks it: this one, or Taylor's where it does not know the axis.
    Axes that neither knows are left out."""
    known = {name: criteria.find(name).targets for name in (criterion, "taylor")}
    found = {axis: [name for name, targets in known.items() if axis in targets] for axis in axes}
    return {axis: names[0] for axis, names in found.items() if names}


def rank(masks: Masks, parts: hf.Anatomy, domains: Domains, criterion: str) -> None:
    """Ranks the gates that a criterion knows."""
    by_axis = ranked_by(criterion, masks.own)
    for name in dict.fromkeys(by_axis.values()):
        ranked = [axis for axis in by_axis if by_axis[axis] == name]
        importance = criteria.measure(name, parts, calibration_windows(domains), ranked)
        for axis in ranked:
            masks.rank(axis, getattr(importance, axis))


def calibration_windows(domains: Domains, least: int = 0) -> list[Tensor]:
    """Windows of the domains, int64 (4 or fewer, length) each: `WINDOWS`, or `least` tokens if that
    is more, as far as there is text. As many of each: in proportion, what a rare domain needs would
    count for little (the embedded model, cut to half: perplexity 26.1, and this way 24.3)."""
    wanted = max(WINDOWS, math.ceil(least / domains.length))
    batches = []
    for tokens in domains.train.values():
        count = min(math.ceil(wanted / len(domains.train)), len(tokens) // domains.length)
        batches += windows(tokens[: count * domains.length], domains.length, 4, domains.bos)
    return batches
