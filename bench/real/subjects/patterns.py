"""Patterns without training, along a stream of the length that the model was trained for."""

from __future__ import annotations

from bench.real.numbers import shown
from bench.real.steps import Step, Subject, Target, recipe
from effattn.evaluate.loss import perplexity_of

ORDER = 5
SINKS = "sliding(window=512, sinks=4)"
READ = {"stream_tokens": 8192}
PATTERNS = (
    SINKS,
    "block(block=512, look_back=1)",
    "longformer(window=512, global_tokens=4)",
    "strided(stride=128)",
    "lsh(rounds=4)",
    "topk(window=256, sinks=4, block=32, blocks=16)",
)


def take(data: dict) -> dict:
    """Of the pattern that was asked for: its stream beside the model's own in fresh windows, and
    beside the same pattern without its sinks where it has any."""
    streams = {one["role"]: one["stream"] for one in data["runs"]}
    run = streams["pattern"]
    bare = mean(streams["baseline"]) if "baseline" in streams else None
    return {
        "tokens": run["tokens"],
        "window": data["reference"]["context"],
        "bos": data["settings"]["bos"],
        "before": mean(data["reference"]),
        "after": mean(run),
        "without_sinks": bare,
        "held_bytes": run["cache_bytes"][-1][1],
    }


def mean(stream: dict) -> float:
    """The cross-entropy of all of a stream, which the report has by spans."""
    counts = [(one["last"] - one["first"], one["cross_entropy"]) for one in stream["spans"]]
    return sum(count * nats for count, nats in counts) / sum(count for count, _ in counts)


def bare(found: dict) -> str:
    """A cell."""
    return "" if found["without_sinks"] is None else shown(found["without_sinks"])


SWAP = recipe(
    "swap_backend",
    take,
    contexts=(),
    dense_stream_tokens=2,
    prompt_tokens=1,
    generate_tokens=0,
    chunk=128,
    output=None,
)


def ratio(found: dict) -> float:
    """Perplexity over that of fresh windows."""
    return perplexity_of(found["after"] - found["before"])


SUBJECT = Subject(
    "Patterns along a stream, untrained",
    [Step(spec, SWAP, READ | {"patterns": (spec,)}) for spec in PATTERNS],
    {
        "tokens": lambda found: f"{found['tokens']:,}",
        "perplexity": lambda found: shown(found["after"]),
        "without sinks": bare,
        "fresh windows": lambda found: shown(found["before"]),
        "ratio": lambda found: f"{ratio(found):.2f}",
        "cache at the end, MB": lambda found: f"{found['held_bytes'] / 1e6:.1f}",
    },
    [
        Target(
            "4 sinks and a window of 512: perplexity above fresh windows'",
            0.08,
            lambda steps: ratio(steps[SINKS]) - 1 if SINKS in steps else None,
        )
    ],
    note="Fresh windows: the unchanged model in windows of 2,048 that overlap by half.",
)
