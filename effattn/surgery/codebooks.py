"""Calibration of patterns that quantize keys: each layer's codebook is fitted to the keys that the
model itself makes.

The model runs once over the calibration text with plain attention, which writes the keys down as
attention sees them, rotated. The model is swapped meanwhile, and as it was afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effattn.calibration.layerwise import windows
from effattn.errors import Unsupported
from effattn.hf.anatomy import Anatomy
from effattn.hf.beginning import bos_of
from effattn.hf.placement import device_of, input_device
from effattn.hf.positions import LayerPositions
from effattn.surgery import plan as planning
from effattn.surgery.attaching import active, attach, detach
from effattn.surgery.plan import LayerPlan

WINDOW = 512  # tokens of a row
BATCH = 4  # rows at a time
PER_CODE = 32  # keys that k-means looks at for each code


class Coded(Protocol):
    """A backend with a codebook: how many words it has, and how they are fitted to keys."""

    codes: int

    def calibrate(self, keys: Tensor) -> None:
        """keys (B, Hkv, T, D)."""
        ...


def _coded(plan: LayerPlan) -> Coded:
    """The backend of a plan that is `wanting`."""
    return cast(Coded, plan.backend)


def wanting(plans: dict[int, LayerPlan]) -> dict[int, LayerPlan]:
    """The plans whose backend has a codebook to fit."""
    return {index: plan for index, plan in plans.items() if hasattr(plan.backend, "calibrate")}


_filled_later: ContextVar[bool] = ContextVar("_filled_later", default=False)


@contextmanager
def filled_later() -> Iterator[None]:
    """A swap in the body gets its codebooks from a checkpoint."""
    before = _filled_later.set(True)
    try:
        yield
    finally:
        _filled_later.reset(before)


def warn_of_random(plans: dict[int, LayerPlan], tokens: Tensor | None) -> None:
    """A warning for codebooks that nothing has fitted: random words fit no trained model's keys."""
    random = [index for index, plan in wanting(plans).items() if not plan.kept]
    if random and tokens is None and not _filled_later.get():
        warnings.warn(
            f"swap: calibration: got none, so the codebooks of {len(random)} layers are random and "
            "the model's output means little; give tokens, or call each backend's calibrate(keys)",
            stacklevel=3,
        )


def check(parts: Anatomy, plans: dict[int, LayerPlan], tokens: Tensor | None) -> None:
    """ValueError for calibration tokens that are no (N,) int64 tensor, or fewer than a codebook has
    words.
    """
    if tokens is None or not wanting(plans):
        return
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype != torch.int64:
        got = (
            f"{tuple(tokens.shape)} {tokens.dtype}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"calibration: got {got}, valid are tokens, int64 (N,)")
    length = _row(parts, tokens)
    count = len(tokens) // length * length if length else 0
    for index, plan in wanting(plans).items():
        if count < _coded(plan).codes:
            raise ValueError(
                f"calibration: layer {index}: {_coded(plan).codes} codes, but {count} tokens in "
                f"rows of {length}: the codebook is larger than the data; valid are more tokens "
                f"or codes <= {count}"
            )


def _row(parts: Anatomy, tokens: Tensor) -> int:
    """Tokens of a row."""
    return min(WINDOW, len(tokens), parts.trained_length or WINDOW)


def fit(
    model: PreTrainedModel, parts: Anatomy, plans: dict[int, LayerPlan], tokens: Tensor
) -> None:
    """Calibrates the backends of `plans` that have a codebook on tokens (N,), of which the first
    ones may suffice.
    """
    # The model is run with "dense" in these layers, whose `attend` writes down the keys: by then
    # they are rotated by the rule that the layer will have.
    rules: dict[int, LayerPositions | None] = {
        index: plan.positions for index, plan in plans.items() if plan.positions is not None
    }
    plans = wanting(plans)
    if active(model) is not None:
        raise Unsupported("calibration: the model is swapped already; effattn.restore(model) first")
    recording = planning.make(parts, dict.fromkeys(map(str, plans), "dense"), {}, rules)
    keys: dict[int, list[Tensor]] = {index: [] for index in plans}
    for index in plans:
        vars(recording[index].backend)["attend"] = _recorder(recording[index].backend, keys[index])
    length = _row(parts, tokens)
    rows = max(_coded(plan).codes for plan in plans.values()) * PER_CODE
    training, device = model.training, input_device(parts.model)
    attach(model, parts, recording)
    try:
        with torch.no_grad():
            for batch in windows(tokens[: max(rows, length)], length, BATCH, bos_of(model)):
                model.eval()(input_ids=batch.to(device))
    finally:
        detach(model)
        model.train(training)
    for index, plan in plans.items():
        _coded(plan).calibrate(torch.cat(keys[index]).to(device_of(parts.layers[index].k.module)))


def _recorder(backend, keys: list[Tensor]):
    run = backend.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, call) -> Tensor:
        keys.append(k.cpu())
        return run(q, k, v, call)

    return attend
