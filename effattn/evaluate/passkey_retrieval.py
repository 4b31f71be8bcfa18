"""Passkey retrieval: a number hidden in a long text is asked for at its end (arXiv:2305.16300,
section 4.2).

    effattn.evaluate.passkey(model, tokenizer, length=4096)      # for models of English
    effattn.evaluate.passkey(model, tokenizer, style="code")     # for models of source code
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.errors import check_choice
from effattn.evaluate import retrieval
from effattn.evaluate.loss import Progress


@dataclass(frozen=True)
class Style:
    """How the key is hidden and asked for; `answer` follows the question. `filler` None: text of
    the corpus.
    """

    needle: str
    question: str
    answer: str
    filler: str | None


STYLES = {
    "text": Style(
        "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        " {key}",
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back "
        "again. ",
    ),
    "code": Style("\n" + 3 * "    PASSKEY = {key}\n", "\n    PASSKEY =", " {key}", None),
}


def passkey(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[float] = retrieval.DEPTHS,
    *,
    trials: int = 16,
    digits: int = 5,
    style: str = "text",
    filler: Tensor | None = None,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a model finds a hidden number, by the depth where it is hidden (0: at the start, 1:
    at the end).

    length: tokens of a prompt, the answer included. digits: of a key. trials: prompts at each
    depth, each with a key and filler of its own; `batch` of them at a time. style: "text" or
    "code". filler: tokens int64 (N,) to hide the key in; None: the style's own (the paper's
    sentences, or the embedded corpus). The same seed gives the same prompts. bos: as in
    `effattn.perplexity`.

    The context goes through the cache that `generate()` would use, the question and the answer
    (teacher-forced) a token at a time. Returns a dict of `effattn.evaluate.retrieval.by_depth`:
    "exact" needs every token of the answer. Raises ValueError for settings that mean nothing, and
    for prompts that do not fit into `length`."""
    make = passkey_prompts(
        tokenizer,
        length,
        depths,
        trials=trials,
        digits=digits,
        style=style,
        filler=filler,
        batch=batch,
        seed=seed,
    )
    found = retrieval.by_depth(
        "passkey", model, depths, make, batch=batch, bos=bos, progress=progress
    )
    return found | {
        "length": length,
        "trials": trials,
        "style": style,
        "digits": digits,
        "seed": seed,
    }


def passkey_prompts(
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    trials: int,
    digits: int,
    style: str,
    filler: Tensor | None = None,
    batch: int = 1,
    seed: int,
) -> Callable[[float], retrieval.Prompts]:
    """depth -> the prompts of `passkey`, whose arguments and errors these are."""
    look = STYLES[check_choice("style", style, STYLES)]
    retrieval.check_settings(
        depths, length=(length, 1), trials=(trials, 1), digits=(digits, 1), batch=(batch, 1)
    )
    # Needles may differ in tokens, prompts may not: the filler gets what a needle leaves.
    keys = _keys(tokenizer, look, digits, trials, seed)
    longest = max(len(needle) for needle, _, _ in keys)
    rest = length - longest - len(keys[0][1]) - len(keys[0][2])
    if rest < 0:
        raise ValueError(
            f"length: got {length}, the key and the question alone take {length - rest} tokens"
        )
    filler = _filler(tokenizer, look, length) if filler is None else filler
    hay = retrieval.stretches(filler, rest + longest, trials, torch.Generator().manual_seed(seed))
    ends = retrieval.line_ends(tokenizer, filler)

    def make(depth: float) -> retrieval.Prompts:
        hidden = [
            retrieval.hide(straw[: rest + longest - len(needle)], torch.tensor(needle), depth, ends)
            for straw, (needle, _, _) in zip(hay, keys, strict=True)
        ]
        context = torch.cat(
            [torch.stack(hidden), torch.tensor([question for _, question, _ in keys])], dim=1
        )
        answers = torch.tensor([answer for _, _, answer in keys])
        return retrieval.Prompts(context, answers, torch.ones(answers.shape[1], dtype=torch.bool))

    return make


def _keys(
    tokenizer, look: Style, digits: int, trials: int, seed: int
) -> list[tuple[list, list, list]]:
    """(needle, question, answer) in tokens of every trial. All answers have one length, as the
    batch needs: keys whose digits the tokenizer groups otherwise than usual are drawn again."""
    draw = random.Random(seed)
    groups: dict[object, list] = collections.defaultdict(list)
    question = retrieval.encode(tokenizer, look.question)
    for _ in range(64 * trials):
        key = str(draw.randrange(10 ** (digits - 1), 10**digits))
        # the answer as it is behind its question, since tokenizers merge over the border
        whole = retrieval.encode(tokenizer, look.question + look.answer.format(key=key))
        shared = next(
            (i for i, (a, b) in enumerate(zip(whole, question, strict=False)) if a != b),
            len(question),
        )
        needle = retrieval.encode(tokenizer, look.needle.format(key=key))
        # the first group that is full is the usual way of writing a number
        same = groups[shared, len(whole)]
        same.append((needle, whole[:shared], whole[shared:]))
        if len(same) == trials:
            return same
    raise ValueError(
        f"digits: the tokenizer writes numbers of {digits} digits in too many ways; try fewer"
    )


def _filler(tokenizer, look: Style, length: int) -> Tensor:
    if look.filler is None:
        from effattn import embedded

        return embedded.tokens("validation", 8 * length + 4096, tokenizer=tokenizer)
    # twice the length: every prompt begins somewhere else in it
    once = retrieval.encode(tokenizer, look.filler)
    return torch.tensor(once * (2 * length // len(once) + 2))
