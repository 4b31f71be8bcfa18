"""The tables of a conversion report."""

from __future__ import annotations

from effattn.heads.report_data import ConversionData
from effattn.heads.report_plots import ERRORS
from effattn.reports.common import begun_with, curve_table, decode_table, harness_tables
from effattn.reports.tables import UNKNOWN, Table, number, pairs, percent

DECODE_NOTE = (
    "Context in tokens. Greedy single-token steps, the models taking turns; tokens/s of the whole "
    "batch."
)


def _spread(timed: dict) -> str:
    low, middle, high = (timed.get(f"ms_p{p}") for p in (20, 50, 80))
    return UNKNOWN if None in (low, middle, high) else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _quality_table(report: ConversionData) -> Table:
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
        f"({quality.get('source') or 'unnamed source'}) in windows of "
        f"{number(quality.get('context'))}{begun_with(quality)}."
    )
    header = ("", "Before", "After conversion", "After uptraining")
    return Table("Before and after", header, rows, note if quality else "")


def _step_table(report: ConversionData) -> Table:
    rows = []
    for row in report.decode:
        before, after = row.get("before") or {}, row.get("after") or {}
        place = [number(row["context"]), number(row.get("batch"))]
        rows.append([*place, _spread(before), _spread(after)])
    header = ("Context", "Batch", "Before (ms)", "After (ms)")
    note = "Milliseconds: p50 (p20 to p80)."
    return Table("Time of a decoding step", header, rows, note, folded=True)


def _verification_table(report: ConversionData) -> Table:
    names = {
        "fresh_process": "Loaded by plain transformers in a fresh process",
        "max_logit_difference": "Largest logit difference after loading",
        "kv_heads_in_cache": "KV heads in its cache",
        "cache_shape": "Cache shape of a layer",
        "class": "Class it loads as",
    }
    expected = list(names)[:4] if report.plain else []
    facts = {**dict.fromkeys(expected), **report.verification}
    rows = [(names.get(key, key), number(value)) for key, value in facts.items()]
    return Table("Verification", ("Check", "Result"), rows, facts=True)


def _layer_table(report: ConversionData) -> Table:
    # keys and values have errors of their own where heads were merged
    known = [key for key in ERRORS if any(key in row for row in report.layers)]
    rows = [
        [number(row["layer"]), *(number(row.get(key)) for key in known)] for row in report.layers
    ]
    labels = [ERRORS[key][0] for key in known]
    header = ("Layer", *(label[0].upper() + label[1:] for label in labels))
    note = "Squared norm of the difference to the parent over the squared norm of the parent's."
    return Table("Relative error by layer", header, rows, note, folded=True)


def _uptraining_table(report: ConversionData) -> Table:
    facts = {
        key: value for key, value in report.uptraining.items() if key not in ("curve", "parent")
    }
    if facts.get("share_of_pretraining") is not None:
        facts["share_of_pretraining"] = f"{100 * facts['share_of_pretraining']:.3g} %"
    return pairs("Uptraining", facts, missing="not known")


def tables(report: ConversionData) -> list[Table]:
    """Every table, the headline first; parts that are absent are left out, apart from the
    headline.
    """
    tables = [_quality_table(report)]
    if report.decode:
        tables += [decode_table(report.decode, DECODE_NOTE, detailed=True), _step_table(report)]
    tables += [_verification_table(report)] if report.verification else []
    tables += [_uptraining_table(report)] if report.uptraining else []
    if report.curve:
        tables.append(curve_table("Uptraining curve", "Uptraining tokens", report.curve))
    tables += [_layer_table(report)] if report.layers else []
    names = {"settings": "Settings", "model": "Model", "environment": "Environment"}
    tables += harness_tables(report.data)
    return tables + [
        pairs(title, report.part(name)) for name, title in names.items() if report.part(name)
    ]
