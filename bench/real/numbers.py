"""What subjects share: the parts of reports that are kept, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping

from effattn.evaluate.loss import perplexity_of


def quality(data: dict, stage: str) -> dict:
    """A report's quality before and after `stage`, in nats a token, on how many tokens."""
    found, after = data["quality"], data["quality"][stage]
    return {
        "tokens": found["tokens"],
        "window": found["context"],
        "bos": found["bos"],
        "before": found["before"]["cross_entropy"],
        "after": after["cross_entropy"],
        "kl": after["kl"],
    }


def excess(found: Mapping) -> float:
    """Nats a token that it costs."""
    return found["after"] - found["before"]


def ratio(steps: Mapping[str, dict], one: str, other: str) -> float | None:
    """The excess of a step as a share of another's; None where one of them was not measured."""
    if one not in steps or other not in steps:
        return None
    return excess(steps[one]) / excess(steps[other])


def relative(found: Mapping) -> float:
    """Perplexity beside that before, less one: 0.01 is a percent more."""
    return perplexity_of(excess(found)) - 1


def shown(nats: float | None) -> str:
    """A cross-entropy as a perplexity."""
    if nats is None:
        return "not finite"
    value = perplexity_of(nats)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def before(found: dict) -> str:
    """The perplexity of the model as it was."""
    return shown(found["before"])


def after(found: dict) -> str:
    """The perplexity of what became of it."""
    return shown(found["after"])


def nats(found: dict) -> str:
    """The excess, with its sign."""
    return f"{excess(found):+.3f}"


def kl(found: dict) -> str:
    """KL from the model as it was, in nats a token."""
    return f"{found['kl']:.3f}"


QUALITY = {"perplexity before": before, "after": after, "excess nats": nats, "KL": kl}
