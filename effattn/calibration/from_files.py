"""A walk over the layers of a checkpoint that stays in its files, for models that do not fit into
memory.

One decoder layer and what is made of it are in memory, the other layers stay in their safetensors
files, and the hidden states of the calibration text wait on the disk. After each layer its new
weights, the states and, last, a manifest are written, so that a killed run goes on at the layer
where it stopped, with the same result. The source is only read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.spilled import SpilledStates
from effattn.calibration.walk import CHANGED, Progress, Step, Stream, Walk
from effattn.hf import shards
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.streamed import Checkpoint, StreamedModel
from effattn.permissions import follow_umask
from effattn.profiling.memory import give_memory_back
from effattn.reports.files import write_text_atomic

MANIFEST = "manifest.json"
TOLERANCE = 1e-4  # of hidden states that the saved files give, as a share of each


def resume(file: Path, settings: dict) -> dict | None:
    """What an unfinished run wrote into `file` beside its settings; None, and the settings are
    written, without one.

    ValueError when the settings differ.
    """
    settings = json.loads(json.dumps(settings))
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in settings if old["settings"].get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{file.parent} holds an unfinished run with another {', '.join(changed)}: repeat "
                "it with the same to go on, or delete that folder to start again"
            )
        return old.get("state")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, json.dumps({"settings": settings}) + "\n")
    return None


class FileWalk(Walk):
    """Over the layers of `model`, each filled from its files for its step, and emptied again.

    work: the folder of the unfinished run, whose manifest says what is done; `out` in it becomes
    the output (`finish`). settings: with which alone an unfinished run goes on. What steps give is
    kept in the manifest, so that it has to be JSON."""

    runner: LayerRunner

    def __init__(
        self, model: StreamedModel, work: Path, batches: list[Tensor], settings: dict
    ) -> None:
        self.model, self.work, self.batches = model, work, batches
        self.manifest = work / MANIFEST
        self.state = resume(self.manifest, settings) or {}
        self.parts, self.out = model.parts, work / "out"
        self.config: dict | None = None  # of the output, where it is another than the source's
        self.count = len(model.parts.layers)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rest = shards.around_layers(model)
        self.proof = SpilledStates(work / "proof")  # of the first batch, by layer
        with model.around():
            self.runner = self.running(model.parts, batches)

    def running(self, parts: Anatomy, batches: list[Tensor]) -> LayerRunner:
        """What runs the layers; called while the embeddings are there."""
        return LayerRunner(parts, batches)

    def over(
        self,
        name: str,
        step: Step,
        *,
        streams: int = 1,
        changes: bool = False,
        progress: Progress | None = None,
    ) -> list:
        done = self.state.setdefault(name, [])
        if not done:
            self._embed(name, streams)
        for index in range(len(done), self.count):
            given = [
                Stream(self._states(name, number, index), self._states(name, number, index + 1))
                for number in range(streams)
            ]
            # A step is complete once the manifest says so, and only then its inputs go: a run that
            # is killed anywhere before finds them, and does the step again.
            with self.model.layer(index) as layer:
                done.append(step(layer, *given))
                if changes:
                    self._prove(layer)
                    self._write(layer)
            give_memory_back()
            self._note()
            for number in range(streams):
                shutil.rmtree(self._states(name, number, index).folder)
            shutil.rmtree(self.work / "piles", ignore_errors=True)
            if progress:
                progress(index + 1, self.count)
        return done

    def pile(self, name: str) -> SpilledStates:
        folder = self.work / "piles" / name
        shutil.rmtree(folder, ignore_errors=True)
        return SpilledStates(folder, lasting=False)

    def _states(self, name: str, stream: int, index: int) -> SpilledStates:
        return SpilledStates(self.work / f"{name}-{stream}-{index:04}", len(self.batches))

    def _embed(self, name: str, streams: int) -> None:
        first = [self._states(name, stream, 0) for stream in range(streams)]
        with self.model.around():
            self.proof[0] = self.runner.embed_batch(self.batches[0])
            for number, batch in enumerate(self.batches if streams else ()):
                hidden = self.runner.embed_batch(batch)
                for states in first:
                    states[number] = hidden

    @torch.no_grad()
    def _prove(self, layer: Layer) -> None:
        """What the changed layer makes of the first batch, which the files have to give again."""
        index = layer.index
        self.proof[index + 1] = self.called(self.runner, layer, self.proof[index]).cpu()

    def _note(self) -> None:
        whole = json.loads(self.manifest.read_text(encoding="utf-8")) | {"state": self.state}
        write_text_atomic(self.manifest, json.dumps(whole) + "\n")

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self.count + len(self.rest):05}.safetensors"

    def _write(self, layer: Layer) -> None:
        """The layer's weights as they are now, under the names that they had in the source."""
        model, prefix = self.model, self.model.prefixes[layer.index]
        tensors = {
            model.stored.get(prefix + name, prefix + name): tensor.cpu()
            for name, tensor in layer.block.state_dict().items()
        }
        names = model.names(layer.index)
        known = {model.stored[name] for name in model.own if name in model.stored}
        # what the class does not read is kept as it is
        unknown = model.checkpoint.read(
            name for name in names if name not in tensors and name not in known
        )
        both = tensors | unknown
        order = [name for name in names if name in both]
        order += [name for name in both if name not in set(order)]
        shards.write(self.out / self._file(layer.index), {name: both[name] for name in order})

    # ---- the end

    def finish(
        self,
        output: Path,
        facts: Callable[[dict], tuple[str, dict]],
        *,
        config: dict | None = None,
        shape: Callable[[nn.Module], None] | None = None,
    ) -> StreamedModel:
        """Completes the output, checks it and gives it its name; returns the model of its files.

        facts: makes of what `verify` says a file's name and its JSON. config, shape: of the new
        model, where it is not the old one's."""
        self.config = config
        self.write_rest()
        again = StreamedModel(Checkpoint(self.out), self.model.device, shape)
        name, told = facts(self.verify(again))
        write_text_atomic(self.out / name, json.dumps(told, indent=1) + "\n")
        follow_umask(self.out)
        os.replace(self.out, output)
        return again

    def write_rest(self) -> None:
        """Everything outside of the layers as it is, the index, and the files that belong to a
        checkpoint.
        """
        for number, names in enumerate(self.rest):
            file = self.out / self._file(self.count + number)
            shards.write(file, self.model.checkpoint.read(names))
        count = self.count + len(self.rest)
        shards.write_index(self.out, [self._file(number) for number in range(count)])
        shards.copy_others(self.model.checkpoint.folder, self.out)
        if self.config is not None:
            text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
            write_text_atomic(self.out / "config.json", text)

    def check_layer(self, layer: Layer, row) -> None:
        """RuntimeError unless a layer that was read again is what `row` says of it."""

    def called(self, runner: Any, layer: Layer, hidden: Tensor) -> Tensor:
        """What `runner` makes of hidden states at a layer that was read again."""
        return runner.call(layer.index, hidden)

    @torch.no_grad()
    def verify(self, again: StreamedModel) -> dict:
        """Reads the new files layer by layer: the hidden states that they give for the first batch
        are those of the walk, and what lies around the layers is the source's, number for number.
        """
        for name in chain.from_iterable(self.rest):  # one at a time: some are large
            copied, source = (one.checkpoint.read([name])[name] for one in (again, self.model))
            if not torch.equal(copied, source):
                raise RuntimeError(f"the saved checkpoint gives other numbers for {name}")
        with again.around():
            runner = self.running(again.parts, self.batches[:1])
            hidden = runner.embed_batch(self.batches[0])
        for index, row in enumerate(self.state[CHANGED]):
            with again.layer(index) as layer:
                self.check_layer(layer, row)
                hidden = self.called(runner, layer, hidden).cpu()
            give_memory_back()
        expected = self.proof[self.count]
        differences, size = (hidden - expected).abs(), expected.abs()
        difference = float(differences.max())
        # Held to its own size and to what is usual of its token: trained models have a few massive
        # values, thousands of times the rest, and a share of those would hide any fault.
        usual = size.median(-1, keepdim=True).values
        if not bool((differences <= TOLERANCE * (size + usual)).all()):
            raise RuntimeError(
                "the saved checkpoint gives other hidden states (largest difference "
                f"{difference:.3g})"
            )
        return {"max_difference": difference, "tokens": self.batches[0].numel()}
