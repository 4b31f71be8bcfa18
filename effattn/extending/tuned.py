"""Rules after some fine-tuning: the loss against the tokens tuned on, and how far a base reaches.

    rules = to_tune(trained, 2048)
    row = tuned(rules[1], model, tokens, sequences, lengths=(512, 2048), target=2048, ...)

Each rule tunes a copy of the model at whole windows of the target, with a constant learning rate
after its warm-up, as PI (arXiv:2306.15595) and YaRN (arXiv:2309.00071) do: every point of a curve
is then what a tuning that ends there gives. Lengths are in tokens, losses in nats a token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from effattn.evaluate.curve import scores, token_scores
from effattn.evaluate.loss import Progress
from effattn.extending import planner, texts
from effattn.extending.rules import Rule
from effattn.extending.tuning import default_lr, tune
from effattn.positions.base import Trained
from effattn.positions.extrapolation import critical_dimension, extrapolation_limit

NAMES = ("none", "pi", "ntk", "yarn", "abf")  # what can be tuned; "none" keeps the rotation
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
# A rate that stays makes no end of its own noise: of the rate that `tune` takes and then lowers, a
# quarter. With all of it the embedded model as it is goes from 2.958 to 3.136 nats in windows of
# 512 after 51,200 tokens in windows of 2,048. PI and YaRN take a 15th of the pretraining's.
SHARE = 0.25


@dataclass(frozen=True)
class Tuning:
    """What the tunings of one comparison have in common: tokens (N,) int64 to train on, how many of
    them, the learning rate (None: `SHARE` of `default_lr`), the seed."""

    tokens: Tensor
    train_tokens: int
    lr: float | None = None
    seed: int = 0

    def run(
        self, model: nn.Module, window: int, folder: Path, overrides: dict | None = None, **more
    ) -> dict:
        """`tune` at whole windows, which count their positions from 0."""
        width = model.get_input_embeddings().weight.shape[1]
        return tune(
            model,
            self.tokens,
            target=window,
            window=window,
            train_tokens=self.train_tokens,
            folder=folder,
            sampling=None,
            lr=self.lr or SHARE * default_lr(width),
            seed=self.seed,
            overrides=CONSTANT | (overrides or {}),
            **more,
        )


def to_tune(trained: Trained, target: int) -> list[Rule]:
    """The rules of `NAMES` for reading `target` tokens; transformers has all of them, so that a
    tuned model stays plain. ABF's base is the one that the law of RoPE extrapolation asks for."""
    turned = critical_dimension(trained.base, trained.dims, trained.length)
    base = planner.base_for(trained, target, turned)
    specs = {
        "none": "rope",
        "pi": f"pi(length={target})",
        "ntk": f"ntk(length={target})",
        "yarn": f"yarn(length={target})",
        "abf": f"abf(base={base:.0f}, length={target})",
    }
    return [Rule(name, {"positions": specs[name]}) for name in NAMES]


def tuned(
    rule: Rule,
    model: nn.Module,
    tuning: Tuning,
    sequences: Tensor,
    lengths: Sequence[int],
    target: int,
    folder: Path,
    progress: Progress | None = None,
) -> dict:
    """One rule's curve: {"name", "axes", "target", "tokens", "steps", "seconds", "speed",
    "learning_rate", "curve"}; a point of the curve is {"tokens", "lengths": [{"length",
    "cross_entropy", "perplexity", "accuracy"}]}.

    sequences: int64 (n, T + 1), T a multiple of each of `lengths`: the same held-out tokens are
    read in windows of each. The model itself stays as it is. folder: the tuning's checkpoints, from
    which the same call goes on."""

    def measured() -> dict:
        found = []
        for length in lengths:
            rows = texts.windows(sequences, length)
            found.append({"length": length, **scores(*token_scores(learner, rows))})
        return {"lengths": found}

    with rule.on(copy.deepcopy(model)) as learner:
        told = tuning.run(learner, target, folder, evaluate=measured, progress=progress)
    names = ("tokens", "steps", "seconds", "speed", "learning_rate", "curve")
    return {
        "name": rule.name,
        "axes": rule.axes,
        "target": target,
        **{name: told[name] for name in names},
    }


def reach(
    base: float,
    trained: Trained,
    model: nn.Module,
    tuning: Tuning,
    sequences: Tensor,
    folder: Path,
    progress: Progress | None = None,
) -> dict:
    """How far the model holds after tuning at its trained length T with another base, beside what
    the scaling law of RoPE extrapolation says (arXiv:2310.05209, theorem 3): {"base", "tokens",
    "predicted", "measured", "rows"}.

    sequences: int64 (n, S + 1), S a multiple of T. A row is T positions of whole sequences:
    {"first", "last", "cross_entropy", "fresh"}, the last of the same tokens in windows of T.
    measured: the end of the last row before the first in which the context that is longer than T
    does harm, `held`."""
    length = trained.length
    with Rule("abf", {"positions": f"abf(base={base})"}).on(copy.deepcopy(model)) as learner:
        told = tuning.run(learner, length, folder, progress=progress)
        whole, _ = token_scores(learner, sequences)
        fresh, _ = token_scores(learner, texts.windows(sequences, length))
    fresh = fresh.reshape(whole.shape)
    rows = [
        {
            "first": at,
            "last": at + length,
            "cross_entropy": whole[:, at : at + length].double().mean().item(),
            "fresh": fresh[:, at : at + length].double().mean().item(),
        }
        for at in range(0, whole.shape[1], length)
    ]
    law = extrapolation_limit(trained.base, trained.dims, length, base, length)
    return {
        "base": base,
        "tokens": told["tokens"],
        "predicted": law,
        "measured": held(rows),
        "rows": rows,
    }


def held(rows: Sequence[dict]) -> int:
    """The end of the last row before the first whose tokens are predicted worse from all that came
    before than in windows of the trained length. The first row is such a window itself."""
    last = rows[0]["last"]
    for row in rows[1:]:
        if row["cross_entropy"] > row["fresh"]:
            break
        last = row["last"]
    return last


def bases(trained: Trained, times: Sequence[int]) -> list[float]:
    """The base that the law asks for to read so many trained lengths, for each of `times`."""
    turned = critical_dimension(trained.base, trained.dims, trained.length)
    return [planner.base_for(trained, one * trained.length, turned) for one in times]
