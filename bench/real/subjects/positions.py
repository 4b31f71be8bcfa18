"""Position rules half as far again as the model was trained: one window of 12,288 tokens."""

from __future__ import annotations

from bench.real.numbers import shown
from bench.real.steps import Place, Step, Subject

ORDER = 6
TRAINED = 8192
RULES = {
    "as it is": None,
    "yarn": "yarn(factor=2.0)",
    "dynamic NTK": "dynamic_ntk(factor=1.0)",
    "dynamic PI": "dynamic_pi",
    "dynamic YaRN": "dynamic_yarn",
    "NTK": "ntk(factor=2.0)",
    "ReRoPE": "rerope(window=2048)",
    "interpolation": "pi(factor=2.0)",
}


def measured(place: Place, rule: str | None, evaluation_tokens: int) -> dict:
    """One window, and its cross-entropy within the trained length and past it."""
    from effattn.evaluate.curve import token_scores
    from effattn.extending.texts import long_sequences
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import swap
    from effattn.textdata import read_files

    model, tokenizer = load_model(place.model)
    text = read_files([place.held_out])
    tokens = long_sequences(text, tokenizer, 1, evaluation_tokens)
    if rule is not None:
        swap(model, positions=rule)
    nats = token_scores(model, tokens)[0][0].double()
    parts = {"within": nats[:TRAINED], "past": nats[TRAINED:]}
    means = {name: float(part.mean()) if len(part) else None for name, part in parts.items()}
    return {"tokens": len(nats), "trained": TRAINED} | means


SUBJECT = Subject(
    "Position rules past the trained length, untrained",
    [
        Step(name, measured, {"rule": rule, "evaluation_tokens": 12288})
        for name, rule in RULES.items()
    ],
    {
        "tokens": lambda found: f"{found['tokens']:,}",
        "perplexity up to 8,192": lambda found: shown(found["within"]),
        "from there on": lambda found: shown(found["past"]),
    },
)
