"""Other forms of a linear layer's weights: what each takes to the byte, and how it is made.

    form = "lowrank(ratio=0.5)"              # or "monarch(...)", "2:4", "bitmask(sparsity=0.5)"
    empty(form, linear, 512, 256)            # of these sizes, whose weights mean nothing
    fitted(form, linear, moment)             # closest to `linear` on inputs of that second moment

bitsandbytes' formats are none of these: a whole model is packed by them at its end."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from effattn.axes import options_of
from effattn.errors import check_choice
from effattn.hf.weights import weight_bytes
from effattn.projections.base import PROJECTIONS, StructuredLinear
from effattn.projections.packed import FORMATS
from effattn.prune.unstructured.methods.sparsegpt import sparsegpt
from effattn.prune.unstructured.nm import Sparsity
from effattn.quant.weights import KINDS
from effattn.specs import parse_spec


def _read(form: str) -> tuple[str, dict]:
    """The name of a form, and its options."""
    return (form, {}) if form in FORMATS.members() else parse_spec(form)


def check(where: str, form: object, linears: Collection[nn.Linear]) -> None:
    """ValueError, beginning with `where`, for a form that these linears cannot have."""
    if not isinstance(form, str):
        raise ValueError(f"{where}: got {form!r}, valid is a form such as 'nf4'")
    name = form if form in FORMATS.members() else parse_spec(form)[0]
    check_choice(where, name, (*KINDS, *PROJECTIONS.members(), *FORMATS.members()))
    if name in KINDS:
        if form != name:
            raise ValueError(f"{where}: got {form!r}, {name} takes no options")
        return
    _check_options(where, form, name)
    for linear in linears:
        try:
            if name in PROJECTIONS.members():
                PROJECTIONS.find(name).options(**_read(form)[1])
            made = empty(form, linear, linear.out_features, linear.in_features, "meta")
            if name in FORMATS.members() and weight_bytes(made) >= weight_bytes(linear):
                raise ValueError(
                    f"got {form!r}, which takes {weight_bytes(made):,} bytes for weights of "
                    f"{weight_bytes(linear):,}; valid is a higher sparsity"
                )
        except TypeError as error:
            raise ValueError(f"{where}: got {form!r}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _check_options(where: str, form: str, name: str) -> None:
    """ValueError for options that this form does not have, or lacks."""
    given = _read(form)[1]
    if name in PROJECTIONS.members():  # which linears, and how, is decided here
        if others := [option for option in given if option in ("ffn", "method")]:
            raise ValueError(f"{where}: got {form!r}, {name} takes no {others[0]} here")
        return
    valid = ["sparsity"] if FORMATS.find(name).SIZES else []
    if list(given) != valid:
        example = f"{name}(sparsity=0.5)" if valid else name
        raise ValueError(f"{where}: got {form!r}, valid is for example {example!r}")


def empty(
    form: str, like: nn.Linear, outputs: int, inputs: int, device: torch.device | str
) -> StructuredLinear:
    """What a linear of these sizes becomes, in the dtype of `like`; its weights mean nothing.
    ValueError for sizes that the form cannot have."""
    name, options = _read(form)
    sizes = {"bias": like.bias is not None, "device": device, "dtype": like.weight.dtype}
    if name in FORMATS.members():
        kind = FORMATS.find(name)
        if kind.SIZES:
            count = outputs * inputs
            gone = Sparsity.parse(options["sparsity"]).count(count)
            sizes |= dict.fromkeys(kind.SIZES, count - gone)
        return kind(inputs, outputs, **sizes)
    kind = PROJECTIONS.find(name)
    kind.check_sizes(inputs, outputs, where=form, **options)
    if "ratio" in options and "ratio" not in options_of(
        kind
    ):  # a budget of its own, as `from_linear` has it
        options = {"rank": int(options["ratio"] * outputs * inputs) // (outputs + inputs)}
    return kind(inputs, outputs, **options, **sizes)


@torch.no_grad()
def fitted(form: str, linear: nn.Linear, moment: Tensor) -> StructuredLinear:
    """What takes the place of a linear, closest to it in its outputs. moment (inputs, inputs),
    fp64: E[x x^T] of its inputs. Low rank arXiv:2403.07378, sparse arXiv:2301.00774."""
    name, options = _read(form)
    moment = moment.to(linear.weight.device)
    if name in PROJECTIONS.members():
        kind = PROJECTIONS.find(name)
        return kind.from_linear(linear, **options, moment=moment).train(linear.training)
    sparsity = options.get("sparsity", name)
    pruned = sparsegpt(linear.weight, 2 * moment.float(), sparsity, raise_damping=True, name=form)
    # what is kept and happens to be 0 takes its place all the same, as its bytes were predicted
    tiny = torch.finfo(linear.weight.dtype).tiny
    weight = torch.where(~pruned.mask & (pruned.weight == 0), tiny, pruned.weight)
    sparse = nn.Linear(linear.in_features, linear.out_features, False, device="meta")
    sparse.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    sparse.bias = linear.bias
    return FORMATS.find(name).from_linear(sparse).train(linear.training)


def put(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is in `root`."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
