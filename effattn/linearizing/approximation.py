"""How far approximate attention is from exact attention, as a function of what it may spend.

    report = effattn.measure_approximation(model)   # curves by layer, on the model's own q, k and v
    report.to_html()

The inputs are what a model's attention really gets, layer by layer, and beside them N(0, 1) of the
same shape, which is what papers measure on and no model looks like. Nothing is trained: learned
maps are as they start out. Errors are RMS(approximate - exact) / RMS(exact); 1.0 is what zeros
would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn import registry
from effattn.encoding import begun
from effattn.errors import check_choice
from effattn.hf import anatomy as hf
from effattn.hf.beginning import bos_of
from effattn.hf.placement import present
from effattn.interface import Shape
from effattn.linearizing.inputs import exact, own_scores, projections_of
from effattn.projections import MonarchLinear

NORMAL = "N(0, 1)"
MOST_LAYERS = 6  # that are shown of a deep model, evenly spaced


@dataclass(frozen=True)
class Sweep:
    """One method's budget: `option` of `spec` (with {} in its place) takes `values`. causal: how it
    is compared.
    """

    option: str
    values: tuple[int | str, ...]
    spec: str
    causal: bool = True


SWEEPS = {
    "sliding": Sweep("window", (16, 32, 64, 128, 256), "sliding(window={})"),
    "block": Sweep("block", (16, 32, 64, 128, 256), "block(block={}, look_back=1)"),
    "topk": Sweep("blocks", (1, 2, 4, 8, 16), "topk(window=64, block=16, blocks={})"),
    "lsh": Sweep("rounds", (1, 2, 4, 8, 16), "lsh(rounds={}, buckets=16, chunk=16)"),
    "linformer": Sweep(
        "k", (16, 32, 64, 128, 256), "linformer(k={}, max_length=512)", causal=False
    ),
    "linformer_blockwise": Sweep(
        "k", (8, 32, 128, 256), "linformer_blockwise(k={}, max_length=512, block=64)"
    ),
    "vq": Sweep("codes", (16, 32, 64, 128, 256), "vq(codes={})"),
    "performer": Sweep("features", (16, 64, 256, 1024), "performer(features={})"),
    "linear": Sweep(
        "feature_map", ("elu", "relu", "relu2", "softmax", "hedgehog"), "linear(feature_map='{}')"
    ),
}
RATIOS = (0.125, 0.25, 0.5, 0.75)  # of a projection's parameters that `monarch` may keep
METHODS = (*SWEEPS, "monarch")


@torch.no_grad()
def measure_approximation(
    model: nn.Module | str = "embedded",
    tokens: Tensor | None = None,
    *,
    methods: Sequence[str] = METHODS,
    layers: Sequence[int] | None = None,
    length: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
):
    """An `ApproximationReport` (.rows, .to_json, .to_markdown, .to_html, .save) of `methods` on
    `model`.

    model: a causal LM that is not swapped, or a name as `effattn.load` takes it. tokens: int64
    (N,), at least twice `length`: codebooks are fitted on the first windows, errors measured on the
    last one; default: the embedded corpus, for the embedded model. layers: default all, or six of a
    deeper model. Raises ValueError for bad input."""
    from effattn.linearizing.approximation_report import ApproximationReport

    for method in methods:
        check_choice("methods", method, METHODS)
    if isinstance(model, str):
        from effattn.surgery.checkpoint import load_model

        model, tokenizer = load_model(model)
        if tokens is None:
            from effattn import embedded

            tokens = embedded.tokens("validation", 4 * length, tokenizer=tokenizer)
    if (
        tokens is None
        or tokens.dtype != torch.int64
        or tokens.dim() != 1
        or len(tokens) < 2 * length
    ):
        got = "none" if tokens is None else f"{tokens.dtype} {tuple(tokens.shape)}"
        raise ValueError(
            f"tokens: got {got}, valid is an int64 tensor (N,) of at least {2 * length:,} token ids"
        )
    parts = hf.of(model)
    count = len(parts.layers)
    shown = (
        range(count)
        if count <= MOST_LAYERS
        else [round(i * (count - 1) / (MOST_LAYERS - 1)) for i in range(6)]
    )
    layers = list(shown if layers is None else layers)
    for index in layers:
        if not 0 <= index < count:
            raise ValueError(f"layers: got {index}, the model has layers 0 to {count - 1}")
    chosen = [parts.layers[index] for index in layers] if "monarch" in methods else []
    for projection in (getattr(layer, name) for layer in chosen for name in "qkvo"):
        projection.by_head  # noqa: B018 - raises where there are no numbers to read
    earlier = tokens[: (len(tokens) - length) // length * length].view(-1, length)[:8]
    windows = [begun(one, bos_of(model)) for one in (earlier, tokens[None, -length:])]
    fitted, measured = (projections_of(model, one, layers) for one in windows)
    given = {f"layer {index}": (fitted[index], measured[index]) for index in layers}
    own = {f"layer {index}": own_scores(parts.layers[index]) for index in layers}
    given[NORMAL] = tuple(
        _normal(one[layers[0]], seed + part) for part, one in enumerate((fitted, measured))
    )
    swept = [method for method in methods if method in SWEEPS]
    total, rows = sum(len(SWEEPS[method].values) for method in swept) * len(given), []
    for method in swept:
        for value in SWEEPS[method].values:
            for name, (calibration, inputs) in given.items():
                rows.append(
                    {
                        "method": method,
                        "option": SWEEPS[method].option,
                        "budget": value,
                        "inputs": name,
                    }
                    | _error(SWEEPS[method], value, calibration, inputs, own.get(name, {}))
                )
                if progress:
                    progress(len(rows), total)
    with present(*(module for layer in chosen for module in layer.qkv_modules)):
        matrices = _monarch(parts, layers, seed) if chosen else []
    return ApproximationReport.of(model, rows, matrices, length, layers)


def _normal(like: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=draw).to(x) for x in like)


def _error(
    sweep: Sweep,
    value: int | str,
    calibration: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    own: dict[str, float | None],
) -> dict:
    """{"error", "flops", "dense_flops", "state_bytes", "dense_state_bytes"} of one backend on q, k,
    v. own: as of `own_scores`; a cap that the method has not is a part of its error."""
    q, k, v = inputs
    backend = registry.backend(sweep.spec.format(value)).to(q.device)
    if hasattr(backend, "calibrate"):
        backend.calibrate(calibration[1])
    truth = exact(q, k, v, sweep.causal, **own)
    ours = {name: x for name, x in own.items() if name == "scale" or name in backend.extras}
    error = (
        backend(q, k, v, causal=sweep.causal, **ours) - truth
    ).double().square().mean() / truth.double().square().mean()
    batch, heads, tokens, dim = q.shape
    shape = Shape(
        batch, heads, k.shape[1], tokens, tokens, dim, v.shape[3], q.element_size(), sweep.causal
    )
    cost, dense = backend.cost(shape), registry.backend("dense").cost(shape)
    return {
        "error": float(error.sqrt()),
        "flops": cost.flops,
        "dense_flops": dense.flops,
        "state_bytes": cost.state_bytes if sweep.causal else None,
        "dense_state_bytes": dense.state_bytes,
    }


def _monarch(parts: hf.Anatomy, layers: Sequence[int], seed: int) -> list[dict]:
    """Relative Frobenius error of every attention projection as a Monarch matrix, and of a Gaussian
    of q's shape.
    """
    draw, rows = torch.Generator().manual_seed(seed), []
    q = parts.layers[layers[0]].q.module.weight
    given = {"Gaussian": [torch.randn(q.shape, generator=draw)]}
    for name in "qkvo":
        weights = {
            id(w): w for w in (getattr(parts.layers[index], name).module.weight for index in layers)
        }
        given[name] = [weight.detach().float() for weight in weights.values()]
    for name, weights in given.items():
        for ratio in RATIOS:
            errors, kept = [], []
            for weight in weights:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight)
                fitted = MonarchLinear.from_linear(linear, blocks=16, ratio=ratio)
                errors.append(float((fitted.dense() - weight).norm() / weight.norm()))
                kept.append(sum(p.numel() for p in fitted.parameters()) / weight.numel())
            rows.append(
                {
                    "matrix": name,
                    "ratio": ratio,
                    "kept": sum(kept) / len(kept),
                    "error": sum(errors) / len(errors),
                }
            )
    return rows
