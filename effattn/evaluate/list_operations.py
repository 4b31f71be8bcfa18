"""ListOps (arXiv:1804.06028; in Long Range Arena, arXiv:2011.04006): the value of a nested
expression of digits.

    # a language model, by examples
    effattn.evaluate.listops(model, tokenizer, depths=(1, 2, 3))
    # (text, value), to train on
    effattn.evaluate.listops_examples(1000, depth=10, arguments=10, seed=0)

MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10): "[MAX 2 9 [MIN 4 7 ] 0 ]" is 9.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch

from effattn.evaluate import retrieval
from effattn.evaluate.lines import split
from effattn.evaluate.loss import Progress

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
NESTED = 0.25  # chance that an argument is an expression itself, where it may be one


def listops_examples(
    count: int,
    *,
    depth: int = 10,
    arguments: int = 10,
    least: int = 1,
    most: int = 2000,
    seed: int = 0,
) -> list[tuple[str, int]]:
    """`count` expressions and their values, 0 to 9. depth: how deep they nest, exactly. arguments:
    of an operation, 2 up to this many. least, most: symbols of an expression (Long Range Arena: 500
    to 2000), brackets included.

    Raises ValueError for settings that mean nothing, and where no expression has that many symbols.
    """
    limits = {
        "count": (count, 1),
        "depth": (depth, 1),
        "arguments": (arguments, 2),
        "least": (least, 1),
        "most": (most, least),
    }
    retrieval.check_settings((0,), **limits)
    chance, found = random.Random(seed), []
    for _ in range(1000 * count):
        text, value = _expression(chance, depth, arguments)
        if least <= len(text.split()) <= most:
            found.append((text, value))
            if len(found) == count:
                return found
    raise ValueError(
        f"least, most: got {least} and {most}, expressions of depth {depth} hardly ever have so "
        "many symbols"
    )


def listops(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[int] = (1, 2, 3),
    *,
    arguments: int = 5,
    trials: int = 16,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a language model gives an expression's value, by how deep the expression nests.

    A prompt is `length` tokens of solved expressions of the same depth, the first one cut, and one
    to solve: "[MAX 2 9 [MIN 4 7 ] 0 ] = 9". A row's "choice" is the share of prompts where the
    right digit is the most likely of the ten (guessing: 1 in 10); see
    `effattn.evaluate.retrieval.by_depth`, whose depth is the nesting here. bos: as in
    `effattn.perplexity`. Raises ValueError for
    settings that mean nothing, and for a tokenizer that needs several tokens for a digit."""
    make = listops_prompts(
        tokenizer, length, depths, arguments=arguments, trials=trials, batch=batch, seed=seed
    )
    found = retrieval.by_depth(
        "listops", model, depths, make, chance=0.1, batch=batch, bos=bos, progress=progress
    )
    return found | {"length": length, "trials": trials, "arguments": arguments, "seed": seed}


def listops_prompts(
    tokenizer,
    length: int,
    depths: Sequence[int],
    *,
    arguments: int,
    trials: int,
    batch: int = 1,
    seed: int,
) -> Callable[[int], retrieval.Prompts]:
    """nesting depth -> the prompts of `listops`, whose arguments and errors these are."""
    if not depths or any(type(depth) is not int or depth < 1 for depth in depths):
        raise ValueError(f"depths: got {list(depths)}, valid are whole numbers of at least 1")
    retrieval.check_settings(
        (0,), length=(length, 16), arguments=(arguments, 2), trials=(trials, 1), batch=(batch, 1)
    )
    digits = [split(tokenizer, "[MAX 1 2 ] =", f" {digit}")[1] for digit in range(10)]
    if any(len(one) != 1 for one in digits):
        raise ValueError(
            "tokenizer: got several tokens for ' = 7', the task needs one for each digit"
        )
    choices = torch.tensor([one[0] for one in digits])

    def make(depth: int) -> retrieval.Prompts:
        chance, contexts, answers = random.Random(f"{seed} {depth}"), [], []
        for _ in range(trials):
            text, value = _expression(chance, depth, arguments)
            before: list[int] = []
            question = retrieval.encode(tokenizer, f"{text} =")
            if len(question) + 1 > length:
                raise ValueError(
                    f"length: got {length}, an expression of depth {depth} takes "
                    f"{len(question) + 1}"
                )
            while len(before) + len(question) + 1 < length:
                shot, its = _expression(chance, depth, arguments)
                before = retrieval.encode(tokenizer, f"{shot} = {its}\n") + before
            contexts.append((before + question)[len(before) + len(question) + 1 - length :])
            answers.append([int(choices[value])])
        asked = torch.ones(1, dtype=torch.bool)
        return retrieval.Prompts(
            torch.tensor(contexts), torch.tensor(answers), asked, choices.expand(trials, -1)
        )

    return make


def _expression(chance: random.Random, depth: int, arguments: int) -> tuple[str, int]:
    """An operation that nests exactly `depth` deep, as text, and its value."""
    name = chance.choice(list(OPERATIONS))
    count = chance.randint(2, arguments)
    # one argument nests as deep as it must, so that the depth is exact; others may nest less
    deepest, parts = chance.randrange(count), []
    for place in range(count):
        if depth > 1 and (place == deepest or chance.random() < NESTED):
            parts.append(
                _expression(
                    chance,
                    depth - 1 if place == deepest else chance.randint(1, depth - 1),
                    arguments,
                )
            )
        else:
            digit = chance.randrange(10)
            parts.append((str(digit), digit))
    return f"[{name} {' '.join(text for text, _ in parts)} ]", OPERATIONS[name](
        [value for _, value in parts]
    )
