"""Structured projections in a live model: check all, fit all, and only then replace.

    asked = make(parts, "monarch(blocks=16, ratio=0.5)", calibration=None)  # refuses here, or never
    replace(parts.model, fit(asked))                  # `fit` is of effattn.surgery.projecting
    errors(model)                                                          # a dict for each matrix

The modules are the record: what a model's projections are is read from its `ProjectedLinear`s, by
`describe` and by checkpoints. A replaced linear is a new module, so that hooks on it are gone;
"dense" multiplies the factors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effattn.axes import options_of
from effattn.calibration.layerwise import tokens_at_once, windows
from effattn.calibration.tokens import check_calibration
from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, hooks
from effattn.hf.beginning import bos_of
from effattn.hf.weights import is_packed, is_plain
from effattn.projections.base import (
    FITTED,
    PROJECTIONS,
    ProjectedLinear,
    StructuredLinear,
    recorded_kind,
)
from effattn.projections.latent import LatentLinear
from effattn.specs import by_layer, format_spec, parse_spec

DENSE = "dense"  # an nn.Linear
LENGTH, BATCH = 512, 8  # of calibration windows


@dataclass(frozen=True)
class Matrix:
    """One linear module that will be replaced. `kind`, `options` None: by an nn.Linear."""

    name: str  # its path in the model
    layer: int
    module: nn.Linear | StructuredLinear
    spec: str
    kind: type[ProjectedLinear] | None
    options: dict | None

    @property
    def from_data(self) -> bool:
        """Whether the method needs calibration."""
        return self.options is not None and self.options["method"] == "data"

    @property
    def linear(self) -> nn.Linear:
        """What is replaced, multiplied out where it is structured."""
        return self.module if isinstance(self.module, nn.Linear) else self.module.to_linear()

    def fitted(self, moment: Tensor | None, sizes: dict | None = None) -> ProjectedLinear:
        """What takes its place: closest in its outputs with a second moment, else in its weights.
        sizes: what a shared budget has given it, instead of its spec's."""
        assert self.kind is not None  # "dense" is made, not fitted
        assert self.options is not None
        sizes = sizes or sizing(self.options)
        try:
            new = self.kind.from_linear(self.linear, **sizes, moment=moment)
        except ValueError as error:
            raise type(error)(f"{self.name}: {error}") from error
        new.spec = format_spec(*parse_spec(self.spec))
        return new


@dataclass(frozen=True)
class Replacement:
    """What a swap of projections is going to do, checked: which matrices, and the calibration
    tokens (N,) int64 in windows of `length`, where some are fitted to data."""

    parts: anatomy.Anatomy
    matrices: tuple[Matrix, ...]
    calibration: Tensor | None
    length: int  # of calibration windows

    @property
    def batches(self) -> list[Tensor] | None:
        """The calibration windows, int64 (batch, length) each; None where nothing is fitted to
        data."""
        if self.calibration is None or not any(matrix.from_data for matrix in self.matrices):
            return None
        return windows_of(self.calibration, self.parts, self.length)


def make(
    parts: anatomy.Anatomy,
    projections: str | dict[str | int, str],
    calibration: Tensor | None = None,
    kv_heads: int | None = None,
    repatterned: Iterable[int] = (),
) -> Replacement:
    """Reads the spec, or the dict from layers to specs, and checks that it can be carried out.

    calibration: tokens, int64 (N,), for method="data". kv_heads: what the model will have by then.
    repatterned: layers whose pattern is swapped in the same call. ValueError and Unsupported as for
    `effattn.swap`."""
    chosen = by_layer(projections, len(parts.layers), "projections")
    # every matrix of every layer is checked here; `fit` and `replace` then have nothing to refuse
    names = {module: name for name, module in parts.model.named_modules()}
    matrices: list[Matrix] = []
    for index, spec in chosen.items():
        layer, (kind, options) = parts.layers[index], _read(spec)
        if options is not None and options["method"] == "data" and calibration is None:
            raise ValueError(
                f"calibration: got None, {spec!r} needs tokens (int64); method='svd' fits weights "
                "and does without"
            )
        if hooks.GLOBAL in layer.attention._modules and index not in set(repatterned):
            raise Unsupported(
                f"projections: layer {index} has global projections beside its own, made for its "
                "present pattern; effattn.restore the model, or swap pattern and projections in "
                "one call"
            )
        for module in _linears(layer, options is None or options["ffn"]):
            if options is None and not isinstance(module, StructuredLinear):
                continue
            if isinstance(module, LatentLinear):  # what makes keys and values of latents stays
                continue
            if any(module is matrix.module for matrix in matrices):
                raise Unsupported(f"projections: {names[module]} is used by more than one layer")
            matrix = Matrix(names[module], index, module, spec, kind, options)
            _check_module(names[module], module)
            _check_sizes(matrix, _outputs(layer, module, kv_heads))
            matrices.append(matrix)
    length = LENGTH
    if calibration is not None and any(matrix.from_data for matrix in matrices):
        length = check_calibration(calibration, parts, LENGTH)
    return Replacement(parts, tuple(matrices), calibration, length)


def windows_of(
    calibration: Tensor, parts: anatomy.Anatomy, length: int | None = None
) -> list[Tensor]:
    """Batches of windows, int64 (batch, length) each."""
    length = check_calibration(calibration, parts, LENGTH) if length is None else length
    batch = max(1, tokens_at_once(parts, BATCH * length) // length)
    return windows(calibration, length, batch, bos_of(parts.model))


def _read(spec: str) -> tuple[type[ProjectedLinear] | None, dict | None]:
    """The projection of a spec and its options; None and None for "dense"."""
    name, given = parse_spec(spec)
    known = PROJECTIONS.members()
    check_choice("projections", name, (DENSE, *known))
    if name == DENSE:
        if given:
            raise ValueError(f"projections: got {spec!r}, dense takes no options")
        return None, None
    kind = known[name]
    valid = options_of(kind.options)
    for option in given:
        check_choice(f"projections: {name}: option", option, valid)
    for option in valid.values():
        if option.default is option.empty and option.name not in given:
            raise ValueError(
                f"projections: {name}: {option.name} must be given, for example {kind.EXAMPLE}"
            )
    return kind, kind.options(**given)


def sizing(options: dict) -> dict:
    """Those of the options that decide the sizes."""
    return {name: value for name, value in options.items() if name not in ("ffn", "method")}


def _linears(layer: anatomy.Layer, ffn: bool) -> list[Any]:
    """q, k, v and o (a fused one once), and on request the linears of the FFN."""
    found = layer.qkv_modules
    if ffn:
        if any(
            p.dim() > 2
            for m in layer.ffn.modules()
            if not isinstance(m, StructuredLinear)
            for p in own(m)
        ):
            raise Unsupported(
                f"projections: the experts of layer {layer.index} ({type(layer.ffn).__name__}) "
                "are stacked in one parameter and no linear layers; without ffn=True, q, k, v and "
                "o are replaced"
            )
        # what is no linear is refused later
        found = found + [m for m in layer.ffn.modules() if hasattr(m, "in_features")]
    return found


def own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module without those of its children."""
    return list(module.parameters(recurse=False))


def _outputs(
    layer: anatomy.Layer, module: nn.Linear | StructuredLinear, kv_heads: int | None
) -> int:
    """The outputs that `module` will have when the layer has `kv_heads` (None: stays as it is)."""
    fewer = 0 if kv_heads is None else (layer.kv_heads - kv_heads) * layer.head_dim
    return module.out_features - fewer * sum(
        module is projection.module for projection in (layer.k, layer.v)
    )


def _check_module(name: str, module: nn.Module) -> None:
    """Unsupported for a module that is no linear layer."""
    if is_packed(module):
        raise Unsupported(
            f"projections: {name} is a {type(module).__name__} of {module.weight.dtype}; a "
            "quantized weight cannot be projected: load the model in a float dtype"
        )
    if not is_plain(module) and not isinstance(module, StructuredLinear):
        raise Unsupported(f"projections: {name} is a {type(module).__name__}, valid is a Linear")


def _check_sizes(matrix: Matrix, outputs: int) -> None:
    """ValueError for a module that cannot be replaced so. outputs: its rows by then."""
    name, module = matrix.name, matrix.module
    if matrix.kind is not None and matrix.options is not None:
        sizes = sizing(matrix.options)
        matrix.kind.check_sizes(module.in_features, outputs, **sizes, where=name)


def replace(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Puts the modules, by their paths in `new`, in their places in the model."""
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def spec_of(layer: anatomy.Layer) -> str:
    """The layer's projections, as `describe` shows them; several kinds are separated by commas."""
    # what makes keys and values of latents is the heads' business
    modules = [m for m in layer.qkv_modules if not isinstance(m, LatentLinear)]
    kinds = dict.fromkeys(m.spec if isinstance(m, StructuredLinear) else "dense" for m in modules)
    inside = (m for m in layer.ffn.modules() if isinstance(m, StructuredLinear))
    beside = [m for m in inside if m.spec not in kinds]
    return ", ".join([*kinds, *dict.fromkeys(f"ffn: {m.spec}" for m in beside)])


def matrices_of(model: nn.Module) -> dict[str, ProjectedLinear]:
    """The model's projected layers by their paths."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ProjectedLinear)
    }


def errors(model: nn.Module) -> list[dict]:
    """How far each projected matrix of a model was from the one it replaced: a dict for each, in
    the model's order.

    matrix (path), out_features, in_features, blocks, rank, parameters and dense_parameters (without
    biases), error (relative, Frobenius) and output_error (of the outputs on the calibration tokens;
    None with method="svd"). Training does not change them; projecting again measures against the
    projected matrix. Empty for a model without any."""
    return [
        dict(
            matrix=name,
            out_features=m.out_features,
            in_features=m.in_features,
            **{size: getattr(m, size) for size in m.SIZES},
            parameters=m.weight_parameters,
            dense_parameters=m.in_features * m.out_features,
            error=m.error,
            output_error=m.output_error,
        )
        for name, m in matrices_of(model).items()
    ]


def record(model: nn.Module) -> dict[str, dict]:
    """What a checkpoint must say so that `rebuild` can make the modules."""
    return {
        name: {key: getattr(module, key) for key in module.saved()}
        for name, module in matrices_of(model).items()
    }


def rebuild(model: nn.Module, recorded: dict[str, dict]) -> None:
    """Puts projected layers of the recorded sizes, whose weights mean nothing yet, for linears.

    ValueError for records that do not fit the model.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    new: dict[str, nn.Module] = {}
    for name, entry in recorded.items():
        linear, kind = linears.get(name), recorded_kind(entry)
        if linear is None or not isinstance(entry, dict) or entry.keys() != set(kind.saved()):
            raise ValueError(
                f"config.json: effattn: projections: {name!r}: {entry!r} does not fit the model"
            )
        new[name] = kind(
            linear.in_features,
            linear.out_features,
            **{size: entry[size] for size in kind.SIZES},
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        for field in FITTED:
            setattr(new[name], field, entry[field])
    replace(model, new)
