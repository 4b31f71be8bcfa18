"""`effattn.measure`: what a model costs at several contexts and batches, variant beside variant.

Everything that can be known to be wrong is said before anything is measured. Each (context, batch)
is a cell: its variants are checked against the memory, take turns, and its rows are saved before
the next cell begins, so that a killed run goes on from there."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

from effattn.bounds import Bounds
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.hf.last_logits import takes_logits_to_keep
from effattn.hf.placement import input_device
from effattn.hf.weights import numbers, weight_bytes
from effattn.measuring import BATCHES, CONTEXTS, SECONDS, STEPS, progress
from effattn.measuring.lanes import BESIDE_STEPS, Lane, measure_together, warm_up
from effattn.measuring.report import KIND, VERSION, Report
from effattn.measuring.rows import does_not_fit, measured_row
from effattn.measuring.variants import Variant, build, own_bytes, parse_all
from effattn.profiling.cost import ModelCost, model_cost
from effattn.profiling.device import peaks
from effattn.profiling.environment import environment
from effattn.profiling.memory import available_bytes
from effattn.stages import Quiet
from effattn.surgery import swapping

MEMORY_SHARE = 0.9  # of the available memory may be filled; the rest is for what no model foresees


@dataclass
class Need:
    """What one variant needs in one cell beyond its weights, predicted: the cache that stays, and
    the peak with it.
    """

    prefill: ModelCost
    decode: ModelCost

    @property
    def kept(self) -> int:
        """Bytes that stay: the cache after the prompt."""
        return self.prefill.kv_bytes

    @property
    def peak(self) -> int:
        """Bytes at once beside the weights, at most."""
        return max(cost.peak_bytes - cost.weight_bytes for cost in (self.prefill, self.decode))


def measure(
    model: nn.Module,
    variants: Sequence[str] | Mapping[str, str] | str | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    seed: int = 0,
    output: Path | str | None = None,
    resume: Path | str | None = None,
    fresh: bool = False,
    name: str | None = None,
    show: Quiet | None = None,
) -> Report:
    """Measures prefill and decoding of a causal LM on the device where it is. The model is left as
    it is.

    variants: "name=spec" strings, or {name: spec}; a spec is "plain", a backend's
    ("sliding(window=512)") or axes of `effattn.swap` ("pattern=sliding(window=512);
    heads=gqa(kv_heads=2)"). They share the model's weights, are compared with the first one, and
    "plain", the model unchanged, comes first unless given. None: the model as it is, and plain
    beside it when it is swapped. contexts: tokens of the prompt. steps: timed decode steps at most.
    seconds: about so long for the prefills and for the steps of a cell, all variants together
    (three rounds at least).

    output: a folder for report.{json,md,html}. resume: the file that keeps finished cells, for a
    run with the same settings to go on from (default: in `output`, until that is written); `fresh`
    ignores it. name: what the report calls the model. show: stages and progress, as the command
    line has them.

    Raises ValueError for what means nothing, Unsupported for what this model or version cannot do
    and OSError for a folder that cannot be written, all before anything is measured."""
    show = show or Quiet()
    wanted = _variants(model, variants)
    check_numbers(contexts, batches, steps, seconds)
    parts = anatomy.of(model)
    _check_model(parts, contexts, steps)
    if output is not None:
        progress.check_output(Path(output), fresh)
        resume = resume or progress.partial_in(Path(output))
    device = input_device(parts.model)
    with show.stage("making the variants"):
        _check_room(model, wanted, device)
        models = {variant.name: build(model, variant) for variant in wanted}
    facts = _model_facts(parts, name)
    settings = {
        "model": facts["name"],
        "variants": [variant.to_dict() for variant in wanted],
        "contexts": sorted(set(contexts)),
        "batches": sorted(set(batches)),
        "steps": steps,
        "seconds": seconds,
        "seed": seed,
    }
    kept = progress.Cells(resume, settings, facts | _machine(device), fresh)
    with show.stage("the device's peaks (kept for the next time)"):
        limits = peaks(device)
    for context, batch in product(settings["contexts"], settings["batches"]):
        named = progress.cell(context, batch)
        if named not in kept.done:
            said = f"{context:,} tokens" + (f" x {batch}" if batch > 1 else "")
            with show.stage(said) as tell:
                rows = partial(_cell, models, context, batch, settings, limits, device, tell)
                kept.once(named, rows)
    report = Report(
        {
            "kind": KIND,
            "version": VERSION,
            "settings": settings,
            "model": facts,
            "rows": kept.rows,
            "peaks": limits.to_dict(),
            "environment": environment(),
        }
    )
    if output is not None:
        report.save(output)
        kept.discard()
    return report


# One cell
# -------------------------------------------------------------------------------------------------


def _cell(
    models: dict[str, nn.Module], context: int, batch: int, settings: dict, limits, device, progress
) -> list:
    """The rows of one (context, batch), in the variants' order."""
    steps, seconds = settings["steps"], settings["seconds"]
    needs = {name: predict(model, context, batch) for name, model in models.items()}
    gc.collect()
    free = available_bytes(device)
    room = float("inf") if free is None else MEMORY_SHARE * free
    fitting = [name for name in models if needs[name].peak <= room]
    together = sum(needs[name].kept for name in fitting) + max(
        (needs[name].peak - needs[name].kept for name in fitting), default=0
    )
    groups = [fitting] if together <= room else [[name] for name in fitting]
    ids = _random_ids(next(iter(models.values())), context, batch, settings["seed"])
    rows = {name: does_not_fit(name, context, batch, needs[name], free) for name in models}
    for number, group in enumerate(filter(None, groups)):

        def tick(phase: str, share: float, number=number) -> None:
            done = number + (0.5 if phase == "decode" else 0) + share / 2
            progress(int(1000 * done), 1000 * len(groups))

        lanes = [Lane(name, models[name], ids) for name in group]
        try:
            warm_up(lanes)
            found = measure_together(lanes, steps, seconds, tick)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            _free(lanes, device)
            continue  # the prediction was too low: these rows stay "does not fit"
        for name in group:
            past = round(found[name]["decode"]["past"])
            step = model_cost(models[name], batch, 1, past=past)
            rows[name] = measured_row(
                models[name],
                name,
                context,
                batch,
                found[name],
                needs[name].prefill,
                step,
                limits,
                len(group) > 1,
            )
        _free(lanes, device)
    return list(rows.values())


def predict(model: nn.Module, context: int, batch: int) -> Need:
    """The cost model's word on one variant: a prefill of `context` tokens, and a step after it."""
    logits = 1 if takes_logits_to_keep(model) else context
    return Need(
        model_cost(model, batch, context, logits=logits), model_cost(model, batch, 1, past=context)
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch's own error on a GPU; on a CPU its allocator
    raises RuntimeError.
    """
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def _free(lanes: list[Lane], device: torch.device) -> None:
    for lane in lanes:
        lane.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _random_ids(model: nn.Module, context: int, batch: int, seed: int) -> torch.Tensor:
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, table.shape[0], (batch, context), generator=generator).to(
        input_device(model)
    )


# Checks
# -------------------------------------------------------------------------------------------------


def _variants(model: nn.Module, given) -> list[Variant]:
    found = parse_all(given)
    if given is None and swapping.active(model) is not None:
        found.append(Variant("as given", as_given=True))
    return found


def check_numbers(contexts, batches, steps, seconds) -> None:
    """ValueError for lengths, batches, steps or seconds that cannot be."""
    for argument, values in (("contexts", contexts), ("batches", batches), ("steps", [steps])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument}: got {value!r}, valid is 1 or more")
        if not len(values):
            raise ValueError(f"{argument}: got none, valid is at least one number")
    Bounds(whole=False, above=0).check("seconds", seconds)


def _check_model(parts: anatomy.Anatomy, contexts: Sequence[int], steps: int) -> None:
    """Unsupported for a model that does not generate. ValueError for contexts that it cannot run: a
    table of learned positions ends; rotary ones do not."""
    if not parts.causal:
        raise Unsupported(
            f"{type(parts.model).__name__} cannot be measured: it does not generate (it is not "
            "causal)"
        )
    limit = hard_limit(parts)
    if limit is None or max(contexts) + steps + BESIDE_STEPS <= limit:
        return
    room = limit - steps - BESIDE_STEPS
    valid = (
        f"valid is up to {room:,}"
        if room > 0
        else f"ask for fewer steps (at most {limit - BESIDE_STEPS - 1})"
    )
    raise ValueError(
        f"contexts: got {max(contexts):,}, {type(parts.model).__name__} has {limit:,} learned "
        f"positions, of which decoding takes {steps + BESIDE_STEPS}; {valid}. A learned table is "
        "extended by training a longer one; models with rotary positions can be measured at any "
        "context"
    )


def hard_limit(parts: anatomy.Anatomy) -> int | None:
    """The most tokens that the model can run at all; None where nothing stops it."""
    return None if parts.layers[0].family.rotary else parts.trained_length


def _check_room(model: nn.Module, variants: list[Variant], device: torch.device) -> None:
    needed, free = sum(own_bytes(model, variant) for variant in variants), available_bytes(device)
    if free is not None and needed > MEMORY_SHARE * free:
        raise ValueError(
            f"variants: those with other heads need {needed / 2**30:.1f} GiB for weights of their "
            f"own, {free / 2**30:.1f} GiB are available; measure them one at a time"
        )


def _model_facts(parts: anatomy.Anatomy, name: str | None) -> dict:
    model = parts.model
    tensors = {id(p): p for p in model.parameters()}.values()
    return {
        "name": name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "layers": len(parts.layers),
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "head_dim": parts.head_dim,
        "parameters": sum(map(numbers, tensors)),
        "weight_bytes": weight_bytes(model),
        "dtype": str(parts.layers[0].dtype).removeprefix("torch."),
        "trained_length": parts.trained_length,
    }


def _machine(device: torch.device) -> dict:
    """What else must be the same for results of two runs to stand in one report."""
    here = environment()
    return {"on": device.type} | {
        key: here[key] for key in ("device", "threads", "torch", "transformers", "effattn")
    }
