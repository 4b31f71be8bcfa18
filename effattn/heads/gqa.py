"""MHA -> GQA -> MQA: `convert_gqa` gives a live model fewer key/value heads.

Layer by layer, in order: the unmodified layer runs on the unmodified model's activations (its input
moments, its attention outputs), its heads are merged, and the output projection is re-fitted on the
activations of the model converted so far. One layer's statistics exist at a time.

Baselines: Ainslie et al. 2023, arXiv:2305.13245. Alignment: Jin et al. 2024, arXiv:2412.20677. The
best merge in closed form: `effattn.heads.methods.optimal`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.tokens import check_calibration, tokens_needed
from effattn.calibration.walk import Walk
from effattn.errors import Unsupported, check_choice
from effattn.heads.converting import Conversion, check_added, convert
from effattn.heads.grouping import GROUPINGS
from effattn.heads.kinds.base import Job
from effattn.heads.methods import METHODS
from effattn.heads.report import ConversionReport
from effattn.heads.undo import all_or_nothing
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import bos_of
from effattn.hf.placement import check_finite, require_here
from effattn.hf.weights import is_packed, is_plain
from effattn.profiling.environment import environment

FEW = 4  # tokens by which a layer is asked what it does with its FFN's output


def convert_gqa(
    model,
    kv_heads: int,
    calibration: torch.Tensor | None = None,
    *,
    method: str = "optimal",
    refit: bool = True,
    refit_ffn: bool = False,
    grouping: str = "contiguous",
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Gives `model`, in place, `kv_heads` key/value heads in every layer; returns a report.

    model: a transformers causal LM whose class honours num_key_value_heads. kv_heads: divides the
    present number; 1 is MQA; the present number changes nothing. calibration: int64 (N,), at least
    ten tokens per hidden dimension (50,000 are plenty); only `mean`, `first` and `random` with
    `refit=False` do without. method: "optimal" (the least squared error, in closed form), "aligned"
    (arXiv:2412.20677), or the baselines "mean", "first" and "random" (arXiv:2305.13245). refit:
    solve the output projections again by least squares. refit_ffn: those of the FFNs as well.
    grouping: "contiguous" or "similarity".
    length, batch: of the calibration windows, in tokens, and how many at a time. seed: of "random".
    bos: whether BOS takes the place of each one's first token (None: as the model's tokenizer does
    it).
    progress: called with (layers done, layers). Afterwards `model.save_pretrained` writes a
    checkpoint that plain transformers loads.

    Raises ValueError for bad arguments and effattn.errors.Unsupported for classes that cannot hold
    it, both before anything is changed; and FloatingPointError for activations that are not finite.
    All or nothing: an error or a Ctrl-C while it converts leaves the model as it was."""
    require_own_weights(model)
    parts = hf.of(model)
    require_here(model, "convert_gqa")
    parts.require_gqa()
    asked = checked(
        parts,
        calibration,
        bos_of(model, bos),
        kv_heads=kv_heads,
        method=method,
        refit=refit,
        refit_ffn=refit_ffn,
        grouping=grouping,
        length=length,
        batch=batch,
        seed=seed,
    )
    check_swapped(parts, grouping)
    check_finite(model)

    before = describe_size(parts)
    layers: list[dict] = []
    if kv_heads != parts.kv_heads:
        training = model.training
        model.eval()
        try:
            with all_or_nothing(parts) as undo:
                remember = partial(undo.remember, ffn=refit_ffn)
                layers = convert(Walk(parts, asked.batches, remember), asked, progress)
                parts.set_kv_heads(kv_heads)
        finally:
            model.train(training)
    return ConversionReport(_report(parts, asked, before, describe_size(parts), layers))


def checked(
    parts: hf.Anatomy,
    calibration: torch.Tensor | None,
    bos: int | None,
    *,
    kv_heads: int,
    method: str = "optimal",
    refit: bool = True,
    refit_ffn: bool = False,
    grouping: str = "contiguous",
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
) -> Conversion:
    """What is asked of `convert_gqa`, as it says; bos: the token itself. ValueError for what cannot
    be asked."""
    check_choice("method", method, METHODS)
    check_choice("grouping", grouping, GROUPINGS)
    for name, flag in (("refit", refit), ("refit_ffn", refit_ffn)):
        if type(flag) is not bool:  # 'no' and 'false' would be true
            raise ValueError(f"{name}: got {flag!r}, valid are True and False")
    check_kv_heads(kv_heads, parts.kv_heads)
    parts.check_kv_heads(kv_heads)
    if calibration is None:
        _check_no_data_needed(parts, method, refit, grouping)
    else:
        length = check_calibration(calibration, parts, length)
    if refit_ffn:
        check_ffn(parts, refit)
        if calibration is None:
            raise ValueError("calibration: got None, refit_ffn=True needs tokens")
    return Conversion(
        kv_heads, calibration, METHODS[method], refit, grouping, length, batch, seed, bos, refit_ffn
    )


def job(parts: hf.Anatomy, calibration: torch.Tensor, bos: int | None, **given) -> GqaJob:
    """`convert_gqa` with the options `given`, on a walk. Raises as it does."""
    parts.require_gqa()
    asked = checked(parts, calibration, bos, **given)
    return GqaJob(asked, describe_size(parts), parts.kv_fields(asked.kv_heads))


@dataclass(frozen=True)
class GqaJob(Job):
    """The conversion on a walk. before: of `describe_size`."""

    asked: Conversion
    before: dict
    fields: dict  # of the new config

    @property
    def batches(self) -> list[torch.Tensor] | None:
        return self.asked.batches

    @property
    def settings(self) -> dict:
        asked = self.asked
        return {
            "kv_heads": asked.kv_heads,
            "method": asked.method.name,
            "refit": asked.refit,
            "refit_ffn": asked.refit_ffn,
            "grouping": asked.grouping,
            "length": asked.length,
            "batch": asked.batch,
            "seed": asked.seed,
            "bos": asked.bos,
        }

    def carry_out(self, walk: Walk, progress=None) -> list[dict]:
        return convert(walk, self.asked, progress)

    def config(self, config: dict, rows: list[dict]) -> dict:
        return config | self.fields

    def report(self, old: hf.Anatomy, new: hf.Anatomy, rows: list[dict]) -> ConversionReport:
        return ConversionReport(_report(new, self.asked, self.before, describe_size(new), rows))


def _report(
    parts: hf.Anatomy, asked: Conversion, before: dict, after: dict, layers: list[dict]
) -> dict:
    """What `ConversionReport` shows. before, after: as `describe_size`."""
    calibration, model = asked.calibration, parts.model
    key_methods = dict.fromkeys(row["key_method"] for row in layers)
    layers = [{key: row[key] for key in row if key != "key_method"} for row in layers]
    return {
        "kind": "convert_gqa",
        "settings": {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "kv_heads": asked.kv_heads,
            "method": asked.method.name,
            "refit": asked.refit,
            "refit_ffn": asked.refit_ffn,
            "grouping": asked.grouping,
            "calibration_tokens": 0 if calibration is None else len(calibration),
            "calibration_source": None,
            "calibration_length": None if calibration is None else asked.length,
            "bos": asked.bos is not None,
            "uptrain_tokens": 0,
            "seed": asked.seed,
        },
        "model": {
            "model_type": parts.family,
            "layers": len(parts.layers),
            "heads": parts.heads,
            "kv_heads_before": before["kv_heads"],
            "kv_heads_after": after["kv_heads"],
            "head_dim": parts.head_dim,
            "hidden": parts.embeddings.weight.shape[1],
            "parameters_before": before["parameters"],
            "parameters_after": after["parameters"],
            "dtype": str(parts.embeddings.weight.dtype).removeprefix("torch."),
            "key_method": ", ".join(key_methods) or asked.method.name,
        },
        "quality": None,
        "uptraining": None,
        "layers": layers,
        "kv_bytes_per_token": {"before": before["kv_bytes"], "after": after["kv_bytes"]},
        "decode": [],
        "verification": None,
        "environment": environment(),
    }


def check_kv_heads(kv_heads: int, present: int) -> None:
    """Raises ValueError unless `kv_heads` is a divisor of the `present` number of KV heads."""
    valid = [n for n in range(1, present + 1) if present % n == 0]
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads not in valid:
        raise ValueError(
            f"kv_heads: got {kv_heads!r}, the model has {present} KV heads; valid are the divisors "
            f"{', '.join(map(str, valid))}"
        )


def check_ffn(parts: hf.Anatomy, refit: bool) -> None:
    """Raises where FFNs cannot be re-fitted: ValueError without `refit`, Unsupported for experts,
    for weights that are not the layer's own numbers, and, by a run of a few tokens where the
    weights are here, for FFNs whose output is not added as it is."""
    if not refit:
        raise ValueError("refit_ffn: got True with refit=False; valid is False, or refit=True")
    for layer in parts:
        output = layer.feed_forward.output  # raises where there is none in common
        if not is_plain(output):
            kind = "a packed weight" if is_packed(output) else f"a {type(output).__name__}"
            raise Unsupported(
                f"refit_ffn: the FFN of layer {layer.index} ends in {kind}, which cannot be solved "
                "again; valid is False, or the model's own weights, before they are packed"
            )
    if any(weight.is_meta for weight in parts.model.parameters()):
        return  # a walk over files finds it at its first layer
    training = parts.model.training
    parts.model.eval()
    try:
        runner = LayerRunner(parts, [torch.arange(FEW)[None] % len(parts.embeddings.weight)])
        check_added(runner, parts.layers[0], runner.embed()[0])
    finally:
        parts.model.train(training)


def _check_no_data_needed(parts: hf.Anatomy, method: str, refit: bool, grouping: str) -> None:
    """ValueError where what is asked for needs calibration tokens."""
    needs_data = METHODS[method].needs_data
    if not (needs_data or refit or grouping == "similarity"):
        return
    what = (
        f"method {method!r}" if needs_data else "refit=True" if refit else "grouping by similarity"
    )
    *most, last = (name for name, one in METHODS.items() if not one.needs_data)
    raise ValueError(
        f"calibration: got None, {what} needs tokens (int64, at least {tokens_needed(parts):,}); "
        f"{', '.join(most)} and {last} with refit=False do without"
    )


def check_swapped(parts: hf.Anatomy, grouping: str) -> None:
    """Unsupported where what a swap has put in belongs to the heads that there are: what a pattern
    has learned for them, or, where heads change places, whatever differs from head to head (sink
    logits, ALiBi's slopes)."""
    if getattr(parts.model, hooks.ATTRIBUTE, None) is None:
        return
    kind, remedy = (
        type(parts.model).__name__,
        "effattn.restore(model) first, and swap what comes out",
    )
    if grouping == "similarity":
        raise Unsupported(
            f"grouping: 'similarity' moves heads, and {kind} is swapped for those it has; {remedy}"
        )
    for layer in parts:
        held = getattr(layer.attention, hooks.ATTRIBUTE)
        if held.backend is not None and held.backend.traits.learned:
            learned = f"what {held.pattern} learned for its {layer.kv_heads} K/V heads"
            raise Unsupported(f"{kind}: layer {layer.index} has {learned}; {remedy}")


def describe_size(parts: hf.Anatomy) -> dict:
    """KV heads, parameters, and the bytes in the model's dtype that the KV cache grows by with a
    token: layers with a window of their own, whose rings do not grow, do not count."""
    return {
        "kv_heads": parts.kv_heads,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "kv_bytes": sum(layer.kv_bytes_per_token for layer in parts if layer.window is None),
    }
