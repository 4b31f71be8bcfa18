"""Multi-query associative recall: pairs of words somewhere in a text, then one word after the other
is asked for its partner (MQAR, arXiv:2312.04927; here in prompts for a pretrained model, not in a
language of its own).

    effattn.evaluate.associative_recall(model, tokenizer, pairs=8, length=512)
"""

from __future__ import annotations

import keyword
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effattn.evaluate import retrieval
from effattn.evaluate.loss import Progress


def associative_recall(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[float] = retrieval.DEPTHS,
    *,
    pairs: int = 8,
    queries: int | None = None,
    trials: int = 8,
    filler: Tensor | None = None,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a model gives the right partner, by the depth at which the pairs lie in the text.

    length: tokens of a prompt, questions included. pairs: lines of two words, each one token, all
    different; `queries` of them (default: all) are asked for in another order, each with the true
    answers before it. trials, filler (None: the embedded corpus), batch, seed, bos: as for
    `passkey`.

    A row's "choice" is the share of questions where the right word is the most likely of the
    `pairs` on offer (guessing reaches 1 / pairs), "token_accuracy" where it is the most likely of
    the whole vocabulary; see `effattn.evaluate.retrieval.by_depth`. Raises ValueError as `passkey`
    does."""
    queries = pairs if queries is None else queries
    make = recall_prompts(
        tokenizer,
        length,
        depths,
        pairs=pairs,
        queries=queries,
        trials=trials,
        filler=filler,
        batch=batch,
        seed=seed,
    )
    found = retrieval.by_depth(
        "associative recall",
        model,
        depths,
        make,
        chance=1 / pairs,
        batch=batch,
        bos=bos,
        progress=progress,
    )
    return found | {
        "length": length,
        "trials": trials,
        "pairs": pairs,
        "queries": queries,
        "seed": seed,
    }


def recall_prompts(
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    pairs: int,
    queries: int,
    trials: int,
    filler: Tensor | None = None,
    batch: int = 1,
    seed: int,
) -> Callable[[float], retrieval.Prompts]:
    """depth -> the prompts of `associative_recall`, whose arguments and errors these are."""
    retrieval.check_settings(
        depths,
        length=(length, 1),
        pairs=(pairs, 2),
        queries=(queries, 1),
        trials=(trials, 1),
        batch=(batch, 1),
    )
    if queries > pairs:
        raise ValueError(
            f"queries: got {queries}, valid is at most pairs ({pairs}): each is asked for once"
        )
    # words of one token each: a question is then two tokens, and the answer one
    words, end = _words(tokenizer), retrieval.encode(tokenizer, "\n")
    if len(words) < 2 * pairs:
        raise ValueError(
            f"pairs: got {pairs}, the vocabulary has words of one token for {len(words) // 2}"
        )
    line = 2 + len(end)
    rest = length - pairs * line - queries * line - 2 * len(end)
    if rest < 0:
        raise ValueError(
            f"length: got {length}, the pairs and the questions alone take {length - rest} tokens"
        )
    if filler is None:
        from effattn import embedded

        filler = embedded.tokens("validation", 8 * length + 4096, tokenizer=tokenizer)
    hay = retrieval.stretches(filler, rest, trials, torch.Generator().manual_seed(seed))
    ends = retrieval.line_ends(tokenizer, filler)
    draw = random.Random(seed)
    # of each prompt: the first half of its words asks for the second
    drawn = [draw.sample(words, 2 * pairs) for _ in range(trials)]
    orders = [draw.sample(range(pairs), queries) for _ in range(trials)]
    new_line, asked = (
        torch.tensor(end, dtype=torch.long),
        torch.zeros(queries * line, dtype=torch.bool),
    )
    asked[1::line] = True  # of "word partner newline", the partner

    def make(depth: float) -> retrieval.Prompts:
        contexts, questions = [], []
        for straw, of, order in zip(hay, drawn, orders, strict=True):
            lines = torch.tensor([[of[i], of[pairs + i], *end] for i in range(pairs)])
            needle = torch.cat([new_line, lines.flatten()])
            contexts.append(torch.cat([retrieval.hide(straw, needle, depth, ends), new_line]))
            questions.append(lines[order].flatten())
        choices = torch.tensor([of[pairs:] for of in drawn])
        return retrieval.Prompts(torch.stack(contexts), torch.stack(questions), asked, choices)

    return make


def _words(tokenizer) -> list[int]:
    """Tokens that are a whole word with its space: lower case, ASCII, no keywords of Python."""
    special = set(tokenizer.all_special_ids)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    return [
        i
        for i, text in texts.items()
        if text.startswith(" ")
        and text[1:].isascii()
        and text[1:].isalpha()
        and text[1:].islower()
        and 3 <= len(text[1:]) <= 8
        and not keyword.iskeyword(text[1:])
    ]
