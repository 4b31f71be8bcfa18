"""The tables of a report of quantized caches."""

from __future__ import annotations

from effattn.evaluate.retrieval import score
from effattn.quant.sensitivity.report_data import QuantizeData, change
from effattn.reports.common import about, begun_with
from effattn.reports.plots import short_count
from effattn.reports.tables import UNKNOWN, Table, data_size, number, pairs

QUALITY, LAYERS, PLAN_TITLE = "Quality, token by token", "Each layer alone", "Plan"
RETRIEVAL, MEMORY, HELD, SPEED = (
    "Retrieval",
    "Memory: weights and cache",
    "Bytes, predicted and held",
    "Decoding",
)
TERMINAL = (QUALITY, LAYERS, PLAN_TITLE, RETRIEVAL, SPEED)
NATS = "nats/token"


def whole(size: float) -> str:
    """A number of bytes a token, which may be broken."""
    return f"{size:,.0f}" if size == int(size) else f"{size:,.2f}"


def tables(report: QuantizeData) -> list[Table]:
    """Every table that the report has something for."""
    data = report.data
    found = [
        _quality(report),
        *_layers(report),
        *_plan(report),
        *_retrieval(report),
        _memory(report),
        _held(report),
    ]
    found += _speed(report)
    if data["verification"]:
        facts = {
            key: ", ".join(dict.fromkeys(value)) if isinstance(value, list) else value
            for key, value in data["verification"].items()
        }
        found.append(pairs("Checkpoint, loaded again", {"cache": str(data["saved"])} | facts))
    return [*found, *about(data)]


def _quality(report: QuantizeData) -> Table:
    full, rows = report.full["bytes_per_token"], []
    for row in report.rows:
        found, size = row["quality"], row["bytes_per_token"]
        moved, error = change(found), found["loss_error"]
        moved = (
            UNKNOWN
            if moved is None
            else f"{moved:+.3f} %" + ("" if error is None else f" ± {100 * error:.3f}")
        )
        rows.append(
            [
                row["name"],
                whole(size),
                f"{full / size:.2f}x",
                number(found["perplexity"]),
                moved,
                number(found["kl"]),
                f"{100 * found['agreement']:.2f} %",
            ]
        )
    header = (
        "Cache",
        "Bytes/token",
        "Smaller",
        "Perplexity",
        "Change",
        f"KL ({NATS})",
        "Same top token",
    )
    quality = report.full["quality"]
    begun = begun_with(report.data["settings"])
    note = (
        f"{quality['tokens']:,} held-out tokens in windows of {quality['length']:,}{begun}, each "
        "token a decoding step that reads the packed cache. Bytes are those of a packed token in "
        "all layers, scales included; the newest tokens (residual) stay in full precision. "
        "± is the standard error of the change, tokens being paired."
    )
    adapted = [f"{row['name']}: {row['adapted']}" for row in report.rows if row["adapted"]]
    note += f" Adapted: {'; '.join(adapted)}." if adapted else ""
    return Table(QUALITY, header, rows, note)


def _layers(report: QuantizeData) -> list[Table]:
    """KL of each format in each layer alone."""
    alone = report.data["sensitivity"]
    if not alone and not report.data["settings"].get("sensitivity_tokens", 1):
        names = [row["name"] for row in report.rows[1:]]
        note = "Left out: sensitivity_tokens is 0. Without it there is no plan."
        return [Table(LAYERS, ("Layer", *names), [["each", *(UNKNOWN for _ in names)]], note)]
    if not alone:
        return []
    specs = list(dict.fromkeys(row["spec"] for row in alone))
    kl = {(row["layer"], row["spec"]): row["kl"] for row in alone}
    layers = list(dict.fromkeys(row["layer"] for row in alone))
    rows = [[str(layer), *(number(kl[layer, spec]) for spec in specs)] for layer in layers]
    rows.append(["sum", *(number(sum(kl[layer, spec] or 0 for layer in layers)) for spec in specs)])
    together = {row["name"]: row["quality"]["kl"] for row in report.rows}
    rows.append(["all at once, measured", *(number(together.get(spec)) for spec in specs)])
    note = (
        f"KL to the full cache ({NATS}) with that layer's cache quantized and all others full, on "
    )
    note += (
        f"{report.data['settings']['sensitivity_tokens']:,} tokens (all at once: on all of them)."
    )
    return [Table(LAYERS, ("Layer", *specs), rows, note)]


def _plan(report: QuantizeData) -> list[Table]:
    plan = report.data["plan"]
    if plan is None:
        return []
    kl = {(row["layer"], row["spec"]): row["kl"] for row in report.data["sensitivity"]}
    rows = [
        [f"layer {index}", spec, number(kl.get((index, spec), 0.0))]
        for index, spec in enumerate(plan["specs"])
    ]
    note = (
        f"The least sum of KLs within {plan['budget']:,g} bytes a token: it takes "
        f"{whole(plan['bytes_per_token'])}, sums to {number(plan['kl'])}; measured as a whole: "
        f"{number(report.rows[-1]['quality']['kl'])}."
    )
    return [Table(PLAN_TITLE, ("", "Cache", f"KL alone ({NATS})"), rows, note)]


def _retrieval(report: QuantizeData) -> list[Table]:
    found = [row for row in report.data["retrieval"] if row["rows"]]
    refused = {row["task"]: row["reason"] for row in report.data["retrieval"] if not row["rows"]}
    if not found and not refused:
        return []
    names, rows, unlearned = [row["name"] for row in report.rows], [], {}
    for task in dict.fromkeys(row["task"] for row in found):
        lanes = {row["lane"]: row["rows"] for row in found if row["task"] == task}
        for place, parent in enumerate(lanes[names[0]]):
            rows.append(
                [
                    f"{task}, depth {parent['depth']:g}",
                    *(_answered(lanes[name][place]) for name in names),
                ]
            )
            if not parent["learned"]:
                unlearned.setdefault(task, []).append(f"{parent['depth']:g}")
    packed = {
        row["lane"]: row["packed"] for row in report.data["retrieval"] if row["lane"] != names[0]
    }
    guessing = 100 * max(row["chance"] for row in found)
    note = (
        f"In {report.data['settings']['retrieval_length']:,} tokens. Share of right answers and, "
        "in brackets, nats of an answer token; passkey: every token of the key is the most likely "
        "one; recall: the right word is the most likely of those on offer (guessing: "
        f"{guessing:g} %). Depth 0 is the start, 1 right before the question. Tokens packed at "
        f"the end: {', '.join(f'{name} {count:,}' for name, count in packed.items())}."
    )
    if unlearned:
        note += (
            " The model itself has not learned this (less than half way from guessing to all "
            "right): "
        )
        note += "; ".join(f"{task} at {', '.join(depths)}" for task, depths in unlearned.items())
        note += ". There, compare the nats."
    note += "".join(f" {task}: not measured, {reason}." for task, reason in refused.items())
    return [Table(RETRIEVAL, ("Task", *names), rows, note)]


def _answered(cell: dict) -> str:
    return f"{100 * score(cell):.0f} % ({cell['nats']:.2f})"


def _memory(report: QuantizeData) -> Table:
    """Weights and cache together, by context."""
    weights, rows = report.data["model"]["weight_bytes"], []
    for row in report.rows:
        sizes = [one["bytes"] for one in row["memory"]]
        rows.append(
            [row["name"], *(f"{data_size(weights + size)} ({data_size(size)})" for size in sizes)]
        )
    contexts = [f"{short_count(one['context'])} tokens" for one in report.full["memory"]]
    note = (
        f"One sequence: weights ({report.data['model']['weights']}, {data_size(weights)}) and "
        "cache together, in brackets the cache alone, residual included; as predicted."
    )
    return Table(MEMORY, ("Cache", *contexts), rows, note)


def _held(report: QuantizeData) -> Table:
    rows = []
    for row in report.rows:
        for one in row["held"]:
            right = "yes" if one["predicted"] == one["held"] == one["allocated"] else "no"
            rows.append(
                [
                    row["name"],
                    *(number(one[key]) for key in ("tokens", "predicted", "held", "allocated")),
                    right,
                ]
            )
    header = ("Cache", "Tokens", "Predicted (bytes)", "Held by its layers", "Allocated", "Exact")
    note = "One sequence, all layers. Allocated: every storage that the cache keeps alive, whole."
    return Table(HELD, header, rows, note, folded=True)


def _speed(report: QuantizeData) -> list[Table]:
    timed = [row for row in report.data["decode"] if "lane" in row]
    if not report.data["decode"]:
        return []
    plain = {
        (row["context"], row["batch"]): row for row in timed if row["lane"] == report.full["name"]
    }
    rows = []
    for row in timed:
        base = plain[row["context"], row["batch"]]
        rows.append(
            [
                row["lane"],
                number(row["context"]),
                number(row["batch"]),
                f"{row['ms']:.2f}",
                f"{row['ms_p20']:.2f} to {row['ms_p80']:.2f}",
                number(row["tokens_per_s"]),
                f"{base['ms'] / row['ms']:.2f}x",
                data_size(row["kv_bytes"]),
            ]
        )
    header = (
        "Cache",
        "Context",
        "Batch",
        "Step (ms)",
        "p20 to p80",
        "Tokens/s",
        "Speed",
        "Cache (allocated)",
    )
    note = (
        "Greedy single-token steps, the caches taking turns in one process; medians; tokens/s "
        "of the whole batch."
    )
    for row in report.data["decode"]:
        if "does_not_fit" in row:
            note += (
                f" {row['context']:,} tokens x {row['batch']}: not measured, needs "
                f"{data_size(row['does_not_fit'])}."
            )
    return [Table(SPEED, header, rows, note)]
