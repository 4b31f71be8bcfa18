"""The factors of `longrope`, found by an evolutionary search whose judge is what a model finds far
back (LongRoPE, arXiv:2402.13753, sections 3.2 and 4; LongRoPE2, arXiv:2502.20082, section 3).

    found = find(model, tokenizer, "longrope(length=4096, search=40)", 4096)
    effattn.swap(model, positions=found["spec"])

A candidate is R/2 factors, rounded to hundredths, that never fall from one frequency to the next
slower one: both papers' constraint, without which a search overfits its few prompts. LongRoPE2's
judge is the loss of the answers alone (needle-driven): most tokens of a text are told by their near
neighbours, whatever the factors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effattn.encoding import begun
from effattn.evaluate.logits import Scores
from effattn.evaluate.passkey_retrieval import passkey_prompts
from effattn.evaluate.recall import recall_prompts
from effattn.evaluate.retrieval import Prompts
from effattn.extending import planner
from effattn.extending.rules import Rule
from effattn.hf.beginning import bos_of
from effattn.hf.placement import input_device
from effattn.positions.base import Trained, spec_of
from effattn.positions.extrapolation import critical_dimension
from effattn.positions.registry import parse

Factors = tuple[float, ...]
POPULATION, PARENTS = 8, 4
DEPTHS = (0.1, 0.5, 0.9)  # of the needles
MUTATED = 0.3  # of the factors of a mutant, LongRoPE's probability
STEP = 0.2  # by which one of them grows or shrinks, the standard deviation of its logarithm


def candidates_of(spec: str | None) -> int:
    """How many a rule's spec asks to try; 0 for one that asks for no search."""
    if not spec or "search" not in spec:  # a name of the planner's, which is no spec yet
        return 0
    return sum(getattr(part, "search", 0) for part in parse(spec))


def first_spec(model: nn.Module, spec: str, target: int) -> str:
    """The spec with YaRN's factors in the place of `search=`: whatever refuses what will be found
    refuses it, too. ValueError for fewer candidates than a search starts from."""
    first, asked = starts(planner.of_model(model), target), candidates_of(spec)
    if asked < len(first):
        raise ValueError(
            f"longrope: search: got {asked}, valid is a number of candidates of at least "
            f"{len(first)}: those that it starts from"
        )
    return with_factors(spec, first["yarn"])


def with_factors(spec: str, factors: Factors) -> str:
    """The spec with these in the place of `search=`."""
    found = {"search": 0, "long_factor": list(factors)}
    return spec_of(
        tuple(replace(one, **found) if hasattr(one, "search") else one for one in parse(spec))
    )


def find(
    model: nn.Module,
    tokenizer,
    spec: str,
    target: int,
    *,
    style: str = "text",
    seed: int = 0,
    once: Callable[[str, Callable[[], float]], float] = lambda name, make: make(),
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """What `search` returns, with "spec", which has the factors in the place of `search=`, and
    "fresh": nats on other prompts of as many tokens, of what was found and of YaRN.

    spec: a rule with longrope(search=...), maybe joined with others; target: tokens of a prompt.
    style: of the passkey's text. once(name, make): what make gives, remembered by its name
    (`Parts.once`). The model is as it was afterwards."""
    trained = planner.of_model(model)
    model.eval()

    def nats(positions: str, seed: int) -> float:
        prompts = needles(tokenizer, target, DEPTHS, 1, style, seed)
        with Rule("candidate", {"positions": positions}).on(model):
            return answer_nats(model, prompts)

    def judge(factors: Factors) -> float:
        return once(f"factors/{factors}", lambda: nats(with_factors(spec, factors), seed))

    found = search(
        starts(trained, target),
        judge,
        candidates=candidates_of(spec),
        least=1.0,
        most=2 * target / trained.length,
        seed=seed,
        progress=progress,
    )
    best = with_factors(spec, tuple(found["factors"]))
    others = {"found": best, "yarn": f"yarn(length={target})"}
    fresh = {
        name: once(f"fresh/{name}", lambda rule=rule: nats(rule, seed + 1))
        for name, rule in others.items()
    }
    return found | {"spec": best, "fresh": fresh}


def starts(trained: Trained, target: int) -> dict[str, Factors]:
    """The first candidates by name: PI, NTK and YaRN as factors, and LongRoPE2's NTK up to a
    critical frequency and the whole stretch beyond, where that frequency is the theory's or one or
    two faster ones (what a model has really learned ends earlier)."""
    scale, half = target / trained.length, trained.dims // 2
    theory = critical_dimension(trained.base, trained.dims, trained.length) // 2
    found = {}
    for name in ("pi", "ntk", "yarn"):
        (part,) = parse(f"{name}(length={target})")
        ratio = trained.thetas() / part.frequencies(trained)[0]
        found[name] = ordered(ratio.tolist())
    for critical in {max(1, theory - less) for less in (0, 1, 2)}:
        factors = [scale ** min(1.0, place / critical) for place in range(half)]
        found[f"critical-{critical}"] = ordered(factors)
    return found


def ordered(factors: Sequence[float]) -> Factors:
    """Rounded, and no factor below an earlier one."""
    rising, least = [], 0.0
    for factor in factors:
        least = max(least, round(factor, 2))
        rising.append(least)
    return tuple(rising)


def search(
    starts: Mapping[str, Factors],
    judge: Callable[[Factors], float],
    *,
    candidates: int,
    least: float,
    most: float,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """{"factors", "nats", "generations", "candidates", "starts"}: the best of `candidates` judged
    ones, its judgement, the best of each generation, how many there were, and {name: judgement} of
    where it started.

    judge(factors): the lower the better. Every generation has `POPULATION` new candidates: half are
    mutants of one of the `PARENTS` best, half children of two of them. Factors stay between least
    and most. Each candidate depends on the seed and the judgements before it alone: with a judge
    that remembers (`effattn.resuming.Parts`), a stopped search goes on where it was."""
    draw, judged = random.Random(seed), {}

    def judge_one(factors: Factors) -> None:
        if factors not in judged:
            judged[factors] = judge(factors)
            if progress:
                progress(len(judged), candidates)

    for factors in starts.values():
        judge_one(factors)
    best = [min(judged.values())]
    for _ in range(candidates):  # generations, at most: one may have nothing new
        if len(judged) >= candidates:
            break
        parents = sorted(judged, key=judged.get)[:PARENTS]
        for number in range(min(POPULATION, candidates - len(judged))):
            if number % 2:
                child = crossed(*draw.sample(parents, 2), draw) if len(parents) > 1 else parents[0]
            else:
                child = mutated(draw.choice(parents), draw)
            judge_one(ordered([min(max(factor, least), most) for factor in child]))
        best.append(min(judged.values()))
    factors = min(judged, key=judged.get)
    return {
        "factors": list(factors),
        "nats": judged[factors],
        "generations": best,
        "candidates": len(judged),
        "starts": {name: judged[one] for name, one in starts.items()},
    }


def mutated(factors: Factors, draw: random.Random) -> list[float]:
    """Some of the factors, at least one, larger or smaller."""
    chosen = [draw.random() < MUTATED for _ in factors]
    chosen[draw.randrange(len(factors))] = True
    return [
        factor * math.exp(draw.gauss(0.0, STEP)) if change else factor
        for factor, change in zip(factors, chosen, strict=True)
    ]


def crossed(one: Factors, other: Factors, draw: random.Random) -> list[float]:
    """Each factor from one of two parents."""
    return [draw.choice(pair) for pair in zip(one, other, strict=True)]


def needles(
    tokenizer, length: int, depths: Sequence[float], trials: int, style: str, seed: int
) -> list[Prompts]:
    """What candidates are judged by: associative recall of 4 pairs and a passkey of 5 digits, in
    prompts of `length` tokens, `trials` of each at every depth."""
    asked = {"trials": trials, "seed": seed}
    tasks = (
        recall_prompts(tokenizer, length, depths, pairs=4, queries=4, **asked),
        passkey_prompts(tokenizer, length, depths, digits=5, style=style, **asked),
    )
    return [make(depth) for make in tasks for depth in depths]


@torch.no_grad()
def answer_nats(model: nn.Module, prompts: Sequence[Prompts]) -> float:
    """Nats of an answer's token, the mean over all prompts: each read whole, with the true answers
    before it, without a cache. The model is in eval mode."""
    beginning, device, found = bos_of(model), input_device(model), []
    for one in prompts:
        ids = torch.cat([begun(one.context, beginning), one.question], dim=1).to(device)
        asked = one.context.shape[1] + one.asked.nonzero()[:, 0].to(device)
        for row in ids[:, None]:
            found.append(_nats(model, row, asked))
    return torch.cat(found).double().mean().item()


def _nats(model: nn.Module, ids: Tensor, asked: Tensor) -> Tensor:
    """ids (1, T); asked (A,): places of the tokens that are answers. (A,) nats."""
    first = int(asked[0]) - 1  # told by the token before
    scores = Scores.of(model, ids[:, :-1], slice(first, None))
    logits = torch.cat([scores.logits(at) for at in scores.pieces()])[asked - 1 - first]
    return F.cross_entropy(logits, ids[0, asked], reduction="none").cpu()
