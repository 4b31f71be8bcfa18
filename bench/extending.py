"""What the documentation shows of `recipes/extend_context.py`, made of the files in `results/`.

Between `<!-- article -->` and `<!-- /article -->` of a page stands a line for every row of Su's
article on ReRoPE (https://kexue.fm/archives/9708): what the embedded model and its variants do, by
`FILES`, and what the article has. Models are trained at 512 tokens there and here, so that windows
are the same numbers. Between `<!-- tuned:FOLDER -->` and `<!-- /tuned -->` stand the tables of what
was tuned, by results/FOLDER/extend_context_tuned.json. `python -m bench.docs` does it for every
page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from bench.pages import plain_table
from effattn.extending import tuned_report
from effattn.extending.article_report import ArticleReport
from effattn.extending.rules import LOGN
from effattn.reports.tables import Table

MARKER = re.compile(r"(<!-- article -->\n).*?(<!-- /article -->)", re.DOTALL)
TUNED = re.compile(r"(<!-- tuned:(?P<folder>[\w.-]+) -->\n).*?(?P<end><!-- /tuned -->)", re.DOTALL)
NONE, TEST, TRAINED = "", "at test time", "trained in"
HWFA = "hwfa"
FILES = {  # log-n of the model -> what `recipes/extend_context.py` found of it
    NONE: "cpu-epyc-2core/extend_context.json",
    TRAINED: "cpu-epyc-avx512-2core/extend_context_logn.json",
    HWFA: "cpu-epyc-avx512-2core/extend_context_hwfa.json",
}
NOT_YET = "…"
COLUMNS = ("512", "4,096 repeated", "4,096 not repeated")
# (rule, log-n) -> the article's next-token accuracies (%) of a GAU model of 100M parameters, in
# `COLUMNS`. Leaky ReRoPE is "leaky-K" at a window of 128 and "leaky-256-K" at 256.
ARTICLE: Mapping[tuple[str, str], tuple[float, float, float]] = {
    ("baseline", NONE): (49.41, 24.17, 23.16),
    ("baseline", TRAINED): (49.40, 24.60, 24.02),
    ("pi", NONE): (49.41, 15.04, 13.54),
    ("pi", TRAINED): (49.40, 14.99, 16.51),
    ("ntk-old", NONE): (49.41, 51.28, 39.27),
    ("ntk-old", TRAINED): (49.40, 61.71, 43.75),
    ("ntk-fixed", NONE): (49.41, 51.86, 39.61),
    ("ntk-fixed", TEST): (49.41, 55.94, 41.11),
    ("ntk-fixed", TRAINED): (49.40, 62.85, 44.14),
    ("ntk-mixed", NONE): (49.41, 53.09, 40.12),
    ("ntk-mixed", TEST): (49.41, 59.11, 42.38),
    ("ntk-mixed", TRAINED): (49.40, 68.91, 45.41),
    ("rerope-64", NONE): (49.41, 69.39, 45.19),
    ("rerope-64", TEST): (49.41, 78.58, 47.42),
    ("rerope-64", TRAINED): (49.40, 84.38, 48.14),
    ("rerope-128", NONE): (49.41, 76.11, 47.82),
    ("rerope-128", TEST): (49.41, 82.28, 48.78),
    ("rerope-128", TRAINED): (49.40, 85.47, 48.87),
    ("rerope-256", NONE): (49.41, 77.90, 48.48),
    ("rerope-256", TEST): (49.41, 82.40, 48.85),
    ("rerope-256", TRAINED): (49.40, 85.12, 49.07),
    ("rerope-384", NONE): (49.41, 70.72, 48.15),
    ("rerope-384", TEST): (49.41, 76.42, 48.31),
    ("rerope-384", TRAINED): (49.40, 83.24, 48.62),
    ("rerope-512", NONE): (49.41, 7.09, 8.25),
    ("rerope-512", TEST): (49.41, 7.08, 8.25),
    ("rerope-512", TRAINED): (49.40, 15.84, 10.83),
    ("leaky-64", TRAINED): (49.40, 85.29, 48.96),
    ("leaky-32", TRAINED): (49.40, 85.31, 49.03),
    ("leaky-16", TRAINED): (49.40, 85.15, 49.10),
    ("leaky-8", TRAINED): (49.40, 80.00, 48.11),
    ("leaky-256-64", TRAINED): (49.40, 84.60, 49.03),
    ("leaky-256-32", TRAINED): (49.40, 84.30, 48.97),
    ("leaky-256-16", TRAINED): (49.40, 83.59, 48.87),
    ("leaky-256-8", TRAINED): (49.40, 69.80, 45.72),
    (HWFA, TRAINED): (48.70, 80.84, 48.15),
}


def update(text: str, root: Path) -> str:
    """The `text` of a page with its tables made new. ValueError for markers without an end."""
    for begin, marker in (("<!-- article", MARKER), ("<!-- tuned:", TUNED)):
        if text.count(begin) != len(marker.findall(text)):
            raise ValueError(f"docs: a marker that begins with {begin} has no end")

    def article(mark: re.Match) -> str:
        found = {name: read(root / "results" / file) for name, file in FILES.items()}
        return mark[1] + table(found) + mark[2]

    def tuned(mark: re.Match) -> str:
        file = root / "results" / mark["folder"] / "extend_context_tuned.json"
        found = json.loads(file.read_text(encoding="utf-8"))["tuned"]
        shown = [one for one in tuned_report.tables(found) if not one.folded]
        return (
            mark[1] + "\n".join(f"{plain_table(one)}\n{one.note}\n" for one in shown) + mark["end"]
        )

    return TUNED.sub(tuned, MARKER.sub(article, text))


def read(file: Path) -> dict[str, tuple[float, float, float]]:
    """rule -> its accuracies (%) in `COLUMNS`; nothing of a file that is not there yet."""
    if not file.is_file():
        return {}
    report = ArticleReport(json.loads(file.read_text(encoding="utf-8")))
    return {
        row["name"]: (
            100 * report.at(row, report.trained)["accuracy"],
            100 * row["repeated"][-1]["accuracy"],
            100 * report.at(row)["accuracy"],
        )
        for row in report.rules
    }


def table(found: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """Markdown: a line a row of the article, `found` (by the keys of `FILES`) beside it."""
    lines = []
    for (rule, logn), theirs in ARTICLE.items():
        name = f"{rule} {LOGN}" if logn == TEST else rule
        of = found[HWFA if rule == HWFA else TRAINED if logn == TRAINED else NONE]
        ours = of.get("baseline" if rule == HWFA else name)
        cells = [NOT_YET] * len(COLUMNS) if ours is None else [f"{one:.1f}" for one in ours]
        lines.append([rule, logn, *cells, *(f"{one:.2f}" for one in theirs)])
    header = ["rule", "log-n", *COLUMNS, *(f"article: {name}" for name in COLUMNS)]
    waiting = [FILES[name] for name in FILES if not found[name]]
    note = f"\n{NOT_YET} is not measured yet: `{'`, `'.join(waiting)}`\n" if waiting else ""
    return plain_table(Table("", header, lines)) + note
