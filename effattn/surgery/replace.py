"""Structured projections in a live model: check all, fit all, and only then replace.

    plan = make(parts, "monarch(blocks=16, ratio=0.5)", calibration=None)   # refuses here, or never
    replace(parts.model, fit(plan))
    errors(model)                                                           # a dict for each matrix

The modules are the record: what a model's projections are is read from its MonarchLinears, by
`describe` and by checkpoints. A replaced linear is a new module, so that hooks on it are gone;
"dense" multiplies the factors out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, hooks, placement
from effattn.hf.weights import is_packed, is_plain
from effattn.projections.monarch import MonarchLinear, sizes
from effattn.projections.packed import PackedLinear
from effattn.registry import format_spec, parse_spec
from effattn.surgery.plan import parse_layers

PROJECTIONS = ("dense", "monarch")
METHODS = ("svd", "data")
LENGTH, BATCH = 512, 8  # of calibration windows


def monarch(
    blocks: int,
    rank: int | None = None,
    ratio: float | None = None,
    ffn: bool = False,
    method: str = "svd",
    pad: bool = False,
) -> dict:
    """The options of `monarch(...)`, checked as far as no weight is needed.

    blocks, rank, ratio: as for `effattn.projections.monarch.sizes`. ffn: the linears of the FFN
    too. method: "svd", closest weights, or "data", closest outputs on the calibration tokens. pad:
    where blocks do not divide, add zero rows and columns; otherwise refuse."""
    check_choice("projections: monarch: method", method, METHODS)
    for name, value in (("ffn", ffn), ("pad", pad)):
        if not isinstance(value, bool):
            raise ValueError(
                f"projections: monarch: {name}: got {value!r}, valid are True and False"
            )
    return dict(blocks=blocks, rank=rank, ratio=ratio, ffn=ffn, method=method, pad=pad)


@dataclass(frozen=True)
class Matrix:
    """One linear module that will be replaced. `options` None: by an nn.Linear."""

    name: str  # its path in the model
    layer: int
    module: nn.Module
    spec: str
    options: dict | None


@dataclass(frozen=True)
class Plan:
    """What a swap of projections is going to do."""

    parts: anatomy.Anatomy
    matrices: tuple[Matrix, ...]
    calibration: Tensor | None
    length: int  # of calibration windows


def make(
    parts: anatomy.Anatomy,
    projections: str | dict[str | int, str],
    calibration: Tensor | None = None,
    kv_heads: int | None = None,
    repatterned: Iterable[int] = (),
) -> Plan:
    """Reads the spec, or the dict from layers to specs, and checks that it can be carried out.

    calibration: tokens, int64 (N,), for method="data". kv_heads: what the model will have by then.
    repatterned: layers whose pattern is swapped in the same call. ValueError and Unsupported as for
    `effattn.swap`."""
    count = len(parts.layers)
    of_layer = projections if isinstance(projections, dict) else {f"0-{count - 1}": projections}
    chosen = parse_layers(of_layer, count, "projections")
    names = {module: name for name, module in parts.model.named_modules()}
    placement.require_here(parts.model, "projections")
    matrices = []
    for index, spec in chosen.items():
        layer, options = parts.layers[index], _options(spec)
        if options is not None and options["method"] == "data" and calibration is None:
            raise ValueError(
                f"calibration: got None, {spec!r} needs tokens (int64); method='svd' fits weights "
                "and does without"
            )
        if hooks.GLOBAL in layer.attention._modules and index not in set(repatterned):
            raise Unsupported(
                f"projections: layer {index} has global projections beside its own, made for its "
                "present pattern; "
                "effattn.restore the model, or swap pattern and projections in one call"
            )
        for module in _linears(layer, options is None or options["ffn"]):
            if options is None and not isinstance(module, MonarchLinear | PackedLinear):
                continue
            if any(module is matrix.module for matrix in matrices):
                raise Unsupported(f"projections: {names[module]} is used by more than one layer")
            _check(names[module], module, options, _outputs(layer, module, kv_heads))
            matrices.append(Matrix(names[module], index, module, spec, options))
    length = LENGTH
    if any(m.options is not None and m.options["method"] == "data" for m in matrices):
        from effattn.heads.gqa import check_calibration

        length = check_calibration(calibration, parts, LENGTH)
    return Plan(parts, tuple(matrices), calibration, length)


def _options(spec: str) -> dict | None:
    """Of a spec of monarch; None for "dense"."""
    name, given = parse_spec(spec)
    check_choice("projections", name, PROJECTIONS)
    valid = list(inspect.signature(monarch).parameters) if name == "monarch" else []
    for option in given:
        if not valid:
            raise ValueError(f"projections: got {spec!r}, dense takes no options")
        check_choice("projections: monarch: option", option, valid)
    if name == "dense":
        return None
    if "blocks" not in given:
        raise ValueError(
            "projections: monarch: blocks must be given, for example monarch(blocks=16)"
        )
    return monarch(**given)


def _linears(layer: anatomy.Layer, ffn: bool) -> list[nn.Module]:
    """q, k, v and o (a fused one once), and on request the linears of the FFN."""
    found = layer.qkv_modules
    if ffn:
        special = MonarchLinear | PackedLinear
        if any(
            p.dim() > 2 for m in layer.ffn.modules() if not isinstance(m, special) for p in own(m)
        ):
            raise Unsupported(
                f"projections: the experts of layer {layer.index} ({type(layer.ffn).__name__}) "
                "are stacked in one "
                "parameter and no linear layers; without ffn=True, q, k, v and o are replaced"
            )
        # what is no linear is refused later
        found = found + [m for m in layer.ffn.modules() if hasattr(m, "in_features")]
    return found


def own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module without those of its children."""
    return list(module.parameters(recurse=False))


def _outputs(layer: anatomy.Layer, module: nn.Module, kv_heads: int | None) -> int:
    """The outputs that `module` will have when the layer has `kv_heads` (None: stays as it is)."""
    fewer = 0 if kv_heads is None else (layer.kv_heads - kv_heads) * layer.head_dim
    return module.out_features - fewer * sum(
        module is projection.module for projection in (layer.k, layer.v)
    )


def _check(name: str, module: nn.Module, options: dict | None, outputs: int) -> None:
    if is_packed(module):
        raise Unsupported(
            f"projections: {name} is a {type(module).__name__} of {module.weight.dtype}; a "
            "quantized weight "
            "cannot be projected: load the model in a float dtype"
        )
    if not is_plain(module) and not isinstance(module, MonarchLinear | PackedLinear):
        raise Unsupported(f"projections: {name} is a {type(module).__name__}, valid is a Linear")
    if options is not None:
        sizes(
            module.in_features,
            outputs,
            **{k: options[k] for k in ("blocks", "rank", "ratio", "pad")},
            name=name,
        )


def fit(plan: Plan) -> dict[str, nn.Module]:
    """name -> the module that will take its place. Changes nothing; "data" runs the model layer by
    layer.
    """
    new: dict[str, nn.Module] = {}
    for matrix in plan.matrices:
        if matrix.options is None:
            new[matrix.name] = matrix.module.to_linear()
        elif matrix.options["method"] == "svd":
            new[matrix.name] = _fitted(matrix, None)
    if len(new) < len(plan.matrices):
        new |= _fit_outputs(plan)
    return new


def _fit_outputs(plan: Plan) -> dict[str, nn.Module]:
    """Those of method="data": the inputs of one layer at a time, on the unmodified model."""
    from effattn.calibration.layerwise import LayerRunner, watch, windows
    from effattn.calibration.statistics import SecondMoment

    new, model = {}, plan.parts.model
    training = model.training
    model.eval()
    try:
        runner = LayerRunner(plan.parts, windows(plan.calibration, plan.length, BATCH))
        hidden = runner.embed()
        for index in range(len(plan.parts.layers)):
            wanted = [
                m
                for m in plan.matrices
                if m.layer == index and m.options and m.options["method"] == "data"
            ]
            moments = [SecondMoment() for _ in wanted]
            with ExitStack() as stack:
                for matrix, moment in zip(wanted, moments, strict=True):
                    stack.enter_context(
                        watch(matrix.module, lambda x, _, moment=moment: moment.add(x))
                    )
                for number, states in runner.run(index, hidden):
                    hidden[number] = states
            for matrix, moment in zip(wanted, moments, strict=True):
                new[matrix.name] = _fitted(matrix, moment.mean)
    finally:
        model.train(training)
    return new


def _fitted(matrix: Matrix, moment: Tensor | None) -> MonarchLinear:
    linear = matrix.module if isinstance(matrix.module, nn.Linear) else matrix.module.to_linear()
    options = {name: matrix.options[name] for name in ("blocks", "rank", "ratio", "pad")}
    try:
        new = MonarchLinear.from_linear(linear, **options, moment=moment)
    except ValueError as error:
        raise type(error)(f"{matrix.name}: {error}") from error
    new.spec = format_spec(*parse_spec(matrix.spec))
    return new


def replace(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Puts the modules in their places."""
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def spec_of(layer: anatomy.Layer) -> str:
    """The layer's projections, as `describe` shows them; several kinds are separated by commas."""
    modules = layer.qkv_modules
    special = MonarchLinear | PackedLinear
    kinds = dict.fromkeys(m.spec if isinstance(m, special) else "dense" for m in modules)
    beside = [m for m in layer.ffn.modules() if isinstance(m, special) and m.spec not in kinds]
    return ", ".join([*kinds, *dict.fromkeys(f"ffn: {m.spec}" for m in beside)])


def matrices_of(model: nn.Module) -> dict[str, MonarchLinear]:
    """The model's Monarch layers by their paths."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MonarchLinear)
    }


def errors(model: nn.Module) -> list[dict]:
    """How far each Monarch matrix of a model was from the one it replaced: a dict for each, in the
    model's order.

    matrix (path), out_features, in_features, blocks, rank, parameters and dense_parameters (without
    biases), error (relative, Frobenius) and output_error (of the outputs on the calibration tokens;
    None with method="svd"). Training does not change them; projecting again measures against the
    projected matrix. Empty for a model without any."""
    return [
        dict(
            matrix=name,
            out_features=m.out_features,
            in_features=m.in_features,
            blocks=m.blocks,
            rank=m.rank,
            parameters=m.sizes.parameters,
            dense_parameters=m.in_features * m.out_features,
            error=m.error,
            output_error=m.output_error,
        )
        for name, m in matrices_of(model).items()
    ]


SAVED = ("blocks", "rank", "spec", "error", "output_error")


def record(model: nn.Module) -> dict[str, dict]:
    """What a checkpoint must say so that `rebuild` can make the modules."""
    return {
        name: {key: getattr(module, key) for key in SAVED}
        for name, module in matrices_of(model).items()
    }


def rebuild(model: nn.Module, recorded: dict[str, dict]) -> None:
    """Puts Monarch layers of the recorded sizes, with weights of no meaning yet, where linears are.

    ValueError for records that do not fit the model.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    new = {}
    for name, entry in recorded.items():
        linear = linears.get(name)
        if linear is None or not isinstance(entry, dict) or entry.keys() != set(SAVED):
            raise ValueError(
                f"config.json: effattn: projections: {name!r}: {entry!r} does not fit the model"
            )
        new[name] = MonarchLinear(
            linear.in_features,
            linear.out_features,
            entry["blocks"],
            linear.bias is not None,
            rank=entry["rank"],
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        new[name].spec, new[name].error, new[name].output_error = (entry[key] for key in SAVED[2:])
    replace(model, new)
