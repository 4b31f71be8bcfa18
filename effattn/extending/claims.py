"""What the articles on ReRoPE claim, held against a report's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effattn.extending.rules import CLIPPED, FREQUENCIES, LOGN, WINDOW

if TYPE_CHECKING:
    from effattn.extending.article_report import ArticleReport

ALIKE = 0.02  # nats a token between losses that are called alike


@dataclass(frozen=True)
class Claim:
    """holds: None where the report lacks the rules that it is about."""

    text: str
    holds: bool | None
    numbers: str


def claims(report: ArticleReport) -> list[Claim]:
    """In the articles' order; natural text at the longest length where nothing else is said."""
    trained, longest = report.trained, report.longest
    loss = {row["name"]: report.loss(row) for row in report.rules}
    baseline = report.rules[0]["name"]
    fresh = report.loss(report.rules[0], trained)
    plain = [row for row in report.rules if not row["logn"]]
    clipped = report.best([row for row in plain if row["name"].startswith("rerope-")])
    leaky = report.best([row for row in plain if row["name"].startswith("leaky-")])
    windowed = report.best([row for row in plain if row["kind"] == WINDOW])
    angles = report.best(
        [row for row in plain if row["kind"] == FREQUENCIES and row["name"] != baseline]
    )
    found = [
        Claim(
            f"RoPE fails beyond the {trained:,} tokens that it was trained with",
            loss[baseline] > fresh + ALIKE,
            f"{loss[baseline]:.3f}, fresh windows of {trained:,}: {fresh:.3f}",
        ),
        _ordered("Without tuning, NTK is better than interpolation (PI)", loss, "ntk-old", "pi"),
        _ordered("NTK fixed is better than old", loss, "ntk-fixed", "ntk-old"),
        _ordered("NTK mixed is better than fixed", loss, "ntk-mixed", "ntk-fixed"),
    ]
    if clipped:
        name = clipped["name"]
        found += [
            Claim(
                f"ReRoPE: longer context, lower loss ({longest:,} against windows of {trained:,} "
                "of the same text)",
                loss[name] <= fresh,
                f"{name} {loss[name]:.3f}, {fresh:.3f}",
            ),
            Claim(
                "Its best window is a quarter to a half of the trained length",
                trained // 4 <= int(name.partition("-")[2]) <= trained // 2,
                ", ".join(
                    f"{row['name']} {report.loss(row):.3f}"
                    for row in plain
                    if row["name"].startswith("rerope-")
                ),
            ),
            _window_fails(report, loss, trained, name),
            _ordered("Test-time log-n makes ReRoPE better", loss, f"{name} {LOGN}", name),
        ]
    if clipped and angles:
        found.append(
            _ordered(
                "ReRoPE is better than every rule of angles", loss, clipped["name"], angles["name"]
            )
        )
    if clipped and leaky:
        found.append(
            _ordered(
                "Leaky ReRoPE is at least as good as ReRoPE",
                loss,
                leaky["name"],
                clipped["name"],
                slack=ALIKE,
            )
        )
    if clipped and windowed:
        name, other = clipped["name"], windowed["name"]
        found.append(
            Claim(
                "Loss alone does not tell ReRoPE from a sliding window with sinks",
                abs(loss[name] - loss[other]) <= ALIKE,
                f"{name} {loss[name]:.3f}, {other} {loss[other]:.3f}",
            )
        )
        ours, theirs = (report.copied(row) for row in (clipped, windowed))
        found.append(
            Claim(
                "What was read far back is copied by ReRoPE, and not by a sliding window",
                ours > theirs + 0.1,
                f"accuracy on copies: {name} {100 * ours:.1f} %, {other} {100 * theirs:.1f} %",
            )
        )
        asked = [row for row in plain if row["retrieval"] and row["kind"] in (CLIPPED, WINDOW)]
        best = max((row for row in asked if row["kind"] == CLIPPED), key=_score, default=None)
        control = max((row for row in asked if row["kind"] == WINDOW), key=_score, default=None)
        if best and control:
            chance = best["retrieval"]["chance"]
            held = _score(best) > chance + 0.2 and _score(best) > _score(control) + 0.1
            found.append(
                Claim(
                    f"ReRoPE finds what a window cannot ({report.data['task']})",
                    held if report.data["task_learned"] else None,
                    f"{best['name']} {100 * _score(best):.0f} %, {control['name']} "
                    f"{100 * _score(control):.0f} %, guessing {100 * chance:.0f} %",
                )
            )
    return found


def _score(row: dict) -> float:
    return row["retrieval"]["score"]


def _ordered(
    text: str, loss: dict[str, float], better: str, worse: str, slack: float = 0.0
) -> Claim:
    """That one loss is below the other."""
    if better not in loss or worse not in loss:
        return Claim(text, None, "")
    numbers = f"{better} {loss[better]:.3f}, {worse} {loss[worse]:.3f}"
    return Claim(text, loss[better] < loss[worse] + slack, numbers)


def _window_fails(report: ArticleReport, loss: dict[str, float], trained: int, best: str) -> Claim:
    text, name = "A window as long as the trained length fails", f"rerope-{trained}"
    if name not in loss:
        return Claim(text, None, "")
    nearer = abs(loss[name] - report.loss(report.rules[0])) < abs(loss[name] - loss[best])
    return Claim(
        text,
        nearer,
        f"{name} {loss[name]:.3f}, {report.rules[0]['name']} {report.loss(report.rules[0]):.3f}",
    )
