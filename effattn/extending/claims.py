"""What the articles on ReRoPE claim, held against a report's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from effattn.extending.article_data import ArticleData, Rule
from effattn.extending.rules import CLIPPED, FREQUENCIES, LOGN, WINDOW
from effattn.reports.tables import UNKNOWN

ALIKE = 0.02  # nats a token between losses that are called alike


@dataclass(frozen=True)
class Claim:
    """holds: None where the report lacks the rules that it is about."""

    text: str
    holds: bool | None
    numbers: str


def said(claim: Claim) -> str:
    """Whether it holds, in words."""
    return {True: "holds", False: "does not hold", None: UNKNOWN}[claim.holds]


@dataclass(frozen=True)
class Found:
    """The rules that the claims are about, those without log-n: the best of each kind, or None."""

    plain: list[Rule]
    loss: dict[str, float]  # nats a token at the longest length, by rule
    baseline: Rule
    fresh: float  # loss of the baseline in windows of the trained length
    clipped: Rule | None
    leaky: Rule | None
    windowed: Rule | None
    angles: Rule | None  # of those that change the frequencies, without the baseline

    @classmethod
    def of(cls, report: ArticleData) -> Found:
        """What the claims are about, found in a report."""
        plain, baseline = [row for row in report.rules if not row["logn"]], report.rules[0]

        def best(wanted: Callable[[Rule], bool]) -> Rule | None:
            return report.best([row for row in plain if wanted(row)])

        return cls(
            plain,
            {row["name"]: report.loss(row) for row in report.rules},
            baseline,
            report.loss(baseline, report.trained),
            best(lambda row: row["name"].startswith("rerope-")),
            best(lambda row: row["name"].startswith("leaky-")),
            best(lambda row: row["kind"] == WINDOW),
            best(lambda row: row["kind"] == FREQUENCIES and row["name"] != baseline["name"]),
        )


def claims(report: ArticleData) -> list[Claim]:
    """In the articles' order; natural text at the longest length where nothing else is said."""
    found = Found.of(report)
    return [
        *_angles(report, found),
        *_rerope(report, found),
        *_against_others(found),
        *_against_window(report, found),
    ]


def _angles(report: ArticleData, found: Found) -> list[Claim]:
    """Rules that change the frequencies."""
    trained, loss, name = report.trained, found.loss, found.baseline["name"]
    model = "The model as it was trained" if report.own else "RoPE"
    return [
        Claim(
            f"{model} fails beyond the {trained:,} tokens that it was trained with",
            loss[name] > found.fresh + ALIKE,
            f"{loss[name]:.3f}, fresh windows of {trained:,}: {found.fresh:.3f}",
        ),
        _ordered("Without tuning, NTK is better than interpolation (PI)", loss, "ntk-old", "pi"),
        _ordered("NTK fixed is better than old", loss, "ntk-fixed", "ntk-old"),
        _ordered("NTK mixed is better than fixed", loss, "ntk-mixed", "ntk-fixed"),
    ]


def _rerope(report: ArticleData, found: Found) -> list[Claim]:
    """ReRoPE by itself: its length, its window, and log-n."""
    if not found.clipped:
        return []
    trained, loss, name = report.trained, found.loss, found.clipped["name"]
    windows = [row for row in found.plain if row["name"].startswith("rerope-")]
    return [
        Claim(
            f"ReRoPE: longer context, lower loss ({report.longest:,} against windows of "
            f"{trained:,} of the same text)",
            loss[name] <= found.fresh,
            f"{name} {loss[name]:.3f}, {found.fresh:.3f}",
        ),
        Claim(
            "Its best window is a quarter to a half of the trained length",
            trained // 4 <= int(name.partition("-")[2]) <= trained // 2,
            ", ".join(f"{row['name']} {report.loss(row):.3f}" for row in windows),
        ),
        _window_fails(report, loss, trained, name),
        _ordered("Test-time log-n makes ReRoPE better", loss, f"{name} {LOGN}", name),
    ]


def _against_others(found: Found) -> list[Claim]:
    """ReRoPE beside the rules of angles, and beside its leaky form."""
    claims, loss = [], found.loss
    if found.clipped and found.angles:
        text = "ReRoPE is better than every rule of angles"
        claims.append(_ordered(text, loss, found.clipped["name"], found.angles["name"]))
    if found.clipped and found.leaky:
        text, names = "Leaky ReRoPE is at least as good as ReRoPE", (found.leaky, found.clipped)
        claims.append(_ordered(text, loss, *(row["name"] for row in names), slack=ALIKE))
    return claims


def _against_window(report: ArticleData, found: Found) -> list[Claim]:
    """ReRoPE beside a sliding window with sinks, which cannot see what is far back."""
    if not (found.clipped and found.windowed):
        return []
    loss, name, other = found.loss, found.clipped["name"], found.windowed["name"]
    ours, theirs = (report.copied(row) for row in (found.clipped, found.windowed))
    claims = [
        Claim(
            "Loss alone does not tell ReRoPE from a sliding window with sinks",
            abs(loss[name] - loss[other]) <= ALIKE,
            f"{name} {loss[name]:.3f}, {other} {loss[other]:.3f}",
        ),
        Claim(
            "What was read far back is copied by ReRoPE, and not by a sliding window",
            ours > theirs + 0.1,
            f"accuracy on copies: {name} {100 * ours:.1f} %, {other} {100 * theirs:.1f} %",
        ),
    ]
    asked = [row for row in found.plain if row["retrieval"]]
    best = max((row for row in asked if row["kind"] == CLIPPED), key=_score, default=None)
    control = max((row for row in asked if row["kind"] == WINDOW), key=_score, default=None)
    if best and control:
        chance = best["retrieval"]["chance"]
        held = _score(best) > chance + 0.2 and _score(best) > _score(control) + 0.1
        claims.append(
            Claim(
                f"ReRoPE finds what a window cannot ({report.data['task']})",
                held if report.data["task_learned"] else None,
                f"{best['name']} {100 * _score(best):.0f} %, {control['name']} "
                f"{100 * _score(control):.0f} %, guessing {100 * chance:.0f} %",
            )
        )
    return claims


def _score(row: Rule) -> float:
    return row["retrieval"]["score"]


def _ordered(
    text: str, loss: dict[str, float], better: str, worse: str, slack: float = 0.0
) -> Claim:
    """That one loss is below the other."""
    if better not in loss or worse not in loss:
        return Claim(text, None, "")
    numbers = f"{better} {loss[better]:.3f}, {worse} {loss[worse]:.3f}"
    return Claim(text, loss[better] < loss[worse] + slack, numbers)


def _window_fails(report: ArticleData, loss: dict[str, float], trained: int, best: str) -> Claim:
    text, name = "A window as long as the trained length fails", f"rerope-{trained}"
    if name not in loss:
        return Claim(text, None, "")
    nearer = abs(loss[name] - report.loss(report.rules[0])) < abs(loss[name] - loss[best])
    return Claim(
        text,
        nearer,
        f"{name} {loss[name]:.3f}, {report.rules[0]['name']} {report.loss(report.rules[0]):.3f}",
    )
