"""What is found again in a long prompt: a pass key, and pairs of words."""

from __future__ import annotations

from bench.real.steps import Place, Step, Subject

ORDER = 7
DEPTHS = (0.1, 0.5, 0.9)
AXES = {
    "as it is": {},
    "int4 cache": {"cache": "int4"},
    "int2 cache": {"cache": "int2"},
    "sliding(window=512, sinks=4)": {"pattern": "sliding(window=512, sinks=4)"},
}


def asked(place: Place, axes: dict[str, str], length: int, trials: int) -> dict:
    """Both tasks after a swap of `axes`."""
    from effattn.evaluate import associative_recall, passkey
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import swap
    from effattn.textdata import measured_on

    model, tokenizer = load_model(place.model)
    filler, _ = measured_on(tokenizer, 8 * length, text=[place.held_out])
    if axes:
        swap(model, **axes)
    how = {"length": length, "depths": DEPTHS, "trials": trials}
    keys = passkey(model, tokenizer, **how)
    pairs = associative_recall(model, tokenizer, pairs=4, filler=filler, **how)
    return {
        "length": length,
        "trials": trials * len(DEPTHS),
        "passkey": _mean(keys, "exact"),
        "recall": _mean(pairs, "choice"),
    }


def _mean(found: dict, measure: str) -> float:
    return sum(row[measure] for row in found["rows"]) / len(found["rows"])


def step(name: str, length: int, trials: int) -> Step:
    """A swap at a length of prompts, `trials` at each depth."""
    settings = {"axes": AXES[name], "length": length, "trials": trials}
    return Step(f"{name}, {length:,}", asked, settings)


SUBJECT = Subject(
    "Retrieval from a prompt",
    [
        step("as it is", 1024, trials=4),
        step("int4 cache", 1024, trials=4),
        step("int2 cache", 1024, trials=4),
        step("sliding(window=512, sinks=4)", 1024, trials=4),
        step("as it is", 4096, trials=1),
    ],
    {
        "prompts a task": lambda found: str(found["trials"]),
        "pass keys found": lambda found: f"{found['passkey']:.0%}",
        "partners found (chance 25 %)": lambda found: f"{found['recall']:.0%}",
    },
)
