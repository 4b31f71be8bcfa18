"""One case, measured: every contender is checked first, and for a wrong answer no time is printed.
Then they take turns in one process, so that drift and other jobs hit all alike. What cannot run
says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from bench.case import TOLERANCE, Absent, Call, Case, Contender
from effattn.profiling.device import Peaks
from effattn.profiling.memory import PeakMemory
from effattn.profiling.timing import Clock, alternate, percentiles

LEAST, MOST = 3, 50  # timed rounds of a case
LONG = 3.0  # seconds of a call that takes part in two
CALL = 1e-3  # seconds that plans expect of the shortest call


def measure(case: Case, device: torch.device, seconds: float, peaks: Peaks | None = None) -> dict:
    """{"case": its settings, "contenders": {name: row}}. A row has "ours" and either "absent", why
    it cannot run, or "wrong", how its answer is, or "ms_p20", "ms_p50", "ms_p80", "rounds", "error"
    and "peak_bytes"; of a GPU's times also "host_ms", what launching took the host, and "covered",
    whether none of that is in them (`timing.Taken`). For the rounds see `rounds`.

    peak_bytes: the most that one call allocates beyond its inputs. Where the cost is known, also
    "flops", "read_bytes", "write_bytes", "state_bytes" (the fewest possible), "read_gb_per_s", and
    with `peaks` "limit_ms", how long they need on this device at least, and the shares of the
    limits that were reached."""
    rows: dict[str, dict] = {}
    calls: dict[str, Callable] = {}
    made: dict[int, list] = {}
    # of what was checked at a length of its own, once a spec
    errors: dict[tuple, float | None] = {}
    for contender in case.contenders:
        tokens = case.length(contender)
        if tokens not in made:
            made[tokens] = [case.inputs(tokens, device, seed) for seed in range(case.sets(device))]
        try:
            call, error = prepare(contender, case, made[tokens][0], errors)
        except (Absent, ArithmeticError) as reason:
            why = "absent" if isinstance(reason, Absent) else "wrong"
            rows[contender.name] = {"ours": contender.ours, why: str(reason)}
            continue
        rows[contender.name] = {"ours": contender.ours, "error": error} | limits(
            case, contender, peaks
        )
        for inputs in made[tokens][1:]:  # a cache may be packed at the first call with its inputs
            case.once(call, inputs)
        calls[contender.name] = _in_turn(call, case, made[tokens])
    if not calls:
        return {"case": case.described(), "contenders": rows}
    times = rounds(calls, Clock(device, flush=device.type == "cuda"), seconds)
    for name, call in calls.items():
        found = percentiles(times[name])
        rows[name] |= {f"ms_{p}": 1000 * found[p] for p in ("p20", "p50", "p80")} | {
            "rounds": found["rounds"]
        }
        if "host_p50" in found:
            rows[name] |= {"host_ms": 1000 * found["host_p50"], "covered": found["covered"]}
        with PeakMemory(device) as peak:
            call()
        rows[name]["peak_bytes"] = peak.bytes
        if "read_bytes" in rows[name]:
            rows[name] |= reached(rows[name], peaks)
    return {"case": case.described(), "contenders": rows}


def rounds(calls: dict[str, Callable], clock: Clock, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in each round; they take turns, and all of them have run before.

    A slow one must not leave the others with few rounds: after LEAST of them, which those of more
    than a quarter of `seconds` are content with, the rest go on until they have filled `seconds`,
    at most MOST. One round is not counted, but for calls of more than LONG, which have no more than
    two."""
    first, times = (alternate(calls, clock, 0, 1, 1, warmup=0) for _ in range(2))
    took = {name: one for name, (one,) in first.items()}
    left = seconds - LEAST * sum(one for one in took.values() if one <= seconds / 4)
    for limit, least, most, fill in (
        (LONG, LEAST - 1, LEAST - 1, 0),
        (min(LONG, seconds / 4), 1, MOST - LEAST, left),
    ):
        if going := {name: call for name, call in calls.items() if took[name] <= limit}:
            for name, more in alternate(going, clock, max(0, fill), least, most, warmup=0).items():
                times[name] += more
    return {name: first[name] + more if took[name] > LONG else more for name, more in times.items()}


def _in_turn(call: Call, case: Case, sets: list[list[Tensor]]) -> Callable[[], object]:
    turn = count()
    return lambda: case.once(call, sets[next(turn) % len(sets)])


def prepare(
    contender: Contender,
    case: Case,
    inputs: list[Tensor],
    errors: dict[tuple, float | None] | None = None,
) -> tuple[Call, float | None]:
    """The contender's call, compiled and checked, and its largest relative error (None: nothing to
    check). `Absent` where it cannot run, ArithmeticError where its answer is wrong."""
    checked, device = inputs, inputs[0].device
    if contender.check_tokens and contender.check_tokens < case.length(contender):
        checked = case.inputs(contender.check_tokens, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = checks = contender.build(case, checked)
            got = case.answers(checks, checked)
            if checked is not inputs:
                call = contender.build(case, inputs)
                case.once(call, inputs)
    except Absent:
        raise
    except Exception as error:
        # a peer that this version, device or shape does not suit: whatever it raises
        if contender.ours and not isinstance(error, torch.OutOfMemoryError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Absent(f"{type(error).__name__}: {' '.join(lines[:2])[:200]}") from None
    if checked is inputs or errors is None:
        return call, check(contender, case, checked, got, checks)
    key = (contender.spec, contender.build, contender.check_tokens)
    if key not in errors:
        errors[key] = check(contender, case, checked, got, checks)
    return call, errors[key]


def check(
    contender: Contender, case: Case, inputs: list[Tensor], got: dict[str, Tensor], call: Call
) -> float | None:
    """The largest relative error of the answers `got` of `call`. ArithmeticError where one is
    beyond its tolerance.
    """
    if contender.truth is None:
        return None
    worst = 0.0
    for which, right in contender.truth(case, inputs, call).items():
        size, distance = float(_rms(right)), float(_rms(got[which] - right))
        error = distance / size if size else distance
        limit = (contender.tolerance or TOLERANCE[case.dtype]) * (2 if which.startswith("d") else 1)
        if not error <= limit:  # NaN too
            raise ArithmeticError(
                f"{which}: relative error {error:.2e}, at most {limit:.0e} is right"
            )
        worst = max(worst, error)
    return worst


def _rms(x: Tensor) -> Tensor:
    return x.detach().double().square().mean().sqrt()


def limits(case: Case, contender: Contender, peaks: Peaks | None) -> dict:
    """The cost of a call and, with `peaks`, the milliseconds below which this device cannot do
    it.
    """
    cost = case.cost(contender)
    if cost is None:
        return {}
    known = {
        "flops": cost.flops,
        "read_bytes": cost.read_bytes,
        "write_bytes": cost.write_bytes,
        "state_bytes": cost.state_bytes,
    }
    if peaks is None:
        return known
    # Some CPUs only emulate half precision: products of a wider type do as well then.
    wider = [case.dtype, "float32"] if case.dtype in ("bfloat16", "float16") else [case.dtype]
    fastest = max(filter(None, map(peaks.matmul_flops.get, wider)), default=None)
    bounds = [(cost.flops, fastest), (cost.read_bytes, peaks.read_bytes_per_s)]
    return known | {
        "limit_ms": max((1000 * need / rate for need, rate in bounds if rate), default=None)
    }


def reached(row: dict, peaks: Peaks | None) -> dict:
    """At which rate the least bytes were read, and its share of the device's; the time's own share
    of `limit_ms`.
    """
    rate = 1000 * row["read_bytes"] / row["ms_p50"]
    peak = peaks.read_bytes_per_s if peaks else None
    limit = row.get("limit_ms")
    return {
        "read_gb_per_s": rate / 1e9,
        "read_share": rate / peak if peak else None,
        "limit_share": limit / row["ms_p50"] if limit else None,
    }


def estimate(case: Case, peaks: Peaks | None, seconds: float) -> float:
    """Seconds that the case will take, roughly: building, a checked and a warm call, the rounds,
    and one for memory.
    """
    took = []
    for contender in case.contenders:
        limit = (limits(case, contender, peaks).get("limit_ms") or 0.0) / 1000
        took.append(max(CALL, limit / contender.efficiency))
    going = sum(one for one in took if one <= min(LONG, seconds / 4))
    filled = min(max(seconds - LEAST * going, 0), (MOST - LEAST) * going)
    # checked, warm and for memory, too
    before = sum((4 if one > LONG else 3 + LEAST) * one for one in took)
    return sum(one.setup for one in case.contenders) + before + filled + 0.2
