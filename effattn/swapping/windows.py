"""Windows by head: the smallest ones under which attention still gives what it gives.

    plan = effattn.fit_windows(model, tokens, error=0.05)
    effattn.swap(model, plan)                    # sliding(window=[64, None, 256, ...]) by layer

Most heads look back a little, some everywhere (DuoAttention, arXiv:2410.10819; RazorAttention,
arXiv:2407.15891). Here nothing is trained: each head's error with each window of a ladder of powers
of two is measured on text, and windows shrink where they save the most bytes for the least error.

B: rows; T: tokens; Hq, Hkv: query and key/value heads; D: hidden size; Dv: of a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effattn import registry
from effattn.calibration.layerwise import windows
from effattn.hf import anatomy as hf
from effattn.hf.beginning import bos_of
from effattn.hf.placement import present
from effattn.linearizing.inputs import exact, projections_of

LEAST = 16  # the smallest window of the ladder
ROWS = 4  # windows of text at most
LAYERS = 4  # whose q, k and v are held at a time


class WindowPlan(dict[str, str]):
    """layer -> spec, as `effattn.swap` takes it. `errors`: by layer, the relative error of the
    attention module's output on the calibration text."""

    def __init__(self, specs: dict[str, str], errors: list[float]):
        super().__init__(specs)
        self.errors = errors


@torch.no_grad()
def fit_windows(
    model: nn.Module,
    calibration: Tensor,
    *,
    error: float = 0.05,
    sinks: int = 4,
    length: int = 2048,
) -> WindowPlan:
    """A plan for `swap`: by layer and K/V head the windows, powers of two from 16 on or None (the
    head sees everything), whose bytes are fewest while RMS(change) / RMS(output) of each layer's
    attention output (after its output projection) is at most `error`.

    model: a causal LM that is not swapped, and is as before afterwards. calibration: token ids (N,)
    int64, of which up to four windows of `length` tokens are read: windows of half of that and more
    are not distinguished from None. sinks: first tokens that all heads see, measured where they are
    in the text, not at their place in the cache. A layer in which no
    head can spare a token gets "dense", as one with a shorter window of its own does, which it
    keeps. Raises ValueError for bad arguments, Unsupported for a
    model whose projections have no numbers to read."""
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 1:
        raise ValueError(f"error: got {error!r}, valid is a number between 0 and 1")
    for name, value, least in (("sinks", sinks, 0), ("length", length, 4 * LEAST)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: got {value!r}, valid is a whole number of at least {least}")
    parts = hf.of(model)
    check_calibration(calibration, length)
    some = windows(calibration[: ROWS * length], length, ROWS, bos_of(model))[0]
    specs, errors = {}, []
    for first in range(0, len(parts.layers), LAYERS):
        chosen = parts.layers[first : first + LAYERS]
        found = projections_of(model, some, [layer.index for layer in chosen], scaled=True)
        for layer in chosen:
            if forgets(layer, length):
                specs[str(layer.index)] = "dense"
                errors.append(0.0)
                continue
            with present(layer.o.module):
                weight = layer.o.by_head.float()
            spec, left = _fit(found[layer.index], weight, error, sinks, layer.softcap)
            specs[str(layer.index)] = spec
            errors.append(left)
    return WindowPlan(specs, errors)


def forgets(layer, length: int) -> bool:
    """Whether a layer of the anatomy has a window of its own, shorter than `length`: what it sees
    is no more than that, and it stays ("dense" is its own attention)."""
    return layer.own_window is not None and layer.own_window < length


def check_calibration(tokens: Tensor, length: int) -> None:
    """ValueError for what is no token ids (N,), or fewer than `length`."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else tokens
        raise ValueError(f"calibration: got {got}, valid is an int64 tensor (N,) of token ids")
    if len(tokens) < length:
        raise ValueError(
            f"calibration: got {len(tokens):,} tokens, valid are at least length={length:,}"
        )


def _fit(
    qkv: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    error: float,
    sinks: int,
    softcap: float | None,
) -> tuple[str, float]:
    """The spec of one layer, and its error. weight (Hq, D, Dv): of the output projection; softcap:
    of the layer's scores."""
    q, k, v = (x.float() for x in qkv)
    kv_heads, tokens = k.shape[1:3]
    truth = exact(q, k, v, softcap=softcap)
    whole = projected(truth, weight).square().sum()
    ladder = [2**power for power in range(int(math.log2(LEAST)), int(math.log2(tokens)))]
    # squared errors (Hkv, windows), in the output's space; 0 behind the largest window: everything
    costs = torch.zeros(kv_heads, len(ladder) + 1, dtype=torch.float64)
    for at, window in enumerate(ladder):
        backend = registry.backend("sliding", window=window, sinks=sinks)
        change = backend(q, k, v, softcap=softcap) - truth
        costs[:, at] = _by_group(change, weight, kv_heads) / whole
    costs = costs.flip(1).cummax(dim=1).values.flip(1)  # a larger window is never worse
    places = _shrink(costs, [*ladder, tokens], error**2)
    # heads' errors add up as numbers with signs do, so that their sum may be more than each says
    while True:
        spec = spec_of([*ladder, None], places, sinks)
        change = registry.backend(spec)(q, k, v, softcap=softcap) - truth
        left = (projected(change, weight).square().sum() / whole).sqrt().item()
        if left <= error or all(place == len(ladder) for place in places):
            return spec, left
        some = [head for head in range(kv_heads) if places[head] < len(ladder)]
        worst = max(some, key=lambda head: float(costs[head, places[head]]))
        places[worst] += 1


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, Hq, T, Dv) through the output projection: (B, T, D)."""
    return torch.einsum("bhtv,hDv->btD", x, weight)


def _by_group(change: Tensor, weight: Tensor, kv_heads: int) -> Tensor:
    """Squares of what the heads of each K/V head change in the output, (Hkv,) float64."""
    groups = zip(change.chunk(kv_heads, dim=1), weight.chunk(kv_heads), strict=True)
    found = [projected(own, part).square().sum().double() for own, part in groups]
    return torch.stack(found).cpu()


def _shrink(costs: Tensor, sizes: list[int], most: float) -> list[int]:
    """Which window each head gets, so that the costs (Hkv, windows) add up to `most` at most: from
    the largest on, the step that saves the most tokens for what it costs, as long as one fits."""
    places = [len(sizes) - 1] * len(costs)
    spent = 0.0
    while True:
        best, gain = None, 0.0
        for head, place in enumerate(places):
            for smaller in range(place):
                more = float(costs[head, smaller] - costs[head, place])
                saved = sizes[place] - sizes[smaller]
                if spent + more <= most and saved / (more + 1e-12) > gain:
                    best, gain = (head, smaller, more), saved / (more + 1e-12)
        if best is None:
            return places
        places[best[0]] = best[1]
        spent += best[2]


def spec_of(ladder: list[int | None], places: list[int], sinks: int) -> str:
    """The spec of heads that have these places of the ladder."""
    chosen = [ladder[place] for place in places]
    if all(one is None for one in chosen):
        return "dense"
    beside = f", sinks={sinks}" if sinks else ""
    return f"sliding(window={chosen}{beside})"
