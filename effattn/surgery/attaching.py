"""What a swap hangs on a live model, and takes off again.

Modules and parameters stay as they are: a swap is the model's attention implementation, a plain
attribute and a forward pre-hook on each swapped attention module (`effattn.hf.hooks`), and
submodules for what a method learns. `effattn.hf.live` runs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin, PreTrainedModel

from effattn.errors import Unsupported
from effattn.hf import anatomy, hooks, live
from effattn.hf.position_ids import Following
from effattn.surgery.plan import LayerPlan

# transformers' way into continuous batching, which is closed while swapped
BATCHING = "init_continuous_batching"
# ... and what `generate` calls between two steps
UPDATE = "_update_model_kwargs_for_generation"


@dataclass
class Swap:
    """What `swap` did to a model: the implementation it had, and as asked for the spec of every
    swapped layer, and of every cache that is not its pattern's own."""

    original: str
    specs: dict[int, str]
    caches: dict[int, str] = field(default_factory=dict)
    # The layers that look at position_ids for all: parts of the model, which no two swaps have in
    # common.
    checkers: list[live.LayerSwap] = field(default_factory=list, compare=False)
    # whether tokens without position_ids are numbered as they come, padding too
    rotary: bool = field(default=False, compare=False)


def attach(model: PreTrainedModel, parts: anatomy.Anatomy, plans: dict[int, LayerPlan]) -> None:
    """Carries out the plans: the implementation, and on each attention module what it needs."""
    # The only part that can fail comes first: copies of projections, which need memory.
    new = {
        index: hooks.GlobalProjections(parts.layers[index].attention, parts.layers[index].qkv_paths)
        for index, plan in plans.items()
        if plan.own_global
    }
    done = active(model) or Swap(_own_implementation(model), {})
    live.register()
    model.set_attn_implementation(live.NAME)
    done.specs.update({index: plan.spec for index, plan in plans.items()})
    done.caches = {index: spec for index, spec in done.caches.items() if index not in plans}
    done.caches |= {
        index: plan.cache.spec for index, plan in plans.items() if plan.cache is not None
    }
    for layer in parts.layers:
        module, plan = layer.attention, plans.get(layer.index)
        if plan is not None:
            # a kept pattern keeps its hook and what it has learned; only the rest is said anew
            module._modules.pop(hooks.POSITIONS, None)
            if not plan.kept:
                _detach(module)
                _hook(module, hooks.before_attention)
            setattr(
                module,
                hooks.ATTRIBUTE,
                live.LayerSwap(
                    layer.index,
                    done.original,
                    backend=plan.backend,
                    pattern=plan.pattern,
                    raw_keys=plan.raw_keys,
                    rotary=plan.rotary,
                    own_window=plan.own_window,
                    positions=plan.positions,
                    cache=plan.cache,
                    latent=plan.latent,
                ),
            )
            if plan.positions is not None and plan.positions.rule.learned is not None:
                module.add_module(hooks.POSITIONS, plan.positions.rule)
            if any(True for _ in plan.backend.parameters()) or any(
                True for _ in plan.backend.buffers()
            ):
                module.add_module(hooks.PATTERN, plan.backend)
            if layer.index in new:
                module.add_module(hooks.GLOBAL, new[layer.index])
        # layers that keep what they have go through our function too, which passes them on
        elif not hasattr(module, hooks.ATTRIBUTE):
            setattr(module, hooks.ATTRIBUTE, live.LayerSwap(layer.index, done.original))
    done.rotary = bool(parts.layers[0].family.rotary)
    done.checkers = _choose_checkers(
        [getattr(layer.attention, hooks.ATTRIBUTE) for layer in parts.layers]
    )
    if active(model) is None:
        setattr(model, hooks.ATTRIBUTE, done)
        _hook(model, hooks.before_model)
        if model.base_model is not model:
            _hook(model.base_model, hooks.before_body)
        model.__dict__[BATCHING] = hooks.refuse_continuous_batching
        # what a class does instead, nobody knows
        if getattr(type(model), UPDATE, None) is getattr(GenerationMixin, UPDATE):
            model.__dict__[UPDATE] = Following(model)


def detach(model: nn.Module) -> None:
    """Undoes what was done to the attention modules; what is written in the config stays."""
    done = active(model)
    if done is not None:
        parts = anatomy.of(model)
        for layer in parts.layers:
            _detach(layer.attention)
        _unhook(model)
        _unhook(parts.model.base_model)
        for name in (BATCHING, UPDATE):
            model.__dict__.pop(name, None)
        delattr(model, hooks.ATTRIBUTE)
        parts.model.set_attn_implementation(done.original)


def active(model: nn.Module) -> Swap | None:
    """What `swap` did to the model's patterns; None when nothing is swapped."""
    return getattr(model, hooks.ATTRIBUTE, None)


def require_own_attention(model: nn.Module, name: str) -> None:
    """Unsupported for a checkpoint, called `name`, that comes with a swapped attention."""
    if active(model) is not None:
        raise Unsupported(
            f"model: {name} is swapped already; valid is a checkpoint with its own attention"
        )


def _own_implementation(model: PreTrainedModel) -> str:
    """What the model computes attention with; transformers' choice for one built from a swapped
    model's config.
    """
    own = model.config._attn_implementation
    return model.get_correct_attn_implementation(None) if own == live.NAME else own


def _choose_checkers(layers: list[live.LayerSwap]) -> list[live.LayerSwap]:
    """The first swapped layer, and the first that owns its positions, look at position_ids on
    behalf of all.
    """
    swapped = [layer for layer in layers if layer.backend is not None]
    first = swapped[:1] + [layer for layer in swapped if layer.own_positions][:1]
    for layer in layers:
        layer.checks_positions = any(layer is one for one in first)
    return [layer for layer in layers if layer.checks_positions]


def _hook(module: nn.Module, function) -> None:
    handle = module.register_forward_pre_hook(function, with_kwargs=True)
    module.__dict__[hooks.HANDLE] = handle


def _unhook(module: nn.Module) -> None:
    handle: RemovableHandle | None = module.__dict__.pop(hooks.HANDLE, None)
    if handle is not None:
        handle.remove()


def _detach(module: nn.Module) -> None:
    """Takes a swap off an attention module, if there is one."""
    _unhook(module)
    module.__dict__.pop(hooks.ATTRIBUTE, None)
    for name in (hooks.PATTERN, hooks.GLOBAL, hooks.POSITIONS):
        module._modules.pop(name, None)
