"""Other ways to the shape of a sheared model, to compare it with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effattn.prune.shearing.ranking import WINDOWS
from effattn.prune.structural.removal import structured


def from_scratch(small: nn.Module, seed: int) -> nn.Module:
    """A model like `small`, with random weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(small.config), dtype=small.dtype)
    return made.to(small.device).eval()


def cut_at_once(
    parent: nn.Module,
    wanted: dict[str, int],
    criterion: dict[str, str],
    texts: dict[str, Tensor],
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """`parent` cut by structured pruning, and its output modules solved again. wanted: axis -> what
    stays; criterion: axis -> what ranks it; texts: int64 tokens by domain, of which as many windows
    of `length` are looked at as the masks' ranking looks at."""
    windows = -(-WINDOWS // len(texts))
    calibration = torch.cat([tokens[: windows * length] for tokens in texts.values()])
    how = {"criterion": criterion, "length": length, "progress": progress}
    return structured(parent, calibration, **how, **wanted)[0]


def joined(before: dict | None, facts: dict) -> dict:
    """Two stages' facts as one: tokens of both, and the record of one after the other."""
    if before is None:
        return facts
    later = [point | {"tokens": before["tokens"] + point["tokens"]} for point in facts["record"]]
    return facts | {
        "tokens": before["tokens"] + facts["tokens"],
        "record": before["record"] + later,
    }
