"""What a joint low rank keeps where heads share no more: of keys and values, and of projections."""

from __future__ import annotations

from bench.real.numbers import QUALITY, excess, quality
from bench.real.steps import Place, Step, Subject, Target, recipe

ORDER = 2
READ = {"calibration_tokens": 16384, "evaluation_tokens": 4096}
LENGTH = 512


def take(data: dict) -> dict:
    """Of the report."""
    return quality(data, "converted") | {"bytes": data["kv_bytes_per_token"]}


CONVERT = recipe("convert_latent", take, decode_contexts=(), length=LENGTH)


def lowrank(
    place: Place, *, projections: str, calibration_tokens: int, evaluation_tokens: int
) -> dict:
    """Cross-entropies before and after a swap of the projections."""
    import copy

    import effattn
    from effattn.evaluate.loss import compare, measure_parent
    from effattn.surgery.checkpoint import load_model
    from effattn.textdata import streams

    parent, tokenizer = load_model(place.model)
    text = streams(
        tokenizer,
        train=calibration_tokens,
        evaluation=evaluation_tokens,
        text=list(place.text),
        evaluation_text=[place.held_out],
    )
    before = measure_parent(parent, text, LENGTH)
    student = copy.deepcopy(parent)
    calibration = text.train[:calibration_tokens]
    effattn.swap(student, projections=projections, calibration=calibration)
    after = compare(parent, student, text.evaluation, LENGTH)
    return quality({"quality": before | {"converted": after}}, "converted")


def most(step: str, nats: float) -> Target:
    """A step's excess."""
    return Target(
        f"{step}: excess nats a token, no training",
        nats,
        lambda steps: excess(steps[step]) if step in steps else None,
    )


SUBJECT = Subject(
    "Latent keys and values, and low rank, untrained",
    [
        Step("latent, 1.33x fewer bytes", CONVERT, READ | {"ratio": 0.75}),
        Step("latent, 2x fewer bytes", CONVERT, READ | {"ratio": 0.5}),
        Step(
            "lowrank, .75 of the projections",
            lowrank,
            READ | {"projections": "lowrank(ratio=0.75)"},
        ),
    ],
    QUALITY,
    [
        most("latent, 1.33x fewer bytes", 0.06),
        most("latent, 2x fewer bytes", 0.3),
        most("lowrank, .75 of the projections", 0.1),
    ],
    note="Latents with ranks chosen by layer, and the O re-fit; low rank is of q, k, v and o.",
)
