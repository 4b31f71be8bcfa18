"""One-shot pruning from checkpoint to checkpoint, for models that do not fit into memory.

One decoder layer and its Hessians are in memory, the other layers stay in their safetensors files,
and the hidden states of the calibration text wait on the disk. After each layer its new weights,
the states and, last, a manifest are written, so that a killed run goes on at the layer where it
stopped, with the same result. The source is only read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from effattn.calibration.hessian import DAMPING
from effattn.hf.beginning import bos_of, settle, tokenizer_in
from effattn.hf.weight_files import INDEX
from effattn.outputs import check_new_folder, claim
from effattn.permissions import follow_umask
from effattn.prune.unstructured import calibration, layers, shards
from effattn.prune.unstructured.allocation import allocate, outliers
from effattn.prune.unstructured.calibration import SpilledStates
from effattn.prune.unstructured.layers import Runner
from effattn.prune.unstructured.methods.sparsegpt import BLOCK
from effattn.prune.unstructured.one_shot import prune_layer
from effattn.prune.unstructured.plan import Plan, make_plan
from effattn.prune.unstructured.streamed import Checkpoint, StreamedModel
from effattn.reports.files import write_text_atomic
from effattn.resuming import discard

MANIFEST = "manifest.json"
FACTS = "pruning.json"  # in the output: what was done
TOLERANCE = 1e-4  # of hidden states that the saved files give, as a share of each
OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)
# of the source; they would be wrong of the output
REPORTS = ("report.json", "report.md", "report.html", "card.json", FACTS)


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
        state = resume(work / MANIFEST, wanted) or {"measured": [], "layers": []}
        if not finished:
            batches = calibration.batches_of(tokens, length, beginning)
            run = _Run(model, plan, work, work / MANIFEST, state, batches)
            run.finish(settings, output, progress)
        discard(work, MANIFEST)
    return json.loads((output / FACTS).read_text(encoding="utf-8"))


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


class _Run:
    """The passes over the layers, each step of them recorded in the manifest."""

    def __init__(
        self,
        model: StreamedModel,
        plan: Plan,
        work: Path,
        manifest: Path,
        state: dict,
        batches: list[Tensor],
    ):
        self.model, self.plan, self.batches = model, plan, batches
        self.work, self.manifest, self.state = work, manifest, state
        self.out, self.count = work / "out", len(model.parts.layers)
        self.out.mkdir(parents=True, exist_ok=True)
        with model.around():
            weight = model.parts.embeddings.weight
            # A run that goes on in another place, where other dtypes are fast, goes on in the one
            # that it began in.
            dtype = layers.working_dtype(weight.dtype, weight.device)
            dtype = getattr(torch, state.setdefault("dtype", str(dtype).removeprefix("torch.")))
            self.runner = Runner(model.parts, batches, dtype)
        self.rest = shards.around_layers(model)

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self.count + len(self.rest):05}.safetensors"

    def _states(self, which: str, index: int) -> SpilledStates:
        return SpilledStates(self.work / f"{which}-{index:04}", len(self.batches))

    def _note(self) -> None:
        whole = json.loads(self.manifest.read_text(encoding="utf-8")) | {"state": self.state}
        write_text_atomic(self.manifest, json.dumps(whole) + "\n")

    def _pass(self, which: str, done: list, step: Callable, progress) -> None:
        """step(layer, source, sink) for every layer that is not yet in `done`, which gets what it
        returns.
        """
        if not done:
            states = self._states(which, 0)
            with self.model.around():
                for number, batch in enumerate(self.batches):
                    states[number] = self.runner.embed_batch(batch)
        for index in range(len(done), self.count):
            source, sink = self._states(which, index), self._states(which, index + 1)
            # A step is complete once the manifest says so, and only then its inputs go: a run that
            # is killed anywhere before finds them, and does the step again.
            with self.model.layer(index) as layer:
                done.append(step(layer, source, sink))
            layers.give_memory_back()
            self._note()
            shutil.rmtree(source.folder)
            if progress:
                progress(index + 1, self.count)

    def finish(self, settings: dict, output: Path, progress) -> None:
        """All that is left to do, up to the output's name."""
        if self.plan.by_sensitivity:
            self.measure(progress)
            self.plan = allocate(self.plan, self.state["measured"])
        self.prune(progress)
        self.write_rest()
        facts = {
            "settings": settings,
            "layers": self.state["layers"],
            "verification": self.verify(),
        }
        write_text_atomic(self.out / FACTS, json.dumps(facts, indent=1) + "\n")
        follow_umask(self.out)
        os.replace(self.out, output)

    def measure(self, progress) -> None:
        """Each layer's sensitivity, in the unchanged model."""

        def step(layer, source, sink) -> float:
            return outliers(self.runner, layer, self.plan.modules, source, sink)

        self._pass("dense", self.state["measured"], step, progress)

    def prune(self, progress) -> None:
        def step(layer, source, sink) -> dict:
            prefix = self.model.prefixes[layer.index]
            facts = prune_layer(self.runner, layer, prefix.rstrip("."), source, sink, self.plan)
            stored = self.model.stored
            tensors = {
                stored[prefix + name]: tensor.cpu()
                for name, tensor in layer.block.state_dict().items()
            }
            names = self.model.names(layer.index)
            unknown = self.model.checkpoint.read(name for name in names if name not in tensors)
            both = tensors | unknown
            shards.write(self.out / self._file(layer.index), {name: both[name] for name in names})
            return facts

        self._pass("pruned", self.state["layers"], step, progress)

    def write_rest(self) -> None:
        """Everything outside of the layers as it is, the index, and the files that belong to a
        checkpoint.
        """
        for number, names in enumerate(self.rest):
            file = self.out / self._file(self.count + number)
            shards.write(file, self.model.checkpoint.read(names))
        weight_map, total = {}, 0
        for number in range(self.count + len(self.rest)):
            names = (
                self.model.names(number) if number < self.count else self.rest[number - self.count]
            )
            weight_map |= dict.fromkeys(names, self._file(number))
        for shape, dtype in self.model.checkpoint.shapes().values():
            total += shards.size(shape, dtype)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text_atomic(self.out / INDEX, json.dumps(index, indent=1) + "\n")
        for file in self.model.checkpoint.folder.iterdir():
            if (
                file.is_file()
                and not file.name.endswith(OTHER_WEIGHTS)
                and file.name not in REPORTS
            ):
                shutil.copyfile(file, self.out / file.name)

    @torch.no_grad()
    def verify(self) -> dict:
        """Loads the new files layer by layer: names, shapes, zeros, and the hidden states they give
        for one batch; what lies around the layers is the source's, number for number.
        """
        again = StreamedModel(Checkpoint(self.out), self.model.device)
        if again.checkpoint.shapes() != self.model.checkpoint.shapes():
            raise RuntimeError(
                "the saved checkpoint has other names, shapes or dtypes than the source"
            )
        for name in chain.from_iterable(self.rest):  # one at a time: some are large
            copied, source = (one.checkpoint.read([name])[name] for one in (again, self.model))
            if not torch.equal(copied, source):
                raise RuntimeError(f"the saved checkpoint gives other numbers for {name}")
        with again.around():
            runner = Runner(again.parts, self.batches[:1], self.runner.dtype)
            hidden = runner.embed_batch(self.batches[0])
        for index, facts in enumerate(self.state["layers"]):
            with again.layer(index) as layer:
                found = layers.linears(layer, self.plan.modules).values()
                if sum(int((linear.weight == 0).sum()) for linear in found) != facts["zeros"]:
                    raise RuntimeError(
                        f"the saved layer {index} has other zeros than the pruned one"
                    )
                with layers.working(layer.block, runner.dtype):
                    hidden = runner.call(index, hidden).cpu()
            layers.give_memory_back()
        expected = self._states("pruned", self.count)[0]
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
