"""Fitting structured projections to a model's weights and data, layer by layer.

    new = fit(asked)                        # of a model in memory; what was asked: `replace.make`
    rows = carry_out(walk, asked)           # on a walk, which writes each layer as it is done

Every matrix is fitted to the second moment of its inputs in the unmodified model. Where a budget is
shared, all spectra come first: one pass more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import watch
from effattn.calibration.statistics import SecondMoment
from effattn.calibration.walk import CHANGED, Progress, Stream, Walk
from effattn.heads.kinds.base import Job
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.source import unplain
from effattn.projections.base import Shared, StructuredLinear
from effattn.surgery.replace import Matrix, Replacement, errors, record, replace, sizing

Sizes = dict[str, dict | None]  # by path: options of a size; None where a matrix stays dense


def fit(asked: Replacement) -> dict[str, nn.Module]:
    """name -> the module that will take its place; what a shared budget leaves dense has none.
    Changes nothing; "data" runs the model layer by layer.
    """
    new: dict[str, nn.Module] = {}
    with _evaluating(asked.parts.model):
        walk = Walk(asked.parts, asked.batches)
        sizes = share_out(walk, asked)

        def step(layer: Layer, *streams: Stream) -> None:
            new.update(_fitted(walk, asked, sizes, layer, streams))

        walk.over("fitted", step, streams=_streams(asked.matrices))
    return new


def carry_out(walk: Walk, asked: Replacement, progress: Progress | None = None) -> list[dict]:
    """Fits and replaces, layer by layer; returns for each {"layer", "matrices": by path what a
    checkpoint says of them}."""
    budgets = _budgets(asked)
    passes, count = 1 + bool(budgets), len(walk.parts.layers)

    def tell(before: int) -> Progress:
        return lambda done, _: progress(before * count + done, passes * count) if progress else None

    sizes = share_out(walk, asked, tell(0))
    model = asked.parts.model

    def step(layer: Layer, *streams: Stream) -> dict:
        new = _fitted(walk, asked, sizes, layer, streams)
        replace(model, new)
        found = record(model)
        return {"layer": layer.index, "matrices": {n: found[n] for n in new if n in found}}

    streams = _streams(asked.matrices)
    tell_last = tell(passes - 1)
    return walk.over(CHANGED, step, streams=streams, changes=True, progress=tell_last)


def share_out(
    walk: Walk, asked: Replacement, progress: Progress = lambda done, total: None
) -> Sizes:
    """By path, what `Shared.sizes` says of those matrices whose sizes are decided together: all of
    one spec."""
    budgets = _budgets(asked)
    shared = [matrix for matrix in asked.matrices if matrix.spec in budgets]
    if not shared:
        return {}

    def step(layer: Layer, *streams: Stream) -> dict[str, list[float]]:
        here = [matrix for matrix in shared if matrix.layer == layer.index]
        moments = _moments(walk, layer, here, streams)
        return {
            matrix.name: budgets[matrix.spec].look(matrix.linear, moment).tolist()
            for matrix, moment in zip(here, moments, strict=True)
        }

    rows = walk.over("spectra", step, streams=_streams(shared), progress=progress)
    found = {name: values for row in rows for name, values in row.items()}
    for matrix in shared:
        values = torch.tensor(found[matrix.name], dtype=torch.float64)
        budgets[matrix.spec].add(matrix.name, matrix.module, values)
    return {name: size for one in budgets.values() for name, size in one.sizes().items()}


def _budgets(asked: Replacement) -> dict[str, Shared]:
    """spec -> what decides its matrices' sizes together, of those specs that have such."""
    budgets: dict[str, Shared] = {}
    for matrix in asked.matrices:
        if matrix.kind is not None and matrix.options is not None and matrix.spec not in budgets:
            budget = matrix.kind.shared(**sizing(matrix.options))
            if budget is not None:
                budgets[matrix.spec] = budget
    return budgets


def _fitted(
    walk: Walk, asked: Replacement, sizes: Sizes, layer: Layer, streams: Sequence[Stream]
) -> dict[str, nn.Module]:
    """What takes the place of a layer's matrices, by their paths."""
    here = [matrix for matrix in asked.matrices if matrix.layer == layer.index]
    new: dict[str, nn.Module] = {}
    for matrix in here:
        dense = matrix.options is None or sizes.get(matrix.name, {}) is None
        if dense and isinstance(matrix.module, StructuredLinear):
            new[matrix.name] = matrix.module.to_linear()
    wanted = [m for m in here if m.options is not None and sizes.get(m.name, {}) is not None]
    for matrix, moment in zip(wanted, _moments(walk, layer, wanted, streams), strict=True):
        new[matrix.name] = matrix.fitted(moment, sizes.get(matrix.name))
    return new


def _streams(matrices: Sequence[Matrix]) -> int:
    return 1 if any(matrix.from_data for matrix in matrices) else 0


def _moments(
    walk: Walk, layer: Layer, matrices: list[Matrix], streams: Sequence[Stream]
) -> list[Tensor | None]:
    """Of each of a layer's matrices with method="data" the second moment of its inputs, in the
    unmodified model; None for the others. Moves the stream, if there is one, one layer on."""
    found = [SecondMoment() if matrix.from_data else None for matrix in matrices]
    for stream in streams:
        assert walk.runner is not None
        with ExitStack() as stack:
            for matrix, moment in zip(matrices, found, strict=True):
                if moment is not None:
                    stack.enter_context(watch(matrix.module, _adding_to(moment)))
            for number, states in walk.runner.run(layer.index, stream.source):
                stream.sink[number] = states
    return [None if moment is None else moment.mean for moment in found]


def _adding_to(moment: SecondMoment) -> Callable[[Tensor, Tensor], None]:
    return lambda x, _: moment.add(x)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class ProjectingJob(Job):
    """The replacement on a walk. specs: as they were asked for."""

    asked: Replacement
    specs: str | dict

    @property
    def batches(self) -> list[Tensor] | None:
        return self.asked.batches

    @property
    def settings(self) -> dict:
        return {"projections": self.specs, "length": self.asked.length}

    def carry_out(self, walk: Walk, progress: Progress | None = None) -> list[dict]:
        return carry_out(walk, self.asked, progress)

    def config(self, config: dict, rows: list[dict]) -> dict:
        found = {name: entry for row in rows for name, entry in row["matrices"].items()}
        return unplain(config, {"projections": found}) if found else config

    def report(self, old: Anatomy, new: Anatomy, rows: list[dict]) -> list[dict]:
        return errors(new.model)
