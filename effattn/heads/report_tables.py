"""The tables of a conversion report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.heads.report_plots import ERRORS
from effattn.reports.tables import UNKNOWN, Table, data_size, number, pairs, percent

if TYPE_CHECKING:
    from effattn.heads.report import ConversionReport


def speed_ratio(row: dict) -> float | None:
    """Decoding speed after over before, of one context; None unless both were timed."""
    before, after = ((row.get(when) or {}).get("tokens_per_s") for when in ("before", "after"))
    return after / before if before and after else None


def speed(timed: dict) -> str:
    """Tokens/s of one side of a decoding row, or why there are none."""
    if timed.get("does_not_fit"):
        return f"does not fit (needs {data_size(timed['does_not_fit'])})"
    return f"{timed['tokens_per_s']:,.1f}" if timed.get("tokens_per_s") else UNKNOWN


def _spread(timed: dict) -> str:
    low, middle, high = (timed.get(f"ms_p{p}") for p in (20, 50, 80))
    return UNKNOWN if None in (low, middle, high) else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def heads_text(report: ConversionReport) -> str:
    """The numbers of KV heads, "8 -> 2"."""
    return " -> ".join(number(report.model.get(f"kv_heads_{when}")) for when in ("before", "after"))


def _quality_table(report: ConversionReport) -> Table:
    kv, model = report.kv_bytes_per_token, report.model
    trained = bool(report.uptraining or report.quality.get("uptrained"))
    skipped = UNKNOWN if trained or report.settings.get("uptrain_tokens") else "no uptraining"

    def row(label: str, name: str) -> list[str]:
        before, *after = (
            report.measured(stage, name) for stage in ("before", "converted", "uptrained")
        )
        cells = [
            number(one) + (percent(before, one) if name == "perplexity" else "") for one in after
        ]
        cells[1] = skipped if after[1] is None else cells[1]
        return [label, "-" if name == "kl" else number(before), *cells]

    def fixed(label: str, before: int | None, after: int | None) -> list[str]:
        return [label, number(before), number(after), number(after) if trained else skipped]

    rows = [
        row("Perplexity", "perplexity"),
        row("Cross-entropy (nats/token)", "cross_entropy"),
        row("KL to the parent (nats/token)", "kl"),
        fixed("KV cache (bytes/token)", kv.get("before"), kv.get("after")),
        fixed("Parameters", model.get("parameters_before"), model.get("parameters_after")),
    ]
    quality = report.quality
    note = (
        f"On {number(quality.get('tokens'))} held-out tokens "
        f"({quality.get('source') or 'unnamed source'}) "
        f"in windows of {number(quality.get('context'))}."
    )
    header = ("", "Before", "After conversion", "After uptraining")
    return Table("Before and after", header, rows, note if quality else "")


def _decode_tables(report: ConversionReport) -> list[Table]:
    speeds, times = [], []
    for row in report.decode:
        before, after = row.get("before") or {}, row.get("after") or {}
        ratio = speed_ratio(row)
        speeds.append(
            [
                number(row["context"]),
                number(row.get("batch")),
                speed(before),
                speed(after),
                f"{ratio:.2f}x" if ratio else UNKNOWN,
                data_size(before.get("kv_bytes")),
                data_size(after.get("kv_bytes")),
            ]
        )
        times.append(
            [number(row["context"]), number(row.get("batch")), _spread(before), _spread(after)]
        )
    header = (
        "Context",
        "Batch",
        "Before (tokens/s)",
        "After (tokens/s)",
        "Speed",
        "KV before",
        "KV after",
    )
    note = (
        "Context in tokens. Greedy single-token steps, the models taking turns; tokens/s of "
        "the whole batch."
    )
    header_times = ("Context", "Batch", "Before (ms)", "After (ms)")
    return [
        Table("Decoding", header, speeds, note),
        Table(
            "Time of a decoding step",
            header_times,
            times,
            "Milliseconds: p50 (p20 to p80).",
            folded=True,
        ),
    ]


def _verification_table(report: ConversionReport) -> Table:
    names = {
        "fresh_process": "Loaded by plain transformers in a fresh process",
        "max_logit_difference": "Largest logit difference after loading",
        "kv_heads_in_cache": "KV heads in its cache",
        "cache_shape": "Cache shape of a layer",
        "class": "Class it loads as",
    }
    facts = {**dict.fromkeys(list(names)[:4]), **report.verification}
    rows = [(names.get(key, key), number(value)) for key, value in facts.items()]
    return Table("Verification", ("Check", "Result"), rows, facts=True)


def _layer_table(report: ConversionReport) -> Table:
    rows = [
        [number(row["layer"]), *(number(row.get(key)) for key in ERRORS)] for row in report.layers
    ]
    header = ("Layer", *(label[0].upper() + label[1:] for label, _ in ERRORS.values()))
    note = "Squared norm of the difference to the parent over the squared norm of the parent's."
    return Table("Relative error by layer", header, rows, note, folded=True)


def _curve_table(report: ConversionReport) -> Table:
    names = ("tokens", "perplexity", "cross_entropy", "kl")
    header = (
        "Uptraining tokens",
        "Perplexity",
        "Cross-entropy (nats/token)",
        "KL to the parent (nats/token)",
    )
    rows = [[number(point.get(name)) for name in names] for point in report.curve]
    return Table("Uptraining curve", header, rows, folded=True)


def _uptraining_table(report: ConversionReport) -> Table:
    facts = {
        key: value for key, value in report.uptraining.items() if key not in ("curve", "parent")
    }
    if facts.get("share_of_pretraining") is not None:
        facts["share_of_pretraining"] = f"{100 * facts['share_of_pretraining']:.3g} %"
    return pairs("Uptraining", facts, missing="not known")


def tables(report: ConversionReport) -> list[Table]:
    """Every table, the headline first; parts that are absent are left out, apart from the
    headline.
    """
    tables = [_quality_table(report)]
    tables += _decode_tables(report) if report.decode else []
    tables += [_verification_table(report)] if report.verification else []
    tables += [_uptraining_table(report)] if report.uptraining else []
    tables += [_curve_table(report)] if report.curve else []
    tables += [_layer_table(report)] if report.layers else []
    names = {"settings": "Settings", "model": "Model", "environment": "Environment"}
    return tables + [
        pairs(title, report.part(name)) for name, title in names.items() if report.part(name)
    ]
