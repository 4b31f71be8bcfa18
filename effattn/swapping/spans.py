"""Windows by head, learned: Adaptive-Span's soft mask (Sukhbaatar et al. 2019, arXiv:1905.07799).

    plan = effattn.learn_windows(model, tokens, penalty=0.01)
    effattn.swap(model, plan)                    # sliding(window=[64, None, 250, ...]) by layer

Each K/V head has a span z, a number of tokens that is learned: a key at distance d counts by
m(d) = min(max((R + z - d) / R, 0), 1), a ramp of R tokens through which z has a gradient, and
weights are m exp(score) over their sum. Here the spans alone are learned, one layer at a time,
so that the layer's output stays what it is while spans cost something; then each becomes a
plain window.

B: rows; T: tokens; Hq, Hkv: query and key/value heads; D: of a key, Dv: of a value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effattn import registry
from effattn.calibration.layerwise import windows
from effattn.checks import check_positive
from effattn.hf import anatomy as hf
from effattn.hf.beginning import bos_of
from effattn.hf.placement import present
from effattn.linearizing.inputs import exact, projections_of
from effattn.swapping.windows import (
    LEAST,
    WindowPlan,
    check_calibration,
    forgets,
    projected,
    spec_of,
)

ROWS = 4  # windows of text at most
RATE = 0.03  # of Adam, in lengths of a window of text


class AdaptiveSpan(nn.Module):
    """Causal attention under the soft mask, by its definition: T x T scores, forward and backward.

    spans: the parameter, (Hkv,) float32, in shares of `length` tokens, so that it learns alike at
    every length. The first `sinks` keys count in full. softcap: of scores, as Gemma 2's."""

    def __init__(
        self,
        kv_heads: int,
        length: int,
        ramp: int = 32,
        sinks: int = 0,
        softcap: float | None = None,
    ):
        super().__init__()
        self.softcap = softcap
        self.length, self.ramp, self.sinks = length, ramp, sinks
        self.spans = nn.Parameter(torch.ones(kv_heads))

    def mask(self, distance: Tensor) -> Tensor:
        """m of each K/V head at these distances, (Hkv, *distance.shape)."""
        spans = self.length * self.spans.view(-1, *[1] * distance.ndim)
        return ((self.ramp + spans - distance) / self.ramp).clamp(0, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv) -> (B, Hq, T, Dv)."""
        group, place = q.shape[1] // k.shape[1], torch.arange(q.shape[2], device=q.device)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        distance = place[:, None] - place
        counts = self.mask(distance)
        counts = torch.where(place < self.sinks, 1.0, counts).repeat_interleave(group, dim=0)
        scores = q @ k.mT * q.shape[3] ** -0.5
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores = scores.masked_fill(distance < 0, -torch.inf)
        weights = scores.softmax(dim=3) * counts
        return weights / weights.sum(dim=3, keepdim=True) @ v

    @torch.no_grad()
    def shrink(self) -> None:
        """Keeps the spans between 0 and all tokens, after a step."""
        self.spans.clamp_(0, 1)

    def windows(self) -> list[int | None]:
        """Of each K/V head the keys that count for anything, None where that is all of them."""
        # what float32 adds to a whole number is no key more
        keys = (self.length * self.spans.detach() + self.ramp - 1e-3).ceil().int().tolist()
        return [None if count >= self.length else count for count in keys]


def learn_windows(
    model: nn.Module,
    calibration: Tensor,
    *,
    penalty: float = 0.01,
    ramp: int = 32,
    sinks: int = 4,
    length: int = 512,
    steps: int = 60,
    layers: Sequence[int] | None = None,
) -> WindowPlan:
    """A plan for `swap`, as `fit_windows` makes it, with windows of any length that are learned.

    Of each layer is learned what minimises MS(change) / MS(output) of its attention output (after
    the output projection) + penalty * the mean span in shares of `length`, the paper's loss with
    the layer's own output as the target: a larger penalty gives smaller windows. The model itself
    does not learn, and is as before afterwards. calibration: token ids (N,) int64, of which up to
    four windows of `length` are read, one a step. ramp: R in tokens. `errors` of the plan are
    those of the windows that came of it, on all that was read. A layer with a shorter window of
    its own keeps it ("dense"). layers: those that learn, and are in the plan; default all. Raises
    ValueError for bad arguments."""
    check_positive("penalty", penalty)
    least = {"ramp": 1, "sinks": 0, "length": 4 * LEAST, "steps": 1}
    given = {"ramp": ramp, "sinks": sinks, "length": length, "steps": steps}
    for name, value in given.items():
        if type(value) is not int or value < least[name]:
            valid = f"a whole number of at least {least[name]}"
            raise ValueError(f"{name}: got {value!r}, valid is {valid}")
    parts = hf.of(model)
    count = len(parts.layers)
    for index in () if layers is None else layers:
        if type(index) is not int or not 0 <= index < count:
            raise ValueError(f"layers: got {index!r}, the model has layers 0 to {count - 1}")
    check_calibration(calibration, length)
    some = windows(calibration[: ROWS * length], length, ROWS, bos_of(model))[0]
    specs, errors = {}, []
    for layer in parts.layers:
        if layers is not None and layer.index not in layers:
            continue
        if forgets(layer, length):
            specs[str(layer.index)] = "dense"
            errors.append(0.0)
            continue
        with torch.no_grad():
            found = projections_of(model, some, [layer.index], scaled=True)[layer.index]
            with present(layer.o.module):
                weight = layer.o.by_head.detach().float()
        # under inference_mode nothing could learn
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v, weight = (x.detach().clone().float() for x in (*found, weight))
            spans = AdaptiveSpan(k.shape[1], q.shape[2], ramp, sinks, layer.softcap).to(q.device)
            _learn(spans, (q, k, v), weight, penalty, steps)
        chosen = spans.windows()
        specs[str(layer.index)] = spec = spec_of(chosen, [*range(len(chosen))], sinks)
        errors.append(_error(spec, q, k, v, weight, layer.softcap))
    return WindowPlan(specs, errors)


def _learn(spans: AdaptiveSpan, qkv, weight: Tensor, penalty: float, steps: int) -> None:
    """Adam on the spans, one row of text a step."""
    learner = torch.optim.Adam(spans.parameters(), lr=RATE)
    cap = spans.softcap
    truths = [projected(exact(*row, softcap=cap), weight) for row in _rows(*qkv)]
    for step in range(steps):
        place = step % len(truths)
        row, truth = _rows(*qkv)[place], truths[place]
        change = projected(spans(*row), weight) - truth
        loss = change.square().sum() / truth.square().sum() + penalty * spans.spans.mean()
        learner.zero_grad()
        loss.backward()
        learner.step()
        spans.shrink()


def _rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Row by row of tensors (B, ...), each (1, ...)."""
    return list(zip(*(x.split(1) for x in tensors), strict=True))


@torch.no_grad()
def _error(
    spec: str, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, softcap: float | None
) -> float:
    """RMS(change) / RMS(output) of a layer under `spec`."""
    truth = exact(q, k, v, softcap=softcap)
    change = projected(registry.backend(spec)(q, k, v, softcap=softcap) - truth, weight)
    return (change.square().sum() / projected(truth, weight).square().sum()).sqrt().item()
