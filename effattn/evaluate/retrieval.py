"""What retrieval tasks share: a long context goes into a model's cache, then a question, one token
at a time.

A task makes `Prompts`, `answer` feeds them, `by_depth` asks for both and turns what came out into
rows. The question's tokens are decoding steps, so that a compressed cache is read as `generate()`
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from effattn.encoding import begun
from effattn.evaluate import DEPTHS as DEPTHS
from effattn.evaluate.loss import Progress
from effattn.hf.beginning import bos_of
from effattn.hf.cache import new_cache
from effattn.hf.last_logits import last_only
from effattn.hf.placement import input_device

D = TypeVar("D", bound=float)  # a share of the text; a whole number where a task counts otherwise
LINES = 64  # tokens that a needle may move back for a line's end


@dataclass(frozen=True)
class Prompts:
    """n prompts of one shape. context (n, N) and question (n, Q): int64 token ids; asked (Q,):
    bool, which of the question's tokens are answers (the others are given). choices (n, C): the
    tokens on offer, where there are any."""

    context: Tensor
    question: Tensor
    asked: Tensor
    choices: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """For each asked token, (n, A): whether it was the most likely of all, and of those on offer
    (None where nothing is); and its negative log-likelihood in nats, given the true answers before
    it."""

    exact: Tensor
    chosen: Tensor | None
    nats: Tensor


@torch.no_grad()
def answer(
    model,
    prompts: Prompts,
    *,
    batch: int = 8,
    chunk: int = 512,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Feeds `batch` prompts at a time through the cache that `generate()` would use: the context in
    chunks, then the question token by token. bos: whether BOS takes the place of its first token
    (None: as the model's tokenizer does it)."""
    beginning = bos_of(model, bos)
    device, training, last = input_device(model), model.training, last_only(model)
    found: list[tuple[Tensor, ...]] = []  # of each batch
    model.eval()
    try:
        for start in range(0, len(prompts.context), batch):
            rows = slice(start, start + batch)
            context = begun(prompts.context[rows], beginning).to(device)
            question = prompts.question[rows].to(device)
            choices = None if prompts.choices is None else prompts.choices[rows].to(device)
            # the context in chunks, so that its attention needs memory for one of them; `logits` is
            # always of the next token to come
            cache = new_cache(model)
            for piece in context.split(chunk, dim=1):
                logits = model(
                    input_ids=piece, past_key_values=cache, use_cache=True, **last
                ).logits[:, -1]
            judged = []
            for place, asked in enumerate(prompts.asked.tolist()):
                truth = question[:, place]
                # judged before the true token goes in: teacher forcing, so that one wrong token of
                # an answer does not spoil the others
                if asked:
                    judged.append(_judge(logits.float(), truth, choices))
                logits = model(
                    input_ids=truth[:, None], past_key_values=cache, use_cache=True
                ).logits[:, -1]
            found.append(tuple(torch.stack(part, dim=1) for part in zip(*judged, strict=True)))
            if progress:
                progress(min(start + batch, len(prompts.context)), len(prompts.context))
    finally:
        model.train(training)
    exact, nats, *chosen = (torch.cat(part) for part in zip(*found, strict=True))
    return Answers(exact, chosen[0] if chosen else None, nats)


def _judge(logits: Tensor, truth: Tensor, choices: Tensor | None) -> tuple[Tensor, ...]:
    """logits (n, V), truth (n,) -> exact (n,), nats (n,), and with choices (n, C) chosen (n,); on
    the CPU.
    """
    found = [
        logits.argmax(-1) == truth,
        torch.nn.functional.cross_entropy(logits, truth, reduction="none"),
    ]
    if choices is not None:
        best = logits.gather(1, choices).argmax(1, keepdim=True)
        found.append(choices.gather(1, best)[:, 0] == truth)
    return tuple(one.cpu() for one in found)


def by_depth(
    task: str,
    model,
    depths: Sequence[D],
    make: Callable[[D], Prompts],
    *,
    chance: float = 0.0,
    batch: int = 8,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """The result of a task: a row for every depth, whose prompts `make` draws and `answer` feeds,
    and whether the model can do it at all.

    Row: depth, trials, exact (share of prompts whose answers are all the most likely tokens),
    token_accuracy, choice (share of answers that beat the others on offer), nats (of an answer
    token, mean), learned. `chance` is what guessing reaches. Learned: at least halfway from chance
    to 1 where there is a choice, else half of the prompts."""
    rows = []
    for number, depth in enumerate(depths):
        found = answer(model, make(depth), batch=batch, bos=bos)
        row = {
            "depth": depth,
            "trials": len(found.exact),
            "exact": found.exact.all(1).double().mean().item(),
            "token_accuracy": found.exact.double().mean().item(),
            "choice": None if found.chosen is None else found.chosen.double().mean().item(),
            "nats": found.nats.double().mean().item(),
        }
        rows.append(row | {"learned": score(row) >= (1 + chance) / 2})
        if progress:
            progress(number + 1, len(depths))
    return {
        "task": task,
        "chance": chance,
        "rows": rows,
        "score": sum(map(score, rows)) / len(rows),
    }


def score(row: dict) -> float:
    """The number that says how well a row went: the choice where there is one, else the exact
    answers.
    """
    return row["exact"] if row["choice"] is None else row["choice"]


def check_settings(depths: Iterable[float], **least: tuple[int, int]) -> None:
    """ValueError for depths outside of 0 to 1, and for `name=(value, least)` below the least."""
    depths = list(depths)
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"depths: got {depths}, valid are numbers from 0 (start) to 1 (right before the "
            "question)"
        )
    for name, (value, low) in least.items():
        if type(value) is not int or value < low:
            raise ValueError(f"{name}: got {value!r}, valid is a whole number of at least {low}")


def stretches(filler: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random stretches of `length` tokens of `filler` (N,), (count, length). ValueError if
    it is too short.
    """
    if filler.dtype != torch.int64 or filler.dim() != 1 or len(filler) < length + 1:
        raise ValueError(
            f"filler: got {filler.dtype} {tuple(filler.shape)}, valid is int64 (N,) with more "
            f"than {length:,} tokens"
        )
    starts = torch.randint(len(filler) - length, (count,), generator=generator)
    return torch.stack([filler[start : start + length] for start in starts.tolist()])


def hide(filler: Tensor, needle: Tensor, depth: float, line_ends: Tensor) -> Tensor:
    """`needle` inside `filler` (N,), at `depth` of it, behind the nearest line's end before that if
    one is near.
    """
    # behind a line's end a needle is a line of its own, as it would be in a real text
    cut = round(depth * len(filler))
    near = filler[max(0, cut - LINES) : cut]
    ends = torch.isin(near, line_ends).nonzero().flatten()
    cut = cut - len(near) + int(ends[-1]) + 1 if len(ends) else cut
    return torch.cat([filler[:cut], needle, filler[cut:]])


def line_ends(tokenizer, filler: Tensor) -> Tensor:
    """The tokens of `filler` that end a line."""
    return torch.tensor(
        [i for i in filler.unique().tolist() if tokenizer.decode([i]).endswith("\n")],
        dtype=torch.long,
    )


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without BOS or EOS."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
