"""A really smaller model from indices: `slice_model` cuts heads, FFN dimensions, layers and hidden
dimensions out.

    keep = Keep(heads=[torch.tensor([0, 2])] * 4, ffn=[torch.arange(512)] * 4)
    # a new, plain model of the same class; the old one is untouched
    small = slice_model(model, keep)

What is masked and what is sliced compute the same, with one convention: a norm over dimensions of
which some go (the hidden size; OLMo 2's norms over all heads) takes its mean over those that stay.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import loading
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.hf.weights import not_plain, packing
from effattn.prune.structural.keep import Keep, checked
from effattn.prune.structural.sliced_config import sliced_config
from effattn.prune.structural.sliced_weights import sliced_state
from effattn.surgery.replace import record
from effattn.surgery.swapping import active


def slice_model(model: nn.Module, keep: Keep, *, uniform: bool = True) -> nn.Module:
    """A new model of the same class, with a config that says its smaller shape: `save_pretrained`
    writes a checkpoint that plain transformers loads. Same device, dtype, mode and generation
    settings; `model` is not changed. uniform=False: layers may keep different numbers, or none, and
    differ (`effattn.hf.uneven`): `effattn.save` writes a checkpoint that transformers loads after
    `import effattn`.

    Raises ValueError for indices that are wrong, and Unsupported, naming the class and what it
    could hold, where its config cannot express the shape; or for a model that is swapped or whose
    weights are not plain."""
    check_plain(model)
    parts = hf.of(model)
    keep = checked(parts, keep, uniform)
    config = sliced_config(model.config, keep)
    state = sliced_state(parts, keep)
    outline(parts, keep, config, state)
    new = loading.from_state(type(model), config, state, model.dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def outline(parts: hf.Anatomy, keep: Keep, config, state: dict[str, Tensor]) -> nn.Module:
    """The new model without memory. config, state: what `sliced_config` and `sliced_state` make of
    the old one, whose weights need not be there either. Unsupported where the class does not make
    these shapes of this config, or other kinds of layers than there were."""
    kind = type(parts.model)
    # what the class would make of the config: any other shape is ours to explain
    shell = loading.shell(kind, config)
    wanted = {name: tensor.shape for name, tensor in shell.state_dict().items()}
    for name in sorted(wanted.keys() | state.keys()):
        shape = state[name].shape if name in state else None
        if shape != wanted.get(name):
            made, kept = (
                tuple(one) if one is not None else "not at all" for one in (wanted.get(name), shape)
            )
            raise Unsupported(
                f"{kind.__name__} cannot hold this shape: its config makes {name} {made}, "
                f"what is kept is {kept}"
            )
    _check_kinds(parts, hf.of(shell), keep)
    return shell


def _check_kinds(old: hf.Anatomy, new: hf.Anatomy, keep: Keep) -> None:
    """Unsupported where a layer became one of another kind because its number is another."""
    staying = range(len(old.layers)) if keep.layers is None else keep.layers.tolist()
    for index, after in zip(staying, new, strict=True):
        before = old.layers[index]
        if not after.heads:  # without attention it is of no kind
            continue
        for what in ("window", "rotary_dims", "causal"):
            if getattr(before, what) != getattr(after, what):
                raise Unsupported(
                    f"layers: layer {index} of {type(old.model).__name__} has {what} "
                    f"{getattr(before, what)}, as layer {after.index} it gets "
                    f"{getattr(after, what)}: its config says it by its number"
                )


def check_plain(model: nn.Module) -> None:
    """Unsupported for models that are swapped, have structured projections, quantized weights or
    weights elsewhere, and for what `require_own_weights` refuses."""
    require_own_weights(model)
    name = type(model).__name__
    require_here(model, "pruning")
    if active(model) is not None:
        raise Unsupported(
            f"{name} is swapped: effattn.restore(model) first, then cut, then swap what comes out"
        )
    if record(model):
        raise Unsupported(
            f"{name} has structured projections, which have no rows to cut; cut first, then swap "
            "them in"
        )
    if getattr(model, "is_quantized", False) or any(packing(module) for module in model.modules()):
        raise Unsupported(
            f"{name} has quantized weights; cut the model's own weights, then quantize"
        )
    if (odd := not_plain(model)) is not None:
        raise Unsupported(
            f"{name}: {odd} is no plain linear layer, which has no rows to cut; cut the model's "
            "own weights"
        )
