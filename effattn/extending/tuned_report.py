"""What a report of `recipes/extend_context.py` says of tuned rules: tables, plots, and claims."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from effattn.extending.claims import ALIKE, Claim, said
from effattn.reports.plots import NEUTRAL, PALETTE, Series, line_plot
from effattn.reports.tables import Table, number

TUNED, CURVES, HELD = "After tuning", "Loss against tokens tuned on", "What holds after tuning"
LAW = "How far a base reaches"
TERMINAL = (TUNED, HELD, LAW)


def tables(found: dict | None) -> list[Table]:
    """Those of a report's "tuned"; none where nothing was tuned."""
    if not found:
        return []
    made = [_ends(found), _held(found), _curves(found)] if found["rules"] else []
    return [*made, *([_law(found)] if found["reach"] else [])]


def loss(point: dict, place: int) -> float:
    """A point's cross-entropy, nats a token: in windows of the trained length at place 0, of the
    target at -1."""
    return point["lengths"][place]["cross_entropy"]


def claims(rows: Sequence[dict]) -> list[Claim]:
    """What is said of tuned rules (Su, https://kexue.fm/archives/9708), held against the rows of
    one target; those that lack a rule are left open."""
    rules = {row["name"]: row for row in rows}
    last = {name: loss(row["curve"][-1], -1) for name, row in rules.items()}
    target = f"{rows[0]['target']:,} tokens"
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in last.items())
    text = f"{target}: tuned PI has the lowest loss"
    best = min(last, key=last.get) == "pi" if "pi" in last and len(last) > 1 else None
    made = [Claim(text, best, numbers)]
    for text, names, holds in (
        ("NTK converges more slowly than PI", ("pi", "ntk"), _slower),
        ("PI and NTK beat tuning without a rule", ("none", "pi", "ntk"), _both_better),
    ):
        known = all(name in rules for name in names)
        held, told = holds(*(rules[name] for name in names)) if known else (None, "")
        made.append(Claim(f"{target}: {text}", held, told))
    return made


def early(row: dict) -> float | None:
    """The share of a rule's gain at the target that its first point has; None where it gains
    less than what is called alike."""
    first, second, *_, last = (loss(point, -1) for point in row["curve"])
    return (first - second) / (first - last) if first - last > ALIKE else None


def _slower(pi: dict, ntk: dict) -> tuple[bool | None, str]:
    if len(pi["curve"]) < 3 or len(ntk["curve"]) < 3:
        return None, ""
    shares = [early(row) for row in (pi, ntk)]
    tokens = pi["curve"][1]["tokens"]
    if None in shares:
        return None, "one of them gains nothing"
    told = (
        f"of all that they gain, after {tokens:,} tokens: pi {shares[0]:.0%}, ntk {shares[1]:.0%}"
    )
    return shares[1] < shares[0], told


def _both_better(none: dict, *others: dict) -> tuple[bool, str]:
    bar = loss(none["curve"][-1], -1)
    told = [f"{row['name']} {loss(row['curve'][-1], -1):.3f}" for row in others]
    return all(loss(row["curve"][-1], -1) < bar for row in others), f"none {bar:.3f}, " + ", ".join(
        told
    )


def by_target(found: dict) -> dict[int, list[dict]]:
    """The rows of each target, ascending."""
    targets = sorted({row["target"] for row in found["rules"]})
    return {one: [row for row in found["rules"] if row["target"] == one] for one in targets}


def _ends(found: dict) -> Table:
    """A row a rule and target: before and after, at both lengths."""
    rows = []
    for row in found["rules"]:
        first, last = row["curve"][0], row["curve"][-1]
        cells = [number(loss(point, place)) for place in (0, -1) for point in (first, last)]
        spec = row["axes"]["positions"]
        rows.append([f"{row['name']} to {row['target']:,}: {spec}", f"{last['tokens']:,}", *cells])
    header = (
        "Rule",
        "Tokens tuned on",
        "Trained length, before",
        "after",
        "Target, before",
        "after",
    )
    note = (
        "Cross-entropy in nats a token on the same held-out text, in windows of the trained length "
        "and of the target. Tuned at whole windows of the target, with a constant learning rate of "
        f"{found['rules'][0]['learning_rate']:g} after its warm-up."
    )
    return Table(TUNED, header, rows, note)


def _held(found: dict) -> Table:
    every = [claim for rows in by_target(found).values() for claim in claims(rows)]
    rows = [[claim.text, said(claim), claim.numbers] for claim in every]
    note = (
        "Losses at the target, at the last point. To converge slowly: to have less of the whole "
        "gain at the first point of the curve."
    )
    return Table(HELD, ("Claim", "Here", "Numbers"), rows, note)


def _curves(found: dict) -> Table:
    rows = [
        [
            f"{row['name']} to {row['target']:,}",
            f"{point['tokens']:,}",
            *(number(loss(point, place)) for place in (0, -1)),
        ]
        for row in found["rules"]
        for point in row["curve"]
    ]
    header = ("Rule", "Tokens", "Trained length", "Target")
    return Table(CURVES, header, rows, "Nats a token.", folded=True)


def _law(found: dict) -> Table:
    """Predicted and measured, and the losses that say so."""
    first = found["reach"][0]
    header = [
        "Base",
        "Promised (tokens)",
        "Measured",
        *(f"to {row['last']:,}" for row in first["rows"][1:]),
    ]
    rows = [
        [
            f"{one['base']:,.0f}",
            f"{one['predicted']:,.0f}",
            f"{one['measured']:,}",
            *(f"{row['cross_entropy'] - row['fresh']:+.3f}" for row in one["rows"][1:]),
        ]
        for one in found["reach"]
    ]
    note = (
        f"Tuned on {first['tokens']:,} tokens in windows of the trained length "
        f"({first['rows'][0]['last']:,}). Promised: theorem 3 of arXiv:2310.05209. Each further "
        "column: nats a token by which the tokens up to there are predicted worse from all that "
        "came before than in windows of the trained length; measured: how far that is never above "
        "0."
    )
    return Table(LAW, header, rows, note)


def plots(found: dict | None) -> dict[str, list[Markup]]:
    """Section -> its figures: of each target the losses there, and at the trained length."""
    if not found or not found["rules"]:
        return {}
    made = []
    for target, rows in by_target(found).items():
        trained = rows[0]["curve"][0]["lengths"][0]["length"]
        for place, length in ((-1, target), (0, trained)):
            title = f"Tuned to {target:,}: loss in windows of {length:,}"
            lines = [_line(row, place, number) for number, row in enumerate(rows)]
            made.append(line_plot(title, lines, "tokens tuned on", "nats a token"))
    return {CURVES: made}


def _line(row: dict, place: int, number: int) -> Series:
    color = NEUTRAL if row["name"] == "none" else PALETTE[(number - 1) % len(PALETTE)]
    points = row["curve"]
    x, y = [one["tokens"] for one in points], [loss(one, place) for one in points]
    return Series(row["name"], x, y, color)
