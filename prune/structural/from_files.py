"""Structured pruning from checkpoint to checkpoint, for models that do not fit into memory.

    effattn.prune.structured_files("llama", "llama-narrow", tokens, ffn=0.25, criterion="obs")

Three passes over the layers, of which one is in memory at a time
(`effattn.calibration.from_files`): every structure is scored, what stays is written as a checkpoint
of its own, and its output modules are solved again. Each is what happens in memory
(`effattn.prune.structural.removal`), and so is the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effattn.calibration.from_files import MANIFEST, FileWalk, resume
from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.walk import CHANGED, Progress, Stream
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import shards, weight_files
from effattn.hf.beginning import bos_of, settle, tokenizer_in
from effattn.hf.streamed import Checkpoint, StreamedModel
from effattn.outputs import check_new_folder, claim
from effattn.prune.structural import criteria
from effattn.prune.structural.choosing import choose
from effattn.prune.structural.compensation import Solving, solve, with_fields
from effattn.prune.structural.criteria.base import AtLayer, Importance
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.plan import Amount, Plan, plan_of
from effattn.prune.structural.removal import prepared, report_of, steps_of
from effattn.prune.structural.report import StructuredReport
from effattn.prune.structural.sliced_config import sliced_config
from effattn.prune.structural.sliced_weights import sliced_state
from effattn.prune.structural.slicing import outline
from effattn.resuming import discard

FACTS = "pruning.json"  # in the output: what was done


def structured_files(
    source: str | Path,
    output: str | Path,
    tokens: Tensor,
    *,
    heads: Amount = None,
    ffn: Amount = None,
    layers: Amount = None,
    criterion: str | Mapping[str, str] = "obs",
    compensate: bool = True,
    bias: bool = False,
    length: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    device: torch.device | str = "cpu",
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> StructuredReport:
    """Prunes the safetensors checkpoint in the folder `source` into the new folder `output`, as
    `structured` does in memory, and with the same result; returns its report, whose `verification`
    says how far the last hidden states that the new files give are from those of the run.

    heads ... bos: as for `structured`, every layer alike. criterion: one that takes no gradients,
    for which the whole model would have to be there. device: where a layer is. work: where an
    unfinished run is kept, from which the same call goes on (default `.<output>.pruning` beside
    `output`; on the same file system). progress: called with (steps done, steps).

    In memory are two layers at most, and while one is solved again two matrices in fp64 of its
    output module's inputs that stay (`obs`: of all of them); on the disk the source's size twice,
    and the hidden states of the text.

    Raises as `structured`, and ValueError for an output that is not empty and for an unfinished run
    with other settings or another source."""
    source, output = Path(source), Path(output).absolute()
    work = Path(work) if work is not None else output.parent / f".{output.name}.pruning"
    # The output has its name, and the run was killed before it had removed its own folder.
    finished = (work / MANIFEST).is_file() and (output / FACTS).is_file()
    if not finished:
        check_new_folder("output", output)
    model = StreamedModel(Checkpoint(source), torch.device(device))
    settle(model.parts.model, bos, tokenizer_in(source))
    amounts = {"heads": heads, "ffn": ffn, "layers": layers}
    how = {"compensate": compensate, "bias": bias, "length": length, "seed": seed}
    job = _Job.of(model, tokens, plan_of(model.parts, amounts, criterion), work, **how)
    # the output is ours until we are done: a second process with the same output is refused
    with claim("output", output):
        resume(work / MANIFEST, job.wanted)
        if not finished:
            job.to_the_end(output, progress)
        discard(work, MANIFEST)
    return report_in(output)


def report_in(folder: str | Path) -> StructuredReport:
    """What `structured_files` says of an output that is complete."""
    return StructuredReport(json.loads((Path(folder) / FACTS).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _Job:
    """A pruning that is checked. asked: settings that are not in the plan; wanted: what an
    unfinished run has to have in common with it."""

    source: StreamedModel
    plan: Plan
    work: Path
    batches: list[Tensor]
    asked: dict
    wanted: dict

    @classmethod
    def of(
        cls,
        source: StreamedModel,
        tokens: Tensor,
        plan: Plan,
        work: Path,
        **how,
    ) -> _Job:
        """how: as of `prepared`. ValueError and Unsupported, as `structured_files`."""
        parts = source.parts
        for target, name in plan.criteria.items():
            _check_criterion(name, target)
        batches, asked = prepared(parts, plan, tokens, bos_of(parts.model), **how)
        wanted = plan.keep | {"criterion": plan.criteria} | asked
        wanted |= shards.fingerprint(source.checkpoint, tokens)
        return cls(source, plan, work, batches, asked, wanted)

    @property
    def biased(self) -> list[str]:
        """Whose output modules get biases."""
        return self.plan.inside if self.asked["bias"] else []

    @property
    def solves(self) -> bool:
        """Whether output modules are solved again."""
        return (self.asked["compensate"] or self.asked["bias"]) and bool(self.plan.inside)

    def to_the_end(self, output: Path, progress: Progress | None) -> None:
        """All that is left to do, up to the output's name."""
        count = len(self.source.parts.layers)
        staying = self.plan.keep.get("layers", count)
        tell = steps_of(progress, count, staying, staying)
        importance = self.score(tell[0])
        keep = choose(count, importance, self.plan.keep, uniform=True)
        small = StreamedModel(Checkpoint(self.slice(keep, tell[1])), self.source.device)
        self.solve(small, keep, importance, output, tell[2])

    # ---- the passes

    def score(self, progress: Progress) -> Importance:
        """What every structure is worth in the whole model. A layer's scores lie in a file of their
        own: there may be many."""
        parts, ranked = self.source.parts, self.plan.ranked
        walk = FileWalk(self.source, self.work / "scored", self.batches, self.wanted)
        file_of = lambda index: walk.work / f"scores-{index:05}.safetensors"  # noqa: E731

        def step(layer: hf.Layer, *streams: Stream) -> dict:
            found: dict[str, Tensor] = {}
            for name, targets in ranked.items():
                reads = criteria.find(name).reads
                seen = AtLayer(walk.runner, layer, streams[0]) if reads else self.batches
                given = criteria.measure(
                    name, parts, seen, targets, self.asked["seed"], self.plan.removed
                )
                place = 0 if reads else layer.index  # what reads nothing gives all layers'
                found |= {target: getattr(given, target)[place] for target in targets}
            shards.write(file_of(layer.index), found)
            return {"layer": layer.index}

        streams = int(any(criteria.find(name).reads for name in ranked))
        rows = walk.over("scores", step, streams=streams, progress=progress)
        found = [_scores(file_of(row["layer"])) for row in rows]
        return Importance(
            **{name: torch.stack([one[name] for one in found]) for name in self.plan.criteria}
        )

    def slice(self, keep: Keep, progress: Progress) -> Path:
        """The folder of the checkpoint of what stays, nothing in it solved again yet."""
        source, done, folder = self.source, self.work / "sliced", self.work / "slicing"
        if done.is_dir():
            return done
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        old = source.parts.model
        config = sliced_config(old.config, keep)
        shell = outline(source.parts, keep, config, sliced_state(source.parts, keep))
        shapes = {}
        if self.biased:
            config, shapes = with_fields(hf.of(shell), self.biased)
        shards.copy_others(source.checkpoint.folder, folder)
        config.architectures, config.dtype = [type(old).__name__], old.dtype
        config.save_pretrained(folder)
        rest = shards.around_layers(source)
        staying = range(len(source.parts.layers)) if keep.layers is None else keep.layers.tolist()
        count = len(staying) + len(rest)
        files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        for place, index in enumerate(staying):
            with source.layer(index) as layer:
                state = sliced_state(source.parts, keep, layer)
            path = source.prefixes[index].rstrip(".").rpartition(".")[0] + f".{place}."
            state |= {  # biases that there were not
                name: torch.zeros(shape, dtype=old.dtype)
                for name, shape in shapes.items()
                if name.startswith(path) and name not in state
            }
            shards.write(folder / files[place], {name: one.cpu() for name, one in state.items()})
            progress(place + 1, len(staying))
        for file, names in zip(files[len(staying) :], rest, strict=True):
            shards.write(folder / file, source.checkpoint.read(names))
        shards.write_index(folder, files)
        os.replace(folder, done)
        return done

    def solve(
        self,
        small: StreamedModel,
        keep: Keep,
        importance: Importance,
        output: Path,
        progress: Progress,
    ) -> None:
        """Solves the output modules again, where that was asked for, and gives the new files their
        name once they have been read again."""
        source, batches = self.source, self.batches if self.solves else self.batches[:1]
        walk = FileWalk(small, self.work / "solved", batches, self.wanted)
        if self.solves:
            with source.around():
                teacher = LayerRunner(source.parts, batches)
            weights = self.asked["compensate"]
            solving = Solving(teacher, source.parts, keep, weights, source.layer)
            rows = solve(walk, solving, progress)
        else:
            walk.over(CHANGED, lambda layer: {}, streams=0, changes=True, progress=progress)
            rows = []

        def facts(verification: dict) -> tuple[str, dict]:
            old, new = (one.parts.model for one in (source, small))
            found = report_of(old, new, self.plan, self.asked, keep, importance, rows)
            found.data["verification"] = verification
            return FACTS, found.data

        walk.finish(output, facts)


def _check_criterion(name: str, target: str) -> None:
    """Unsupported, naming the others, for a criterion that takes gradients."""
    if criteria.find(name).needs_loss:
        able = (one for one in map(criteria.find, criteria.CRITERIA) if target in one.targets)
        valid = ", ".join(repr(one.name) for one in able if not one.needs_loss)
        raise Unsupported(
            f"criterion: got {name!r} for {target}, which takes gradients of the whole model; from "
            f"file to file valid are {valid}"
        )


def _scores(file: Path) -> dict[str, Tensor]:
    """A layer's scores by target."""
    return weight_files.read(file, weight_files.header(file))
