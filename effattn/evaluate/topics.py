"""Topic retrieval after LongEval (Li et al. 2023, "How long can open-source LLMs truly promise on
context length?"): a long conversation turns from topic to topic, and one of them is asked for.

    effattn.evaluate.topic_retrieval(model, tokenizer, length=4096, topics=10)

Unlike a line, a topic is asked for by its place in the conversation, which nothing near it tells.
LongEval asks for the first; so does depth 0. Its conversations were written by a model; ours are
drawn from seeds, with stretches of a text as what is said of a topic.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effattn.evaluate import retrieval
from effattn.evaluate.lines import filler_of, split, uniform
from effattn.evaluate.loss import Progress

BEGIN = "A record of a conversation between USER and ASSISTANT about {count} topics.\n"
TURN = "USER: I would like to discuss {topic}.\nASSISTANT: Sure.\n"
ASK = "USER: What is the {ordinal} topic that we discussed?\nASSISTANT: The {ordinal} topic was"
PLACES = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth"
)
WHAT = "history price future art science colour sound trade taste use"
OF = (
    "water glass bread music money paper stone light silver coffee cotton language medicine sleep "
    "steel tea winter salt horses"
)
ORDINALS = PLACES.split()
TOPICS = [f"the {what} of {thing}" for what, thing in itertools.product(WHAT.split(), OF.split())]


def topic_retrieval(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[float] = retrieval.DEPTHS,
    *,
    topics: int = 5,
    trials: int = 16,
    filler: Tensor | None = None,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a model gives the name of a topic, by its place (depth 0: the first, 1: the last).

    length: tokens of a prompt, the answer included. topics: of a conversation, 2 to 16. trials:
    prompts at each depth, `batch` of them at a time. filler: (N,) int64 tokens that what is said
    of a topic comes from (None: the embedded corpus). The same seed gives the same prompts. bos: as
    in `effattn.perplexity`. Returns a dict of `effattn.evaluate.retrieval.by_depth`: "exact" needs
    every token of the name. Raises ValueError for settings that mean nothing."""
    make = topic_prompts(
        tokenizer,
        length,
        depths,
        topics=topics,
        trials=trials,
        filler=filler,
        batch=batch,
        seed=seed,
    )
    found = retrieval.by_depth(
        "topic retrieval", model, depths, make, batch=batch, bos=bos, progress=progress
    )
    return found | {"length": length, "trials": trials, "topics": topics, "seed": seed}


def topic_prompts(
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    topics: int,
    trials: int,
    filler: Tensor | None = None,
    batch: int = 1,
    seed: int,
) -> Callable[[float], retrieval.Prompts]:
    """depth -> the prompts of `topic_retrieval`, whose arguments and errors these are."""
    retrieval.check_settings(
        depths, length=(length, 1), topics=(topics, 2), trials=(trials, 1), batch=(batch, 1)
    )
    if topics > len(ORDINALS):
        raise ValueError(f"topics: got {topics}, valid is at most {len(ORDINALS)}")
    text = filler_of(tokenizer, filler, length)
    begin = retrieval.encode(tokenizer, BEGIN.format(count=topics))
    end = retrieval.encode(tokenizer, "\n")

    def draw(chance: random.Random, depth: float) -> tuple[list[int], list[int]]:
        """(everything before the answer, the answer), together `length` tokens."""
        names = chance.sample(TOPICS, topics)
        place = round(depth * (topics - 1))
        question, answer = split(tokenizer, ASK.format(ordinal=ORDINALS[place]), f" {names[place]}")
        turns = [retrieval.encode(tokenizer, TURN.format(topic=name)) for name in names]
        taken = len(begin) + sum(map(len, turns)) + topics * len(end) + len(question) + len(answer)
        room = length - taken
        if room < 0:
            raise ValueError(
                f"length: got {length}, the topics and the question alone take {taken} tokens"
            )
        # what is said of a topic: about as much of each
        sizes = [room * (i + 1) // topics - room * i // topics for i in range(topics)]
        generator = torch.Generator().manual_seed(chance.getrandbits(32))
        said = [retrieval.stretches(text, size, 1, generator)[0].tolist() for size in sizes]
        whole = [[*turn, *words, *end] for turn, words in zip(turns, said, strict=True)]
        return [*begin, *itertools.chain(*whole), *question], answer

    return lambda depth: uniform(
        length, trials, random.Random(f"{seed} {depth}"), lambda chance: draw(chance, depth)
    )
