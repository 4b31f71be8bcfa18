"""Whether a model has learned to copy at all, within its trained length: without that, no rule can
show it further.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effattn.errors import check_choice
from effattn.evaluate.curve import token_scores
from effattn.evaluate.loss import Progress
from effattn.evaluate.passkey_retrieval import passkey
from effattn.evaluate.recall import associative_recall
from effattn.evaluate.retrieval import score
from effattn.extending.texts import repeated

TASKS = ("recall", "passkey")
PAIRS = 4  # of associative recall
UNSURE = 8  # first tokens of a copy, at most: nothing says yet that it is one


def copy_check(
    model: nn.Module, sequences: Tensor, trained: int, progress: Progress | None = None
) -> dict:
    """Text that repeats with a quarter of the trained length: accuracy on its first copy and on the
    later ones.

    The first tokens of each copy are left out. `errors_gone` says what that means.
    """
    period = trained // 4
    _, right = token_scores(model, repeated(sequences[:, : trained + 1], period), progress=progress)
    place = torch.arange(trained) + 1  # of the predicted token
    copy, inside = place // period, place % period >= min(UNSURE, period // 4)
    first, later = (
        right[:, inside & chosen].double().mean().item() for chosen in (copy == 0, copy > 0)
    )
    return {"period": period, "first": first, "later": later}


def errors_gone(found: dict) -> float:
    """The share of the first copy's errors that later copies do not make."""
    return 1 - (1 - found["later"]) / max(1 - found["first"], 1e-9)


def ask(
    task: str,
    model: nn.Module,
    tokenizer,
    length: int,
    depths,
    trials: int,
    style: str,
    seed: int,
    progress: Progress | None = None,
) -> dict:
    """One of `TASKS` at `length` tokens: a dict of `effattn.evaluate.retrieval.by_depth`."""
    check_choice("task", task, TASKS)
    if task == "recall":
        return associative_recall(
            model,
            tokenizer,
            length,
            depths,
            pairs=PAIRS,
            trials=trials,
            seed=seed,
            progress=progress,
        )
    return passkey(
        model, tokenizer, length, depths, trials=trials, style=style, seed=seed, progress=progress
    )


def best_task(found: dict[str, dict]) -> tuple[str, bool]:
    """Of the tasks' results, (the one that went best above guessing, whether it is learned at half
    of the depths).
    """
    above = {
        name: sum(score(row) - one["chance"] for row in one["rows"]) / len(one["rows"])
        for name, one in found.items()
    }
    name = max(above, key=above.get)
    rows = found[name]["rows"]
    return name, 2 * sum(row["learned"] for row in rows) >= len(rows)
