"""The tables of a measurement."""

from __future__ import annotations

from effattn.measuring.operations import NAMES
from effattn.measuring.report_rows import (
    amount,
    by_operation,
    measured_rows,
    peak,
    place_of,
    several_batches,
    short,
    shown_place,
    shown_rows,
)
from effattn.measuring.rows import MEASURED
from effattn.reports.tables import Table, data_size, pairs

MEMORY_NOTE = (
    "Peaks are the most memory at once: weights, cache and activations. Predicted by the cost "
    "model from shapes alone; measured is what torch's allocator gave out. KV bytes are those of "
    "the whole batch after the prefill."
)


def main_table(report) -> Table:
    """The headline table: a line for each row, those that do not fit included."""
    batches, first = several_batches(report), report.variants[0]
    several = len(report.variants) > 1
    launched = any("host_ms" in row["decode"] for row in measured_rows(report))
    header = [
        "Variant",
        "Context",
        *(["Batch"] if batches else []),
        "First token (ms)",
        "ms/token",
        *(["Host (ms)"] if launched else []),
        "Tokens/s",
        "Peak memory",
        "KV cache",
        "GB/s",
        "Of peak",
    ]
    header += [f"First token vs {first}", f"Decode vs {first}"] if several else []
    rows = []
    for row in report.rows:
        start = [row["variant"], f"{row['context']:,}", *([f"{row['batch']}"] if batches else [])]
        if row["status"] != MEASURED:
            need = f"does not fit: needs {data_size(row['needs_bytes'])}"
            rows.append([*start, need, *["-"] * (len(header) - len(start) - 1)])
            continue
        decode = row["decode"]
        cells = [
            short(row["prefill"]["ms_p50"]),
            short(decode["ms_p50"]),
            *([short(decode["host_ms"])] if launched else []),
            f"{decode['tokens_per_s']:,.1f}",
            data_size(peak(row)),
            data_size(row["kv_bytes_held"]),
            f"{decode['bytes_per_s'] / 1e9:.1f}",
            _percent(decode["bandwidth_share"]),
        ]
        cells += (
            [_ratio(report.ratio(row, phase)) for phase in ("prefill", "decode")] if several else []
        )
        rows.append([*start, *cells])
    note = (
        "Medians. GB/s: weights, cache and activations that a decode step must move at least, "
        "over its time; of peak: of the read bandwidth measured on this device."
    )
    if launched:
        note += (
            " ms/token is the GPU's own time; the host launches the next token meanwhile, and "
            "tokens/s are those of the slower of the two."
        )
    if several:
        note += f" The last columns are ratios of speed: above 1x is faster than {first}."
    return Table("Time and memory", header, rows, note)


def spread_table(report) -> Table:
    """p20, p50 and p80 of both phases."""
    rows = []
    for row in measured_rows(report):
        for phase, label in (("prefill", "first token"), ("decode", "token")):
            spread = row[phase]
            times = [short(spread[f"ms_{p}"]) for p in ("p20", "p50", "p80")]
            rows.append([*place_of(row), label, *times, f"{spread['rounds']}"])
    header = (
        "Variant",
        "Context",
        "Batch",
        "Time to",
        "p20 (ms)",
        "p50 (ms)",
        "p80 (ms)",
        "Rounds",
    )
    return Table("Spread", header, rows, "The variants took turns, pass by pass.", folded=True)


def limit_table(report) -> Table:
    """Work, traffic and their shares of the measured peaks."""
    rows = []
    for row in measured_rows(report):
        for phase in ("prefill", "decode"):
            one = row[phase]
            moved = one["read_bytes"] + one["write_bytes"]
            rows.append(
                [
                    *place_of(row),
                    phase,
                    amount(one["flops"] / 1e9),
                    amount(moved / 1e9),
                    amount(one["intensity"]),
                    amount(one["flops_per_s"] / 1e9),
                    _percent(one["compute_share"]),
                    amount(one["bytes_per_s"] / 1e9),
                    _percent(one["bandwidth_share"]),
                ]
            )
    header = (
        "Variant",
        "Context",
        "Batch",
        "Phase",
        "GFLOP",
        "GB moved",
        "FLOP/byte",
        "GFLOP/s",
        "Of matmul peak",
        "GB/s",
        "Of read peak",
    )
    note = "GFLOP and GB are the least that a pass must compute and move, from the cost model."
    return Table("Against the measured peaks", header, rows, note)


def memory_table(report) -> Table:
    """Predicted beside measured."""
    rows = []
    for row in measured_rows(report):
        peaks = []
        for phase in ("prefill", "decode"):
            measured, predicted = row[phase]["peak_bytes"], row[phase]["peak_bytes_predicted"]
            off = f" ({100 * (predicted / measured - 1):+.1f} %)" if measured and predicted else ""
            peaks += [data_size(measured), data_size(predicted) + off]
        sizes = [data_size(row[key]) for key in ("weight_bytes", "kv_bytes", "kv_bytes_held")]
        rows.append([*place_of(row), *sizes, *peaks])
    header = (
        "Variant",
        "Context",
        "Batch",
        "Weights",
        "KV predicted",
        "KV held",
        "Prefill peak",
        "predicted",
        "Decode peak",
        "predicted",
    )
    return Table("Memory", header, rows)


def operation_table(report) -> Table:
    """Milliseconds of each operation over all layers, at the longest context measured, smallest
    batch.
    """
    columns = {
        f"{row['variant']}, {phase}": by_operation(row[phase])
        for row in shown_rows(report)
        for phase in ("prefill", "decode")
    }
    rows = []
    for name in NAMES:
        cells = [
            f"{short(sums[name])} ({sums[name] / sum(sums.values()):.0%})" if name in sums else "-"
            for sums in columns.values()
        ]
        if any(cell != "-" for cell in cells):
            rows.append([name, *cells])
    note = (
        f"At {shown_place(report)}. Medians of passes of their own with forward hooks, summed "
        "over the layers; attention includes rotation and the cache's update, other is what runs "
        "between the modules."
    )
    return Table("Time by operation", ("ms (share)", *columns), rows, note)


def layer_table(report) -> Table:
    """Every operation of every layer, with what it had to move and compute."""
    rows = []
    for row in shown_rows(report):
        for phase in ("prefill", "decode"):
            for one in row[phase]["operations"]:
                times = [short(one[f"ms_{p}"]) for p in ("p20", "p50", "p80")]
                seconds, work = one["ms_p50"] / 1000, ["-"] * 4
                if one["bytes"] is not None and seconds > 0:
                    work = [
                        f"{value:,.3g}"
                        for value in (
                            one["flops"] / 1e6,
                            one["bytes"] / 1e6,
                            one["flops"] / seconds / 1e9,
                            one["bytes"] / seconds / 1e9,
                        )
                    ]
                layer = "-" if one["layer"] is None else str(one["layer"])
                rows.append([row["variant"], phase, layer, one["name"], *times, *work])
    header = (
        "Variant",
        "Phase",
        "Layer",
        "Operation",
        "p20 (ms)",
        "p50 (ms)",
        "p80 (ms)",
        "MFLOP",
        "MB",
        "GFLOP/s",
        "GB/s",
    )
    return Table("Every operation", header, rows, f"At {shown_place(report)}.", folded=True)


def settings_tables(report) -> list[Table]:
    """What was asked for, of what model, on what machine."""
    settings = {key: value for key, value in report.settings.items() if key != "variants"}
    listed = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
    }
    listed |= {
        f"variant {variant['name']}": variant["spec"] for variant in report.settings["variants"]
    }
    known = {
        key: value for key, value in report.data["peaks"].items() if not isinstance(value, dict)
    }
    for key, unit in (
        ("copy_bytes_per_s", "GB/s"),
        ("read_bytes_per_s", "GB/s"),
        ("write_bytes_per_s", "GB/s"),
    ):
        if known.get(key):
            known[key] = f"{known[key] / 1e9:.1f} {unit}"
    if known.get("launch_seconds"):
        known["launch_seconds"] = f"{1e6 * known['launch_seconds']:.2f} microseconds"
    known |= {
        f"matmul {dtype}": f"{value / 1e9:,.0f} GFLOP/s" if value else "not available"
        for dtype, value in report.data["peaks"]["matmul_flops"].items()
    }
    return [
        pairs("Settings", listed),
        pairs("Model", report.data["model"]),
        pairs("The device's measured peaks", known, missing="not available"),
        pairs("Environment", report.data["environment"]),
    ]


def notes(report) -> list[str]:
    """What a reader must know to read the numbers right."""
    found, model = [], report.data["model"]
    trained = model["trained_length"]
    if trained and max(report.settings["contexts"]) > trained:
        found.append(
            f"The model was trained at {trained:,} tokens: times and memory do not depend on "
            "that, what it says past it does. A sliding window with sinks goes on past it."
        )
    if any("heads" in variant["axes"] for variant in report.settings["variants"]):
        found.append(
            "Variants with other heads were converted without data (method first): the speed is "
            "that of any conversion, the text is not. effattn convert-gqa makes a good one."
        )
    if (
        any(row["status"] == MEASURED and not row["alternated"] for row in report.rows)
        and len(report.variants) > 1
    ):
        found.append(
            "Where the variants did not fit into memory together, they were measured one after "
            "the other."
        )
    return found


def every_table(report) -> list[Table]:
    """All of them, the headline first; those without rows are left out."""
    found = [
        main_table(report),
        spread_table(report),
        limit_table(report),
        operation_table(report),
        layer_table(report),
        memory_table(report),
        *settings_tables(report),
    ]
    return [table for table in found if table.rows]


def _percent(share: float | None) -> str:
    return (
        "unknown"
        if share is None
        else f"{100 * share:.0f} %"
        if share >= 0.1
        else f"{100 * share:.1f} %"
    )


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
