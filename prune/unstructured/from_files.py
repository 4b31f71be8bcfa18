"""One-shot pruning from checkpoint to checkpoint, for models that do not fit into memory.

How a model is walked through layer by layer, from files to files, is
`effattn.calibration.from_files`' business. Here is what happens at a layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from effattn.calibration.from_files import MANIFEST, FileWalk
from effattn.calibration.from_files import resume as resume
from effattn.calibration.hessian import DAMPING
from effattn.calibration.walk import CHANGED, Progress
from effattn.hf import shards
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.beginning import bos_of, settle, tokenizer_in
from effattn.hf.streamed import Checkpoint, StreamedModel
from effattn.outputs import check_new_folder, claim
from effattn.prune.unstructured import calibration, layers
from effattn.prune.unstructured.allocation import allocate, outliers
from effattn.prune.unstructured.layers import Runner
from effattn.prune.unstructured.methods.sparsegpt import BLOCK
from effattn.prune.unstructured.one_shot import prune_layer
from effattn.prune.unstructured.plan import Plan, make_plan
from effattn.resuming import discard

FACTS = "pruning.json"  # in the output: what was done


def prune_files(
    source: str | Path,
    output: str | Path,
    tokens: Tensor,
    *,
    method: str = "sparsegpt",
    sparsity: float | str | Sequence[float | str] = 0.5,
    modules: str = "all",
    allocation: str = "uniform",
    length: int | None = None,
    damping: float = DAMPING,
    raise_damping: bool = False,
    block: int = BLOCK,
    bos: bool | None = None,
    device: torch.device | str = "cpu",
    work: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Prunes the safetensors checkpoint in the folder `source` into the new folder `output`, as
    `oneshot` does in memory, and with the same result.

    work: where an unfinished run is kept (default `.<output>.pruning` beside `output`; on the same
    file system). Returns {"settings", "layers", "verification"}, which also lies in the output as
    pruning.json: the layers as `prune_layer` tells them, and how far the last hidden states that
    the new files give are from those of the run ("max_difference").

    Raises as `oneshot` does, and ValueError for an output that is not empty and for an unfinished
    run with other settings or another source."""
    source, output = Path(source), Path(output).absolute()
    work = Path(work) if work is not None else output.parent / f".{output.name}.pruning"
    # The output has its name, and the run was killed before it had removed its own folder.
    finished = (work / MANIFEST).is_file() and (output / FACTS).is_file()
    if not finished:
        check_new_folder("output", output)
    checkpoint = Checkpoint(source)
    model = StreamedModel(checkpoint, torch.device(device))
    parts = model.parts
    plan = make_plan(
        parts.layers,
        method,
        sparsity,
        modules,
        allocation,
        damping=damping,
        raise_damping=raise_damping,
        block=block,
    )
    length = calibration.window_length(parts.config, length)
    calibration.check_tokens(tokens, parts.embeddings.weight.shape[0], length)
    # the shell of a model knows no place that it comes from
    settle(parts.model, bos, tokenizer_in(source))
    beginning = bos_of(parts.model)
    settings = plan.settings(length, tokens) | {"bos": beginning is not None}
    wanted = {**settings, **shards.fingerprint(checkpoint, tokens)}
    # the output is ours until we are done: a second process with the same output is refused
    with claim("output", output):
        if finished:
            resume(work / MANIFEST, wanted)
        else:
            batches = calibration.batches_of(tokens, length, beginning)
            _Run(model, plan, work, batches, wanted).to_the_end(settings, output, progress)
        discard(work, MANIFEST)
    return json.loads((output / FACTS).read_text(encoding="utf-8"))


class _Run(FileWalk):
    """The passes over the layers: measuring, where shares follow sensitivity, and pruning."""

    runner: Runner

    def __init__(
        self, model: StreamedModel, plan: Plan, work: Path, batches: list[Tensor], settings: dict
    ):
        self.plan = plan
        super().__init__(model, work, batches, settings)

    def running(self, parts: Anatomy, batches: list[Tensor]) -> Runner:
        # A run that goes on in another place, where other dtypes are fast, goes on in the one
        # that it began in.
        weight = parts.embeddings.weight
        dtype = layers.working_dtype(weight.dtype, weight.device)
        dtype = getattr(torch, self.state.setdefault("dtype", str(dtype).removeprefix("torch.")))
        return Runner(parts, batches, dtype)

    def to_the_end(self, settings: dict, output: Path, progress: Progress | None) -> None:
        """All that is left to do, up to the output's name."""
        if self.plan.by_sensitivity:
            self.plan = allocate(self.plan, self.over("measured", self.measure, progress=progress))
        rows = self.over(CHANGED, self.prune, changes=True, progress=progress)

        def facts(verification: dict) -> tuple[str, dict]:
            return FACTS, {"settings": settings, "layers": rows, "verification": verification}

        self.finish(output, facts)

    def measure(self, layer: Layer, states) -> float:
        """A layer's sensitivity, in the unchanged model."""
        return outliers(self.runner, layer, self.plan.modules, states.source, states.sink)

    def prune(self, layer: Layer, states) -> dict:
        """What `prune_layer` says of it."""
        name = self.model.prefixes[layer.index].rstrip(".")
        return prune_layer(self.runner, layer, name, states.source, states.sink, self.plan)

    def check_layer(self, layer: Layer, row: dict) -> None:
        found = layers.linears(layer, self.plan.modules).values()
        if sum(int((linear.weight == 0).sum()) for linear in found) != row["zeros"]:
            raise RuntimeError(f"the saved layer {layer.index} has other zeros than the pruned one")

    def verify(self, again: StreamedModel) -> dict:
        if again.checkpoint.shapes() != self.model.checkpoint.shapes():
            raise RuntimeError(
                "the saved checkpoint has other names, shapes or dtypes than the source"
            )
        return super().verify(again)

    def called(self, runner: Runner, layer: Layer, hidden: Tensor) -> Tensor:
        with layers.working(layer.block, runner.dtype):
            return super().called(runner, layer, hidden)
