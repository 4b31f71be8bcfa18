"""The key/value cache in few bits, read token by token."""

from __future__ import annotations

from bench.real.numbers import QUALITY, relative
from bench.real.steps import Step, Subject, Target, recipe

ORDER = 2
READ = {"evaluation_tokens": 6144, "length": 512, "batch": 12}


def take(data: dict) -> dict:
    """Of the report's only format."""
    (row,) = [one for one in data["formats"] if one["name"] != "full"]
    found = row["quality"]
    return {
        "tokens": found["tokens"],
        "window": data["settings"]["length"],
        "bos": data["settings"]["bos"],
        "before": found["parent_cross_entropy"],
        "after": found["cross_entropy"],
        "standard_error": found["loss_error"],
        "kl": found["kl"],
        "bytes_per_token": row["bytes_per_token"],
    }


def cost(found: dict) -> str:
    """Perplexity, in percent more, with its standard error."""
    return f"{relative(found):+.2%} ± {found['standard_error']:.2%}"


QUANTIZE = recipe(
    "quantize_kv", take, retrieval_trials=0, decode_contexts=(), sensitivity_tokens=0, output=None
)
FORMATS = (
    "int8",
    "int4",
    "int2",
    "int4(rotate='kv')",
    "int2(rotate='kv')",
    "int2(residual=32)",
    "int2(residual=32, first=4)",
)


def within(spec: str, most: float) -> Target:
    """A format's perplexity close to the full cache's."""
    return Target(
        f"`{spec}`: perplexity above the full cache's",
        most,
        lambda steps: relative(steps[spec]) if spec in steps else None,
    )


SUBJECT = Subject(
    "Cache formats, token by token",
    [Step(spec, QUANTIZE, READ | {"formats": (spec,)}) for spec in FORMATS],
    QUALITY
    | {"perplexity": cost, "bytes a token": lambda found: f"{found['bytes_per_token']:,.0f}"},
    [within("int8", 0.002), within("int4", 0.002), within("int2", 0.04)],
)
