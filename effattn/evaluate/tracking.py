"""Variable tracking after RULER (arXiv:2404.06654): which variables have a value, through a chain
of assignments.

    effattn.evaluate.variable_tracking(model, tokenizer, hops=2, length=1024)

It asks for several places at once that only content connects: each line names what the line before
it defined."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from effattn.errors import check_choice
from effattn.evaluate import retrieval
from effattn.evaluate.lines import filler_of, split, uniform
from effattn.evaluate.loss import Progress

STYLES = {  # the first line of a chain, the others, and what is asked
    "text": (
        "VAR {name} = {value}\n",
        "VAR {name} = VAR {before}\n",
        "\nFind all variables that are assigned the value {value}. They are:",
    ),
    "code": (
        "    {name} = {value}\n",
        "    {name} = {before}\n",
        "\n    # the variables that are {value}:",
    ),
}


def variable_tracking(
    model,
    tokenizer,
    length: int = 512,
    depths: Sequence[float] = retrieval.DEPTHS,
    *,
    hops: int = 4,
    chains: int = 1,
    letters: int = 5,
    trials: int = 8,
    style: str = "text",
    filler: Tensor | None = None,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Progress | None = None,
) -> dict:
    """How often a model names all variables of a chain, in their order, by where the chain starts.

    length: tokens of a prompt, the answer included. A chain is one line that gives a variable a
    number and `hops` lines that hand it on, the first at the depth, the others anywhere behind it;
    `chains` of them, of which one is asked for. Names have `letters` capital letters. style: "text"
    or "code". trials, filler (None: the embedded corpus), batch, seed, bos: as for
    `effattn.evaluate.passkey`. Returns a dict of `effattn.evaluate.retrieval.by_depth`: "exact"
    needs every token of every name. Raises ValueError for settings that mean nothing, and for a
    length that is too short."""
    make = tracking_prompts(
        tokenizer,
        length,
        depths,
        hops=hops,
        chains=chains,
        letters=letters,
        trials=trials,
        style=style,
        filler=filler,
        batch=batch,
        seed=seed,
    )
    found = retrieval.by_depth(
        "variable tracking", model, depths, make, batch=batch, bos=bos, progress=progress
    )
    more = {
        "length": length,
        "trials": trials,
        "hops": hops,
        "chains": chains,
        "style": style,
        "seed": seed,
    }
    return found | more


def tracking_prompts(
    tokenizer,
    length: int,
    depths: Sequence[float],
    *,
    hops: int,
    chains: int,
    letters: int,
    trials: int,
    style: str,
    filler: Tensor | None = None,
    batch: int = 1,
    seed: int,
) -> Callable[[float], retrieval.Prompts]:
    """depth -> the prompts of `variable_tracking`, whose arguments and errors these are."""
    first, then, ask = STYLES[check_choice("style", style, STYLES)]
    retrieval.check_settings(
        depths,
        length=(length, 1),
        hops=(hops, 0),
        chains=(chains, 1),
        letters=(letters, 2),
        trials=(trials, 1),
        batch=(batch, 1),
    )
    filler = filler_of(tokenizer, filler, length)
    ends = torch.isin(filler, retrieval.line_ends(tokenizer, filler)).nonzero().flatten() + 1

    def chain_of(chance: random.Random) -> tuple[str, list[str], list[str]]:
        """(its value, its names, its lines)."""
        value = str(chance.randrange(10_000, 100_000))
        names = [
            "".join(chance.choices(string.ascii_uppercase, k=letters)) for _ in range(hops + 1)
        ]
        lines = [first.format(name=names[0], value=value)]
        lines += [then.format(name=name, before=before) for before, name in pairwise(names)]
        return value, names, lines

    def draw(chance: random.Random, depth: float) -> tuple[list[int], list[int]]:
        """(everything before the answer, the answer)."""
        made = [chain_of(chance) for _ in range(chains)]
        value, names, _ = made[0]
        question, answer = split(
            tokenizer, ask.format(value=value), "".join(f" {name}" for name in names)
        )
        lines = [[retrieval.encode(tokenizer, line) for line in lines] for _, _, lines in made]
        rest = (
            length
            - len(question)
            - len(answer)
            - sum(len(line) for chain in lines for line in chain)
        )
        if rest < 0:
            raise ValueError(
                f"length: got {length}, the chains and the question alone take {length - rest} "
                "tokens"
            )
        # filler from a line's end on, of the length that is left
        start = int(ends[chance.randrange(max(1, int((ends < len(filler) - rest).sum())))])
        hay = filler[start : start + rest]
        # where lines may stand
        cuts = [0, *(ends[(ends > start) & (ends < start + rest)] - start).tolist()]
        # the first line of the asked chain at the depth, the others in order anywhere behind it
        placed: list[tuple[int, list[int]]] = []
        for number, chain in enumerate(lines):
            low = cuts[round((depth if number == 0 else chance.random()) * (len(cuts) - 1))]
            later = [cut for cut in cuts if cut >= low]
            placed += zip([low, *sorted(chance.choices(later, k=hops))], chain, strict=True)
        whole: list[int] = []
        for (cut, line), before in zip(
            ordered := sorted(placed, key=lambda one: one[0]),
            [0, *(cut for cut, _ in ordered)],
            strict=False,
        ):
            whole += hay[before:cut].tolist() + line
        return whole + hay[ordered[-1][0] :].tolist() + question, answer

    return lambda depth: uniform(
        length, trials, random.Random(f"{seed} {depth}"), lambda chance: draw(chance, depth)
    )
