"""Memory and time of decoding after a long prompt."""

from __future__ import annotations

from bench.real.steps import Step, Subject, recipe

ORDER = 9


def take(data: dict) -> dict:
    """Of the variant beside the model as it is."""
    rows = {row["variant"]: row for row in data["rows"] if row["status"] == "measured"}
    return {
        name: {
            "prefill_ms": row["prefill"]["ms_p50"],
            "step_ms": row["decode"]["ms_p50"],
            "kv_bytes": row["kv_bytes_held"],
        }
        for name, row in rows.items()
    }


def pair(entry: str, scale: float, digits: int):
    """A cell: before -> after."""

    def cell(found: dict) -> str:
        values = [row[entry] * scale for row in found.values()]
        return " → ".join(f"{value:,.{digits}f}" for value in values)

    return cell


MEASURE = recipe("measure", take, contexts=(4096,), batches=(1,), seconds=10.0, output=None)

SUBJECT = Subject(
    "Decoding after 4,096 tokens, one sequence",
    [
        Step("sliding(window=512, sinks=4)", MEASURE, {"pattern": "sliding(window=512, sinks=4)"}),
        Step("int4 cache", MEASURE, {"cache": "int4"}),
    ],
    {
        "prefill, s": pair("prefill_ms", 1e-3, 1),
        "step, ms": pair("step_ms", 1, 0),
        "cache, MB": pair("kv_bytes", 1e-6, 1),
    },
    note="Wall times of a loaded machine: the two of a row took turns, rows cannot be compared.",
)
