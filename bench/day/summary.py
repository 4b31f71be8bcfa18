"""The tables of a day, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.day import ratios
from bench.day.jobs import DONE
from effattn.reports.tables import Table

LONGEST = 12_000  # characters of all tables together, so that a log's end shows them
WRONG = 12  # lines of what is wrong


def rows(found: Mapping, step: str) -> Iterator[tuple[str, dict]]:
    """(job, result) of all results of a step."""
    for name, job in found.get(step, {}).get("jobs", {}).items():
        for row in job["results"]:
            yield name, row


def steps_table(found: Mapping) -> Table:
    """A line a step: how its jobs ended."""
    lines = []
    for name, step in found.items():
        jobs = step["jobs"].values()
        done = sum(job["status"] == DONE for job in jobs)
        others = [
            f"{x} {job['status']}" for x, job in step["jobs"].items() if job["status"] != DONE
        ]
        said = step.get("failed") or "; ".join(others)
        lines.append(
            [name, f"{done} of {len(jobs)}", f"{sum(j['seconds'] for j in jobs):.0f}", said]
        )
    return Table("Steps", ["step", "jobs done", "their seconds", "the others"], lines)


def correctness_table(found: Mapping) -> Table:
    """A line a job: how many checks are right, the worst error over the one allowed."""
    by_job: dict[str, list[dict]] = {}
    for name, row in rows(found, "correctness"):
        by_job.setdefault(name, []).append(row)
    lines = []
    for name, checks in by_job.items():
        right = sum(row["right"] for row in checks)
        shares = [
            mine / fine
            for row in checks
            for mine, _, fine in row.get("errors", {}).values()
            if fine
        ]
        worst = f"{max(shares):.2f}" if shares else "-"
        lines.append([name, f"{right} of {len(checks)}", worst])
    wrong = [
        f"{name}: {row['what']}: {row.get('failed') or _too_large(row['errors'])}"
        for name, row in rows(found, "correctness")
        if not row["right"]
    ]
    more = [f"and {len(wrong) - WRONG} more"] if len(wrong) > WRONG else []
    note = "\n".join([*wrong[:WRONG], *more])
    return Table("Correctness", ["kernels", "right", "worst error / allowed"], lines, note)


def _too_large(errors: Mapping) -> str:
    return ", ".join(
        f"{name} {mine:.1e} (plain torch {plain:.1e})"
        for name, (mine, plain, fine) in errors.items()
        if not mine <= fine
    )


def headlines_table(found: Mapping) -> Table:
    """A line a headline: measured, target, predicted; its times, and the device's limit."""
    cases = {"cases": {row["name"]: row for _, row in rows(found, "headlines")}}
    lines = []
    for one in ratios.HEADLINES:
        row = cases["cases"].get(one.case, {}).get("contenders", {}).get(one.of, {})
        value = one.value(cases)
        verdict = "" if value is None else "yes" if value >= one.target else "no"
        lines.append(
            [
                one.what,
                row.get("failed", row.get("wrong", "-"))[:60] if value is None else f"{value:.2f}",
                f"{one.target:.2f}",
                verdict,
                one.predicted,
                _number(row, "ms_p50"),
                _number(row, "limit_ms"),
                _number(row, "host_ms"),
            ]
        )
    header = ["", "measured", "target", "met", "predicted", "ms", "limit ms", "host ms"]
    note = (
        "Ratios of speed, or shares of the measured read bandwidth: more is better. limit: what "
        "the bytes and operations need on this device at least. Predicted from machine code for "
        "sm_90, before any of it had run: by hand from what Triton 3.6 made of the first kernels, "
        "or, where it says up to, by the model of `effattn kernels --report` for today's."
    )
    return Table("Headlines", header, lines, note)


def _number(row: Mapping, entry: str) -> str:
    return f"{row[entry]:.3g}" if row.get(entry) else "-"


def tuning_table(found: Mapping) -> Table:
    """A line a kernel: the best other options, and what they save."""
    best: dict[tuple[str, str], dict] = {}
    for name, row in rows(found, "tuning"):
        if row.get("right"):
            where = (name, row["kernel"])
            if where not in best or row["over"] < best[where]["over"]:
                best[where] = row
    lines = [
        [name, kernel, *(str(x) for x in row["options"].values()), f"{row['over']:.2f}"]
        for (name, kernel), row in best.items()
    ]
    header = ["call", "kernel", "warps", "stages", "time over today's"]
    return Table("Best of other warps and stages", header, lines)


def tests_table(found: Mapping) -> Table:
    """A line: how many tests passed, and which failed."""
    passed, failed, ended = 0, [], 0
    for job in found.get("tests", {}).get("jobs", {}).values():
        passed += max((row.get("passed", 0) for row in job["results"]), default=0)
        failed += [row["failed"] for row in job["results"] if "failed" in row]
        ended += any("code" in row for row in job["results"])
    note = "\n".join([*failed[:WRONG], *([f"and more: {len(failed)}"] if failed[WRONG:] else [])])
    return Table(
        "Tests",
        ["passed", "failed", "files to their end"],
        [[str(passed), str(len(failed)), str(ended)]],
        note,
    )


def launched(found: Mapping) -> str:
    """How many kernels the carried cache had, in a line."""
    told = [row for _, row in rows(found, "headlines") if "found" in row]
    hits, misses = (
        sum(row["found"] for row in told),
        sum(sum(row["compiled"].values()) for row in told),
    )
    return f"kernels of the headlines: {hits} found in the cache, {misses} compiled"


def plain(table: Table) -> str:
    """A table for a log: columns by spaces, nothing that a narrow terminal breaks."""
    lines = [[str(cell) for cell in line] for line in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(filter(None, [table.title, *map(str.rstrip, padded), table.note]))


def where(found: Mapping) -> str:
    """On what it was measured, in a line."""
    told = [row["environment"] for _, row in rows(found, "versions") if "environment" in row]
    device = told[0].get("device") if told else "a device that was not asked for its name"
    tiny = any(step.get("key", {}).get("tiny") for step in found.values())
    return f"on {device}" + (", tiny sizes: its numbers say nothing" if tiny else "")


def text(found: Mapping) -> str:
    """All tables, at most `LONGEST` characters."""
    parts = [steps_table(found)]
    made = {
        "correctness": correctness_table,
        "headlines": headlines_table,
        "tuning": tuning_table,
        "tests": tests_table,
    }
    parts += [table(found) for name, table in made.items() if found.get(name, {}).get("jobs")]
    said = "\n\n".join([where(found), *map(plain, parts), launched(found)])
    return said if len(said) <= LONGEST else said[: LONGEST - 4] + " ..."
