"""One row of a measurement: what had to be moved and computed, what it took, and so the share of
the device's limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from effattn.hf import anatomy
from effattn.measuring.operations import Key, merged_name
from effattn.profiling.cost import ModelCost
from effattn.profiling.device import Peaks
from effattn.profiling.timing import pace, percentiles

MEASURED, TOO_LARGE = "measured", "does not fit"


def does_not_fit(name: str, context: int, batch: int, need, free: int | None) -> dict:
    """The row of a variant for which there is no memory: bytes beyond the weights that it needs,
    and that there are.
    """
    return {
        "variant": name,
        "context": context,
        "batch": batch,
        "status": TOO_LARGE,
        "needs_bytes": need.peak,
        "available_bytes": free,
        "weight_bytes": need.decode.weight_bytes,
        "kv_bytes": need.prefill.kv_bytes,
    }


def measured_row(
    model: nn.Module,
    name: str,
    context: int,
    batch: int,
    found: dict,
    prefill: ModelCost,
    step: ModelCost,
    limits: Peaks,
    alternated: bool,
) -> dict:
    """JSON-able. `found` is what `lanes.measure_together` saw of this variant, `prefill` and `step`
    are what the cost model says of both (the step is the middle one of those timed). Times in ms,
    on the device; a GPU's phases have the host's beside them, and tokens per second are those of
    the slower of the two. Sizes in bytes of the whole batch."""
    parts = anatomy.of(model)
    dtype = str(parts.layers[0].dtype).removeprefix("torch.")
    held = found["kv_bytes_held"]
    phases = {
        "prefill": _phase(parts, found["prefill"], prefill, limits, dtype),
        "decode": _phase(parts, found["decode"], step, limits, dtype),
    }
    phases["decode"] |= {
        "tokens_per_s": batch / pace(percentiles(found["decode"]["seconds"])),
        "past": found["decode"]["past"],
    }
    prefills = percentiles(found["prefill"]["seconds"])
    phases["prefill"]["tokens_per_s"] = batch * context / pace(prefills)
    return {
        "variant": name,
        "context": context,
        "batch": batch,
        "status": MEASURED,
        "alternated": alternated,
        "weight_bytes": step.weight_bytes,
        "kv_bytes": prefill.kv_bytes,
        "kv_bytes_held": held,
        "activation_bytes": {"prefill": prefill.activation_bytes, "decode": step.activation_bytes},
        **phases,
    }


def _phase(parts, found: dict, cost: ModelCost, limits: Peaks, dtype: str) -> dict:
    """Times, peaks and shares of prefill or decode."""
    spread = _ms(found["seconds"])
    seconds = spread["ms_p50"] / 1000
    total = cost.total
    moved = total.read_bytes + total.write_bytes
    added = found["peak"]["bytes"]
    compute = limits.matmul_flops.get(dtype)
    return {
        **spread,
        "flops": total.flops,
        "read_bytes": total.read_bytes,
        "write_bytes": total.write_bytes,
        "intensity": total.flops / moved if moved else None,
        "flops_per_s": total.flops / seconds,
        "compute_share": _share(total.flops / seconds, compute),
        "bytes_per_s": moved / seconds,
        "bandwidth_share": _share(moved / seconds, limits.read_bytes_per_s),
        "peak_bytes": None
        if added is None
        else cost.weight_bytes + found["peak"].get("held", 0) + added,
        "peak_bytes_predicted": cost.peak_bytes,
        "peak_source": found["peak"]["source"],
        "kv_read_bytes": sum(one.kv_bytes for one in cost.operations if one.name == "attention"),
        "operations": _operations(parts, found["operations"], cost),
        "bytes_by_kind": bytes_by_kind(cost),
    }


def bytes_by_kind(cost: ModelCost) -> dict[str, int]:
    """What a pass moves at least, by what it is: weights of each kind, keys and values, and
    everything else.
    """
    ends = "other weights"
    kinds = {"attention weights": 0, "FFN weights": 0, ends: 0}
    names = {"ffn": "FFN weights", "embedding": ends, "norms": ends, "head": ends}
    keys = moved = 0
    for one in cost.operations:
        kinds[names.get(one.name, "attention weights")] += one.weight_bytes
        keys += one.kv_bytes
        moved += one.cost.read_bytes + one.cost.write_bytes
    weights = sum(kinds.values())
    return {**kinds, "keys and values": keys, "activations": max(0, moved - weights - keys)}


def _operations(parts, found: dict[Key, list[float]], cost: ModelCost) -> list[dict]:
    """Per layer and operation: times of its own, and what it had to move and compute."""
    costs: dict[Key, list[int]] = {}
    for one in cost.operations:
        sums = costs.setdefault((one.layer, merged_name(parts, one.name)), [0, 0])
        sums[0] += one.cost.flops
        sums[1] += one.cost.read_bytes + one.cost.write_bytes
    rows = []
    for (layer, name), seconds in found.items():
        flops, moved = costs.get((layer, name), (None, None))
        rows.append({"layer": layer, "name": name, **_ms(seconds), "flops": flops, "bytes": moved})
    return sorted(rows, key=lambda row: (row["layer"] is None, row["layer"] or 0))


def _ms(seconds: Sequence[float]) -> dict:
    found = percentiles(seconds)
    times = {f"ms_{key}": 1000 * found[key] for key in ("p20", "p50", "p80")}
    host = {"host_ms": 1000 * found["host_p50"]} if "host_p50" in found else {}
    return times | {"rounds": found["rounds"]} | host


def _share(reached: float, limit: float | None) -> float | None:
    return reached / limit if limit else None
