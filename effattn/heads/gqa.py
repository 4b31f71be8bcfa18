"""MHA -> GQA -> MQA: `convert_gqa` gives a live model fewer key/value heads.

Layer by layer, in order: the unmodified layer runs on the unmodified model's activations (its input
moments, its attention outputs), its heads are merged, and the output projection is re-fitted on the
activations of the model converted so far. One layer's statistics exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from effattn.calibration.attended import is_linear
from effattn.calibration.layerwise import LayerRunner, watch, windows
from effattn.calibration.refit import OutputRefit
from effattn.calibration.statistics import SecondMoment, query_energy
from effattn.errors import Unsupported, check_choice
from effattn.heads import methods
from effattn.heads.aligned import aligned
from effattn.heads.grouping import GROUPINGS, by_similarity, contiguous
from effattn.heads.judged import TOKENS, judge
from effattn.heads.methods import Heads, Merged, relative_errors
from effattn.heads.optimal import optimal
from effattn.heads.report import ConversionReport
from effattn.heads.undo import all_or_nothing
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.profiling.environment import environment
from effattn.surgery.checkpoint import check_finite
from effattn.surgery.swapping import active

METHODS: dict[str, methods.Method] = {
    "optimal": optimal,
    "aligned": aligned,
    "mean": methods.mean,
    "first": methods.first,
    "random": methods.random,
}
NEED_DATA = ("optimal", "aligned")
TOKENS_PER_DIMENSION = 10


def convert_gqa(
    model,
    kv_heads: int,
    calibration: torch.Tensor | None = None,
    *,
    method: str = "optimal",
    refit: bool = True,
    grouping: str = "contiguous",
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Gives `model`, in place, `kv_heads` key/value heads in every layer; returns a report.

    model: a transformers causal LM whose class honours num_key_value_heads. kv_heads: divides the
    present number; 1 is MQA; the present number changes nothing. calibration: int64 (N,), at least
    ten tokens per hidden dimension (50,000 are plenty); only `mean`, `first` and `random` with
    `refit=False` do without. method: one of METHODS. refit: solve the output projections again by
    least squares. grouping: "contiguous" or "similarity". length, batch: the calibration windows.
    progress: called with (layers done, layers). Afterwards `model.save_pretrained` writes a
    checkpoint that plain transformers loads.

    Raises ValueError for bad arguments and effattn.errors.Unsupported for classes that cannot hold
    it, both before anything is changed; and FloatingPointError for activations that are not finite.
    All or nothing: an error or a Ctrl-C while it converts leaves the model as it was."""
    require_own_weights(model)
    parts = hf.of(model)
    require_here(model, "convert_gqa")
    parts.require_gqa()
    check_choice("method", method, METHODS)
    check_choice("grouping", grouping, GROUPINGS)
    check_kv_heads(kv_heads, parts.kv_heads)
    need_data = refit or method in NEED_DATA or grouping == "similarity"
    if calibration is None and need_data:
        what = (
            f"method {method!r}"
            if method in NEED_DATA
            else "refit=True"
            if refit
            else "grouping by similarity"
        )
        raise ValueError(
            f"calibration: got None, {what} needs tokens (int64, at least "
            f"{_tokens_needed(parts):,}); "
            "mean, first and random with refit=False do without"
        )
    if calibration is not None:
        length = check_calibration(calibration, parts, length)
    check_swapped(parts, grouping)
    check_finite(model)

    before = describe_size(parts)
    layers: list[dict] = []
    if kv_heads != parts.kv_heads:
        training = model.training
        model.eval()
        try:
            with all_or_nothing(parts) as undo:
                layers = _convert(
                    parts,
                    kv_heads,
                    calibration,
                    method,
                    refit,
                    grouping,
                    length,
                    batch,
                    seed,
                    progress,
                    undo,
                )
                parts.set_kv_heads(kv_heads)
        finally:
            model.train(training)
    after = describe_size(parts)
    return ConversionReport(
        {
            "kind": "convert_gqa",
            "settings": {
                "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
                "kv_heads": kv_heads,
                "method": method,
                "refit": refit,
                "grouping": grouping,
                "calibration_tokens": 0 if calibration is None else len(calibration),
                "calibration_source": None,
                "calibration_length": None if calibration is None else length,
                "uptrain_tokens": 0,
                "seed": seed,
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
                "key_method": ", ".join(dict.fromkeys(row.pop("key_method") for row in layers))
                or method,
            },
            "quality": None,
            "uptraining": None,
            "layers": layers,
            "kv_bytes_per_token": {"before": before["kv_bytes"], "after": after["kv_bytes"]},
            "decode": [],
            "verification": None,
            "environment": environment(),
        }
    )


def check_kv_heads(kv_heads: int, present: int) -> None:
    """Raises ValueError unless `kv_heads` is a divisor of the `present` number of KV heads."""
    valid = [n for n in range(1, present + 1) if present % n == 0]
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads not in valid:
        raise ValueError(
            f"kv_heads: got {kv_heads!r}, the model has {present} KV heads; valid are the divisors "
            f"{', '.join(map(str, valid))}"
        )


def check_swapped(parts: hf.Anatomy, grouping: str) -> None:
    """Unsupported where what a swap has put in belongs to the heads that there are: what a pattern
    has learned for them, or, where heads change places, whatever differs from head to head (sink
    logits, ALiBi's slopes)."""
    if active(parts.model) is None:
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


def _tokens_needed(parts: hf.Anatomy) -> int:
    return TOKENS_PER_DIMENSION * max(
        parts.embeddings.weight.shape[1], parts.heads * parts.head_dim
    )


def check_calibration(tokens: torch.Tensor, parts: hf.Anatomy, length: int) -> int:
    """Raises ValueError for unusable calibration tokens; returns the window length to use."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
        got = (
            f"{tokens.dtype} {tuple(tokens.shape)}"
            if isinstance(tokens, torch.Tensor)
            else type(tokens).__name__
        )
        raise ValueError(f"calibration: got {got}, valid is an int64 tensor (N,) of token ids")
    needed = _tokens_needed(parts)
    if len(tokens) < needed:
        raise ValueError(
            f"calibration: got {len(tokens):,} tokens, at least {needed:,} are needed "
            f"({TOKENS_PER_DIMENSION} per hidden dimension); 50,000 are plenty"
        )
    vocabulary = parts.embeddings.weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"calibration: token ids run from {int(tokens.min())} to {int(tokens.max())}, the "
            "model's vocabulary "
            f"is 0 to {vocabulary - 1}: was it made with another tokenizer?"
        )
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length: got {length!r}, valid is a number of tokens, at least 1")
    length = min(length, getattr(parts.config, "max_position_embeddings", None) or length)
    if len(tokens) < length:
        raise ValueError(
            f"length: got windows of {length:,} tokens, calibration has {len(tokens):,}; valid is "
            "at most that many"
        )
    return length


def describe_size(parts: hf.Anatomy) -> dict:
    """KV heads, parameters, and bytes of KV cache a token takes in the model's dtype."""
    return {
        "kv_heads": parts.kv_heads,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "kv_bytes": sum(layer.kv_bytes_per_token for layer in parts),
    }


def _convert(
    parts, kv_heads, calibration, method, refit, grouping, length, batch, seed, progress, undo
) -> list[dict]:
    runner = teacher = student = None
    if calibration is not None:
        runner = LayerRunner(parts, windows(calibration, length, batch))
        teacher = runner.embed()
        student = [states.clone() for states in teacher]
    rows = []
    for number, layer in enumerate(parts.layers):
        moment, targets, inputs = None, [], None
        if runner:
            moment, targets, inputs = _observe(runner, layer, teacher)
        heads = _heads(layer, moment, seed + 1000 * number)
        # a norm of gain 0: nothing tells one head from another
        if moment is not None and not moment[:-1, :-1].any():
            heads = _heads(layer, None, seed + 1000 * number)
        groups = contiguous(layer.kv_heads, kv_heads)
        if grouping == "similarity":
            groups = by_similarity(heads, kv_heads, METHODS[method])
        row = {
            "layer": number,
            "k_error": None,
            "v_error": None,
            "attention_error_merged": None,
            "attention_error": None,
        }
        merged, facts = _merge(layer, heads, groups, method, moment, inputs)
        row |= facts if runner else {"key_method": method}
        if grouping == "similarity":
            row["groups"] = groups
        undo.remember(layer)
        write(layer, groups, merged)
        if runner:
            row |= _refit(runner, layer, student, targets, refit)
        rows.append(row)
        if progress:
            progress(number + 1, len(parts.layers))
    return rows


def _observe(runner: LayerRunner, layer: hf.Layer, teacher: list[torch.Tensor]):
    """Runs the old layer: its input moment, its attention outputs a batch, and where that moment
    does not tell all some of its inputs (N, D), otherwise None; moves `teacher` one layer on."""
    moment, targets, inputs = SecondMoment(ones=True), [], []
    every = -(-sum(batch.numel() for batch in runner.batches) // TOKENS)
    bias = 0 if layer.o.bias is None else layer.o.bias

    def see(x: torch.Tensor, _: torch.Tensor) -> None:
        moment.add(x)
        if not is_linear(layer):
            inputs.append(x[::every].clone())

    with (
        watch(layer.k.module, see),
        watch(layer.o.module, lambda _, y: targets.append((y - bias).cpu())),
    ):
        for number, output in runner.run(layer.index, teacher):
            teacher[number] = output
    if not torch.isfinite(moment.total).all():
        raise FloatingPointError(
            f"layer {layer.index}: the calibration activations contain NaN or infinity"
        )
    return moment.mean.cpu(), targets, torch.cat(inputs) if inputs else None


def _merge(layer: hf.Layer, heads: Heads, groups: list[list[int]], method: str, moment, inputs):
    """The merge of every group, and the row's facts about it. moment, inputs: what `_observe`
    gives.
    """

    def merge(by: methods.Method) -> list[Merged]:
        return [by(heads.select(group)) for group in groups]

    if inputs is None:
        merged = merge(METHODS[method])
        return merged, {**_merge_errors(heads, groups, merged, moment), "key_method": method}
    best = judge(layer, groups, merge, METHODS[method], inputs, write)
    return best.merged, {
        "k_error": best.k_error,
        "v_error": best.v_error,
        "key_method": best.key_method,
    }


def _refit(runner: LayerRunner, layer: hf.Layer, student, targets, refit: bool) -> dict:
    """Measures the merged layer, re-fits its output projection if asked, and moves `student` one
    layer on.
    """
    fit, batches = OutputRefit(), iter(targets)
    with watch(layer.o.module, lambda z, _: fit.add(z, next(batches).to(z.device))):
        outputs = [output for _, output in runner.run(layer.index, student)]
    weight = layer.o.module.weight
    row = {"attention_error_merged": fit.error(weight), "attention_error": None}
    if refit:
        with torch.no_grad():
            weight.copy_(fit.solve(weight))
        row["attention_error"] = fit.error(weight)
        outputs = [output for _, output in runner.run(layer.index, student)]
    student[:] = outputs
    return row


def _heads(layer: hf.Layer, moment: torch.Tensor | None, seed: int) -> Heads:
    k, v, o = layer.k.with_bias.cpu(), layer.v.with_bias.cpu(), layer.o.by_head.double().cpu()
    if moment is None:  # without data every input direction counts the same
        moment = torch.eye(k.shape[-1], dtype=k.dtype)
    o = o.reshape(layer.kv_heads, -1, *o.shape[1:])  # (K, query heads of each, D, d)
    norm = layer.k_norm
    normed = None if norm is None else "rms" if "RMS" in type(norm).__name__ else "layer"
    query = query_energy(layer, moment.to(layer.q.module.weight.device)).cpu()
    return Heads(
        k,
        v,
        moment,
        query,
        torch.einsum("krDd,krDe->kde", o, o),
        layer.rotary_pairs(),
        normed,
        seed,
    )


def _merge_errors(heads: Heads, groups: list[list[int]], merged: list[Merged], moment) -> dict:
    """The layer's key and value errors: one merge of all groups, weighted by their energy."""
    heads = replace(heads, moment=heads.moment if moment is None else moment)
    lost = [
        relative_errors(heads.select(group), part)
        for group, part in zip(groups, merged, strict=True)
    ]
    whole = [_energies(heads.select(group)) for group in groups]
    k, v = (
        sum(pair[i] * size[i] for pair, size in zip(lost, whole, strict=True))
        / max(sum(s[i] for s in whole), 1e-300)
        for i in (0, 1)
    )
    return {"k_error": k, "v_error": v}


def _energies(heads: Heads) -> tuple[float, float]:
    pairs = ((heads.keys, heads.query), (heads.values, heads.output))
    return tuple(
        float(torch.einsum("hdi,ij,hej,hde->", maps, heads.moment, maps, w)) for maps, w in pairs
    )


@torch.no_grad()
def write(layer: hf.Layer, groups: list[list[int]], merged: list[Merged]) -> None:
    """Writes merged groups into the layer: fewer K and V rows, their stand-ins folded into Q and O,
    and query heads in the order of the groups."""
    order = [head for group in groups for head in group]
    share = layer.heads // layer.kv_heads
    queries = [head * share + i for head in order for i in range(share)]
    device = layer.q.module.weight.device
    key_maps = torch.cat([part.key_maps for part in merged]).repeat_interleave(share, 0).to(device)
    value_maps = (
        torch.cat([part.value_maps for part in merged]).repeat_interleave(share, 0).to(device)
    )
    q = key_maps.transpose(1, 2) @ layer.q.with_bias[queries]
    o = layer.o.by_head.double()[queries] @ value_maps
    key, value = (
        torch.stack([getattr(part, name) for part in merged]).to(device)
        for name in ("key", "value")
    )
    layer.merge_norms(queries, groups)
    layer.set_heads(q, key, value, o)
