"""The tables of `recipes/extend_context.py`: the article's table, retrieval, and which of the
article's claims hold.
"""

from __future__ import annotations

from effattn.evaluate.retrieval import score
from effattn.extending import tuned_report
from effattn.extending.article_data import ArticleData
from effattn.extending.claims import claims, said
from effattn.extending.copying import errors_gone
from effattn.reports.common import about
from effattn.reports.tables import Table, number

LOSS, ACCURACY = "Cross-entropy (nats a token)", "Next-token accuracy (%)"
RETRIEVAL, CLAIMS, CURVES = "Retrieval", "What holds here", "Loss by position"
TERMINAL = (ACCURACY, LOSS, RETRIEVAL, CLAIMS, *tuned_report.TERMINAL)


def tables(report: ArticleData) -> list[Table]:
    """Every table, the article's first."""
    return [
        _texts(report, ACCURACY, lambda cell: f"{100 * cell['accuracy']:.2f}"),
        _texts(report, LOSS, lambda cell: number(cell["cross_entropy"])),
        *_retrieval(report),
        _claims(report),
        *tuned_report.tables(report.data.get("tuned")),
        _curves(report),
        _specs(report),
        *about(report.data),
    ]


def _texts(report: ArticleData, title: str, write) -> Table:
    """A row a rule: natural text at every length, repeated text beyond the trained one, and its
    copies.
    """
    beyond = [length for length in report.lengths if length > report.trained]
    header = [
        "Rule",
        *(f"{length:,} natural" for length in report.lengths),
        *(f"{length:,} repeated" for length in beyond),
        f"{report.longest:,} copies",
    ]
    rows = []
    for row in report.rules:
        natural = {cell["length"]: cell for cell in row["natural"]}
        again = {cell["length"]: cell for cell in row["repeated"]}
        cells = [natural[length] for length in report.lengths] + [
            again[length] for length in beyond
        ]
        rows.append([row["name"], *map(write, cells), write(again[report.longest]["copies"])])
    settings = report.data["settings"]
    note = (
        f"{settings['sequences']} stretches of {report.longest:,} tokens, each within one "
        "document. Natural: the same tokens at every length, in windows of that length. Repeated: "
        f"their first {settings['period']:,} tokens over and over; copies: the tokens behind the "
        f"first {settings['period']:,}. {_of_logn(report)}"
    )
    return Table(title, header, rows, note)


def _of_logn(report: ArticleData) -> str:
    """Which log-n the rows are about."""
    if not report.own:
        return "Log-n is the test-time form, without effect within the trained length."
    kinds: dict[str, list[str]] = {}
    for specs in report.own.values():
        for layer, spec in specs.items():
            kinds.setdefault(spec, []).append(layer)
    had = "; ".join(f"{spec} in layers {', '.join(layers)}" for spec, layers in kinds.items())
    return f"The model was trained with {had}, which every rule keeps."


def _retrieval(report: ArticleData) -> list[Table]:
    asked = [row for row in report.rules if row["retrieval"]]
    data = report.data
    copy = data["copy"]
    gone = errors_gone(copy)
    said = (
        "copies"
        if gone >= 0.75
        else "copies in part"
        if gone >= 0.25
        else "has NOT learned to copy"
    )
    note = (
        f"Text that repeats every {copy['period']:,} tokens, within the trained length: accuracy "
        f"{100 * copy['first']:.1f} % on the first copy, {100 * copy['later']:.1f} % on later "
        f"ones ({100 * gone:.0f} % of the errors are gone): the model {said}."
    )
    if not asked:
        return [
            Table(
                RETRIEVAL, ("Check", "Value"), [["copies (%)", f"{100 * copy['later']:.1f}"]], note
            )
        ]
    within = data["within"][data["task"]]
    depths = [cell["depth"] for cell in within["rows"]]
    rows = [
        [
            "baseline, within the trained length",
            *(_share(cell) for cell in within["rows"]),
            _mean(within),
        ]
    ]
    for row in asked:
        found = row["retrieval"]
        rows.append([row["name"], *(_share(cell) for cell in found["rows"]), _mean(found)])
    chance = within["chance"]
    note += (
        f" {data['task'].capitalize()} at {data['settings']['retrieval_length']:,} tokens (first "
        f"row: {within['length']:,}), {data['settings']['retrieval_trials']} prompts a depth: "
        f"share of right answers (guessing: {100 * chance:g} %) and, in brackets, nats of an "
        "answer token. Depth 0 is the start."
    )
    if not data["task_learned"]:
        note += (
            " The model has not learned this task within its trained length: compare the nats only."
        )
    return [
        Table(RETRIEVAL, ("Rule", *(f"depth {depth:g}" for depth in depths), "all"), rows, note)
    ]


def _share(cell: dict) -> str:
    return f"{100 * score(cell):.0f} % ({cell['nats']:.2f})"


def _mean(found: dict) -> str:
    return f"{100 * found['score']:.0f} %"


def _claims(report: ArticleData) -> Table:
    rows = [[claim.text, said(claim), claim.numbers] for claim in claims(report)]
    note = (
        f"Losses in nats a token at {report.longest:,} tokens of natural text where nothing "
        "else is said."
    )
    return Table(CLAIMS, ("Claim", "Here", "Numbers"), rows, note)


def _curves(report: ArticleData) -> Table:
    first = report.rules[0]["curves"]["natural"]
    header = ["Position", *(row["name"] for row in report.rules)]
    rows = [
        [
            f"{cell['first']:,}",
            *(number(row["curves"]["natural"][place]["cross_entropy"]) for row in report.rules),
        ]
        for place, cell in enumerate(first)
    ]
    return Table(
        CURVES, header, rows, "Cross-entropy on natural text, from that position on.", folded=True
    )


def _specs(report: ArticleData) -> Table:
    rows = [
        [
            row["name"],
            ", ".join(f"{axis}={spec!r}" for axis, spec in row["axes"].items()) or "as it is",
            f"{row['seconds']:.0f}",
        ]
        for row in report.rules
    ]
    return Table("Rules", ("Rule", "effattn.swap(model, ...)", "Seconds"), rows, folded=True)
