"""`effattn.shrink`: what a plan says of a model's weights, for layers that one names oneself.

    effattn.shrink(model, kv_heads={"2-3": 2}, ffn={"0": 512}, calibration=tokens)    # in place

The lines that `effattn.fit` gives are such calls."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from effattn.calibration.tokens import check_calibration
from effattn.fitting import forms
from effattn.fitting.building import Builder, apply
from effattn.fitting.candidates import go_together, values_of
from effattn.fitting.plan import WEIGHTS, Plan, axis_of, is_shaped, is_structured
from effattn.fitting.session import check_model
from effattn.hf import anatomy
from effattn.hf.beginning import bos_of
from effattn.specs import by_layer

Sizes = int | Mapping[str | int, int]
Forms = str | Mapping[str | int, str]


def shrink(
    model: nn.Module,
    *,
    kv_heads: Sizes | None = None,
    latent: Sizes | None = None,
    ffn: Sizes | None = None,
    attention_weights: Forms | None = None,
    ffn_weights: Forms | None = None,
    calibration: Tensor | None = None,
    length: int = 512,
    bos: bool | None = None,
) -> nn.Module:
    """Gives layers of `model` smaller weights, in place; returns the model.

    model: a transformers causal LM, unswapped. Each argument is one value for all layers, or a dict
    from layers ("3", "0-3", "4-") to values. kv_heads: key/value heads, a divisor of what there
    are, or 0: no attention (not in the first layer). latent: so many numbers are remembered of a
    token, of which keys and values are made. ffn: inner dimensions, 0: no FFN. attention_weights,
    ffn_weights: "int8" or "nf4" (bitsandbytes), "lowrank(ratio=0.5)", "monarch(blocks=4,
    ratio=0.5)", "2:4" or "bitmask(sparsity=0.5)". calibration: int64 (N,), for all but
    bitsandbytes' formats, in windows of `length`; bos: as for `effattn.convert_gqa`. Output and
    down projections are solved again by least squares.

    ValueError for values that mean nothing or do not go together, Unsupported for what the class
    cannot have: nothing is changed then. Sources of the parts: those of `effattn.fit`."""
    asked = {
        "kv_heads": kv_heads,
        "latent": latent,
        "ffn": ffn,
        "attention_weights": attention_weights,
        "ffn_weights": ffn_weights,
    }
    asked = {name: given for name, given in asked.items() if given is not None}
    if not asked:
        raise ValueError(
            "shrink: nothing to do; give kv_heads, latent, ffn, attention_weights or ffn_weights"
        )
    parts = check_model(model, "shrink")
    parent = plan = Plan.of(parts)
    for name, given in asked.items():
        given = dict(given) if isinstance(given, Mapping) else given
        chosen = by_layer(given, len(parts.layers), name)
        for index, value in chosen.items():
            check_value(parts, index, name, value)
            plan = plan.with_field(name, value, [index])
    _check_together(plan, parent)
    shaped = nn.Module()
    training = model.training
    model.eval()
    try:
        if plan.shaped(parent):
            if calibration is None:
                raise ValueError("calibration: got None, valid are tokens (int64) to fit to")
            length = check_calibration(calibration, parts, length)
            builder = Builder(parts, calibration, length=length, bos=bos_of(model, bos))
            shaped = builder.shaped(plan)
        apply(model, shaped, plan, parent)
    finally:
        model.train(training)
    return model


def check_value(parts: anatomy.Anatomy, index: int, name: str, value: object) -> None:
    """ValueError for what a field of a layer cannot be, Unsupported for what its class cannot."""
    layer, where = parts.layers[index], f"{name}: layer {index}"
    if name in WEIGHTS:
        linears = layer.qkv_modules
        if name == "ffn_weights":
            linears = [*layer.feed_forward.inputs, layer.feed_forward.output]
        forms.check(where, value, linears)
        values_of(parts, index, axis_of(name, value), name)
        return
    own = Plan.of(parts).layers[index]
    present = own.kv_heads if name != "ffn" else own.ffn
    most = 2 * present * layer.head_dim - 1 if name == "latent" else present - 1
    valid = f"a whole number from {1 if name == 'latent' else 0} to {most}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole and (name == "latent") <= value <= most  # type: ignore[operator]
    if name == "kv_heads":
        valid = f"0 or a divisor of {present} below it"
        fits = fits and (value == 0 or present % value == 0)  # type: ignore[operator]
    if not fits:
        raise ValueError(f"{where}: got {value!r}, valid is {valid}")
    if not values_of(parts, index, axis_of(name, value), name):
        raise ValueError(f"{where}: got {value!r}, which this layer cannot have")


def _check_together(plan: Plan, parent: Plan) -> None:
    """ValueError for values that a layer, or a checkpoint, cannot have at once."""
    for index, (choice, own) in enumerate(zip(plan.layers, parent.layers, strict=True)):
        if not go_together(choice, own):
            told = ", ".join(f"{name}={value!r}" for name, value in choice.changes(own).items())
            raise ValueError(f"layer {index}: got {told}, which one layer cannot have at once")
    changes = list(plan.changes(parent))
    structured = [f"{n}={v!r}" for _, n, v in changes if is_structured(n, v)]
    packed = [f"{n}={v!r}" for _, n, v in changes if n in WEIGHTS and not is_shaped(n, v)]
    if structured and packed:
        raise ValueError(
            f"got {packed[0]} and {structured[0]}: bitsandbytes packs models of plain linears; "
            "valid is one of them"
        )
