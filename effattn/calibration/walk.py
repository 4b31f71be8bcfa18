"""A walk over a model's layers, with streams of hidden states beside it.

    walk = Walk(parts, batches)                          # a model in memory
    walk = FileWalk(model, work, batches, settings)      # one that stays in its files
    rows = walk.over(CHANGED, step, streams=2, changes=True)

A conversion says what happens at one layer; whether the other layers are in memory meanwhile is the
walk's business (`effattn.calibration.from_files`).

N: tokens of the set, in rows of `length`, `batch` of them at a time; D: hidden size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.spilled import States
from effattn.hf.anatomy import Anatomy, Layer

CHANGED = "layers"  # the name of the pass that changes them
Progress = Callable[[int, int], None]
Step = Callable[..., Any]  # step(layer, *streams): what is to be known of the layer, for JSON


@dataclass(frozen=True)
class Stream:
    """Hidden states at one layer, by batch: what the layer gets, and where what it gives goes. Both
    are the same list where nothing has to last."""

    source: States
    sink: States

    def kept(self) -> States:
        """What the layer gets, to be read as long as the step lasts."""
        return list(self.source) if self.source is self.sink else self.source


class Walk:
    """Over a model in memory. batches: int64 (batch, length) each; None: no hidden states. before:
    called with each layer that is about to be changed."""

    def __init__(
        self,
        parts: Anatomy,
        batches: list[Tensor] | None,
        before: Callable[[Layer], None] = lambda layer: None,
    ):
        self.parts, self.before = parts, before
        self.runner = None if batches is None else LayerRunner(parts, batches)

    def over(
        self,
        name: str,
        step: Step,
        *,
        streams: int = 1,
        changes: bool = False,
        progress: Progress | None = None,
    ) -> list:
        """step(layer, *streams) for every layer in order; returns what each gave.

        streams: how many there are, all of which begin with the embeddings; a step moves each of
        its `Stream`s one layer on. changes: whether the step writes into the layer. name: of this
        pass, by which an unfinished walk knows it."""
        given: list[Stream] = []
        for number in range(streams):
            assert self.runner is not None
            states = [one.clone() for one in given[0].source] if number else self.runner.embed()
            given.append(Stream(states, states))
        rows = []
        for layer in self.parts:
            if changes:
                self.before(layer)
            rows.append(step(layer, *given))
            if progress:
                progress(layer.index + 1, len(self.parts.layers))
        return rows

    def pile(self, name: str) -> States:
        """An empty list for what one layer gives, batch by batch; it is gone after the step."""
        return []
