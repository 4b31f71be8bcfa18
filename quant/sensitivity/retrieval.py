"""Whether a model still finds, with a cache that is quantized, what was said far back."""

from __future__ import annotations

from collections.abc import Sequence

from effattn.evaluate.loss import Progress
from effattn.evaluate.passkey_retrieval import passkey
from effattn.evaluate.recall import associative_recall
from effattn.hf import anatomy
from effattn.quant.sensitivity.lanes import Lane

PASSKEY = "passkey"
TASKS = (PASSKEY, "associative recall")


def ask(
    task: str,
    lane: Lane,
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    trials: int,
    style: str,
    seed: int,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """One of `TASKS` at `length` tokens: a dict of `effattn.evaluate.retrieval.by_depth`. Where the
    prompt does not fit, or the tokenizer has no words for it, {"rows": [], "reason": why}."""
    styled = {"style": style} if task == PASSKEY else {}
    task_of = passkey if task == PASSKEY else associative_recall
    try:
        return task_of(
            lane.model,
            tokenizer,
            length,
            depths,
            trials=trials,
            seed=seed,
            bos=bos,
            progress=progress,
            **styled,
        )
    except ValueError as error:
        return {"rows": [], "reason": str(error)}


def packed(lane: Lane, length: int) -> int:
    """How many tokens of a prompt of `length` are packed at its end: of the format that packs
    most."""
    formats = lane.formats(anatomy.of(lane.model))
    return max((one.held(length)[1] for one in formats if one is not None), default=0)
