"""What every attention backend must keep to, as one call that you can run on your own.

    effattn.conformance.check("sliding(window=5, sinks=2)")
    report = effattn.conformance.check(MyBackend(window=5), dtype=torch.bfloat16, causal=False)
    print(report)                                     # each property, and the largest error found

A property that does not hold raises `Violation`, naming it. "Close" is measured, not guessed: at
most twice the error of plain torch in the same dtype, both against the backend's own fp64
reference, or 0.005 of its RMS (gradients).

Shapes: q (B, Hq, T, D), k and v (B, Hkv, T, D).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch

from effattn.errors import Unsupported, check_choice
from effattn.interface import Backend
from effattn.registry import backend as by_name

from . import layouts, outputs, packed, states
from .case import SIZES, Case, Report, Violation, inputs, relative

__all__ = ["PROPERTIES", "Case", "Report", "Violation", "check", "inputs", "relative"]

PROPERTIES: dict[str, Callable[[Case], float | None]] = {
    holds.__name__: holds
    for holds in (
        outputs.accuracy,
        outputs.future,
        outputs.last_queries,
        outputs.padding,
        outputs.blind_rows,
        states.decode,
        outputs.batch,
        outputs.grouped_heads,
        outputs.gradients,
        outputs.gradcheck,
        states.state_bytes,
        states.state_moves,
        states.state_dict,
        outputs.poisoned_memory,
        layouts.layouts,
        packed.documents,
    )
}


def check(
    backend: str | Backend,
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lengths: tuple[int, ...] = (1, 2, 4, 5, 6, 13, 37),
    sizes: tuple[int, int, int, int] = SIZES,
    properties: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Report:
    """Checks `backend` (a spec, or a `Backend`) with random inputs. Raises Violation at the first
    broken property.

    A backend is run as it is, its `impl` included, and held to a copy of itself whose `impl` is
    "reference". lengths: of the sequences; choose them around your windows. sizes: batch (2 or
    more), query heads, key/value heads, head size. properties: only these (`PROPERTIES` has all).
    ValueError for unknown ones, Unsupported for a direction that the backend's traits exclude
    (which is itself checked)."""
    backend = (
        (by_name(backend) if isinstance(backend, str) else copy.deepcopy(backend)).to(device).eval()
    )
    for name in properties or ():
        check_choice("properties", name, PROPERTIES)
    setting = (
        f"impl={backend.impl}, {str(dtype).removeprefix('torch.')}, "
        f"{'causal' if causal else 'bidirectional'}"
    )
    report = Report(str(backend), setting)
    if not getattr(backend.traits, "causal" if causal else "bidirectional"):
        q, k, v = inputs(4, dtype, device, seed, sizes)
        with contextlib.suppress(Unsupported):
            backend(q, k, v, causal=causal)
            raise Violation(f"{report.backend}: traits: causal={causal} is excluded, but it ran")
        raise Unsupported(
            f"{backend.name}: causal={causal} is excluded by its traits; it refuses, as it should"
        )
    case = Case(backend, causal, dtype, device, tuple(lengths), seed, sizes)
    for name in properties or PROPERTIES:
        try:
            with torch.no_grad():
                report.properties[name] = PROPERTIES[name](case)
        except Violation as broken:
            raise Violation(f"{report.backend}, {setting}: {name}: {broken}") from None
    return report
