"""Line retrieval after LongChat (Li et al. 2023): one of many lines, each a name and a number, is
asked for.

    effattn.evaluate.line_retrieval(model, tokenizer, length=4096)

Unlike a passkey, the line stands among lines just like it, so that finding it needs its name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effattn.errors import check_choice
from effattn.evaluate import retrieval
from effattn.evaluate.loss import Progress

STYLES = {  # what a line is; the question is a line up to its value
    "text": ("line {name}: REGISTER_CONTENT is <", "{value}", ">\n"),
    "code": ("    register_{name} =", " {value}", "\n"),
}


def line_retrieval(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[float] = retrieval.DEPTHS,
    *,
    trials: int = 16,
    digits: int = 5,
    style: str = "text",
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a model gives the number of a line, by the line's depth (0: the first, 1: the
    last).

    length: tokens of a prompt, the answer included: as many lines as that takes, the first one cut.
    trials: prompts at each depth, `batch` of them at a time. digits: of a number. style: "text"
    (LongChat's lines) or "code". The same seed gives the same prompts. bos: as in
    `effattn.perplexity`. Returns a dict of
    `effattn.evaluate.retrieval.by_depth`: "exact" needs every token of the number. Raises
    ValueError for settings that mean nothing."""
    make = line_prompts(
        tokenizer, length, depths, trials=trials, digits=digits, style=style, batch=batch, seed=seed
    )
    found = retrieval.by_depth(
        "line retrieval", model, depths, make, batch=batch, bos=bos, progress=progress
    )
    return found | {
        "length": length,
        "trials": trials,
        "style": style,
        "digits": digits,
        "seed": seed,
    }


def line_prompts(
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    trials: int,
    digits: int,
    style: str,
    batch: int = 1,
    seed: int,
) -> Callable[[float], retrieval.Prompts]:
    """depth -> the prompts of `line_retrieval`, whose arguments and errors these are."""
    ask, value, end = STYLES[check_choice("style", style, STYLES)]
    retrieval.check_settings(
        depths, length=(length, 64), trials=(trials, 1), digits=(digits, 1), batch=(batch, 1)
    )

    def draw(chance: random.Random, depth: float) -> tuple[list[int], list[int]]:
        """(everything before the answer, the answer)."""
        names: dict[str, str] = {}
        lines: list[list[int]] = []
        while sum(map(len, lines)) < length:
            name = str(chance.randrange(10**6))
            if name not in names:
                names[name] = str(chance.randrange(10 ** (digits - 1), 10**digits))
                lines.append(
                    retrieval.encode(
                        tokenizer, ask.format(name=name) + value.format(value=names[name]) + end
                    )
                )
        # The prompt is cut at its start: lines may be asked for that are whole behind the cut, with
        # room for the question (16 tokens are more than it takes).
        room, whole = (length - len(lines[0]) - 16, 0)
        while whole < len(lines) and sum(map(len, lines[-whole - 1 :])) <= room:
            whole += 1
        place = len(lines) - whole + round(depth * (whole - 1))
        name = list(names)[place]
        question, answer = split(tokenizer, ask.format(name=name), value.format(value=names[name]))
        return [token for line in lines for token in line] + question, answer

    return lambda depth: uniform(
        length, trials, random.Random(f"{seed} {depth}"), lambda chance: draw(chance, depth)
    )


def split(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """A question and its answer in tokens, as they are when both stand together."""
    # tokenizers merge over the border, so that the answer alone would be other tokens
    whole, alone = (
        retrieval.encode(tokenizer, question + answer),
        retrieval.encode(tokenizer, question),
    )
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone)
    )
    return whole[:shared], whole[shared:]


def uniform(
    length: int,
    trials: int,
    chance: random.Random,
    draw: Callable[[random.Random], tuple[list[int], list[int]]],
) -> retrieval.Prompts:
    """`trials` drawn prompts of `length` tokens each, the answer included, cut at the start; all
    answers have one number of tokens, as a batch needs: others are drawn again. ValueError where
    that does not come about."""
    # cut at the start, which is the oldest text; a batch needs answers of one size
    by_size: dict[int, list[tuple[list[int], list[int]]]] = {}
    for _ in range(64 * trials):
        before, answer = draw(chance)
        if len(before) + len(answer) < length:
            continue
        same = by_size.setdefault(len(answer), [])
        same.append((before[len(before) + len(answer) - length :], answer))
        if len(same) == trials:
            context, answers = (torch.tensor(part) for part in zip(*same, strict=True))
            return retrieval.Prompts(
                context, answers, torch.ones(answers.shape[1], dtype=torch.bool)
            )
    raise ValueError(
        f"length: {trials} prompts of {length} tokens with answers of one size did not come about"
    )


def filler_of(tokenizer, filler: Tensor | None, length: int) -> Tensor:
    """The text to hide things in: `filler`, or as much as needed of the embedded corpus."""
    if filler is None:
        from effattn import embedded

        filler = embedded.tokens("validation", 8 * length + 4096, tokenizer=tokenizer)
    return filler
