"""The positions of a live model, layer by layer: planning, applying and undoing what
`swap(positions=...)` asks for.

A rule that transformers has itself, the same in all layers that turn, is written into the config
and into the rotary module, and nothing else changes: the model stays a plain one. Any other rule
belongs to its layers' swapped attention (`effattn.hf.live`): a hook gives each layer the angles of
its rule, or none where keys must stay raw, and the backend does the rest. A new request replaces
the rules of the layers that it names; "rope" takes them back.

A rule for longer sequences that names no layers goes to those with full attention, where some have
a window of their own (Gemma 2 and 3): no distance in a window is longer than what was trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy, placement
from effattn.hf.names import ATTRIBUTE as SWAP
from effattn.positions.base import Part, Trained
from effattn.positions.bound import Positions
from effattn.positions.registry import parse
from effattn.positions.rope import OwnRope
from effattn.specs import parse_layers

ATTRIBUTE = "_effattn_positions"  # on a model: its `PositionSwap`
# rotary frequencies that change with the sequence's length
LENGTH_DEPENDENT = ("dynamic", "longrope")
ORIGINAL = "original_max_position_embeddings"  # in rope_parameters: the length before the rule


@dataclass
class LayerPositions:
    """The rule of one layer. `raw`: the backend gets q and k as they are, and the rule with
    them.
    """

    rule: Positions
    own: anatomy.Rotary | None
    raw: bool = False
    # of the layers with this rule: what the first one made
    last: list = field(default_factory=list, repr=False)

    def __post_init__(self):
        # of its own, so that a plan changes nothing; what is learned is shared
        self.rule = copy.copy(self.rule)
        self.rule.rotates = self.raw

    def fitted(self, raw: bool) -> LayerPositions:
        """The same rule for a backend that needs raw keys, or not."""
        return LayerPositions(self.rule, self.own, raw or self.rule.raw_keys, self.last)

    @property
    def in_call(self) -> Positions | None:
        """What the backend's call gets; None when the angles are all there is to the rule."""
        return self.rule if self.raw or not self.rule.only_turns else None

    def embeddings(
        self, given: tuple[Tensor, Tensor], position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for the layer, instead of the `given` ones."""
        cos, _ = given
        if self.raw or not self.rule.turns:
            return torch.ones_like(cos), torch.zeros_like(cos)
        if type(self.rule.rotation) is OwnRope:
            return given
        if position_ids is None:
            raise Unsupported(
                f"positions: {self.rule.spec!r} needs position_ids, which the model does not pass "
                "on"
            )
        if torch.compiler.is_compiling() or position_ids.is_inference():
            return self.own.embeddings(cos, position_ids, self.rule.rope())
        # All layers with this rule ask for the same angles in a call: the first one makes them.
        # Known again by the tensor itself, and by torch's count of writes to it.
        key = (cos.dtype, position_ids._version)
        if not self.last or self.last[0] is not position_ids or self.last[1] != key:
            self.last[:] = [
                position_ids,
                key,
                self.own.embeddings(cos, position_ids, self.rule.rope()),
            ]
        return self.last[2]


@dataclass
class PositionPlan:
    """What is going to be done. `specs`: the rule of every layer that has one; `layers`: those of
    swapped attention, None where a layer's rule is taken back; `config` and `rotary`: what plain
    transformers' own rule comes to."""

    specs: dict[int, str]
    layers: dict[int, LayerPositions | None] = field(default_factory=dict)
    config: dict | None = None
    rotary: nn.Module | None = None


@dataclass
class PositionSwap:
    """What was done. `config`, `attributes`, `buffers`: what the config and the rotary module had
    before.
    """

    specs: dict[int, str]
    config: dict | None = None
    attributes: dict | None = None
    buffers: dict[str, Tensor] | None = None


def active(model: nn.Module) -> PositionSwap | None:
    """What `swap` did to the model's positions; None when they are its own."""
    return getattr(model, ATTRIBUTE, None)


def make(parts: anatomy.Anatomy, positions: str | dict[str | int, str]) -> PositionPlan:
    """Checks a request, and what it comes to in this model. ValueError for what means nothing,
    Unsupported for what the model cannot have; nothing is changed."""
    # 1. What is asked for, layer by layer. A rule for all means: for those that can have it.
    named = isinstance(positions, dict)
    asked = parse_layers(positions, len(parts.layers), "positions") if named else {}
    if not named:
        # without any, the first layer says why not
        asked = dict.fromkeys(reached(parts, parse(positions)) or [0], positions)
    asked = {index: spec for index, spec in asked.items() if parts.layers[index].attends}
    # 2. Beside it stays what other layers have; a rule that has learned something is kept as it is
    done = active(parts.model)
    specs = ({} if done is None else done.specs) | asked
    rules, bound = {spec: parse(spec) for spec in dict.fromkeys(specs.values())}, {}
    for index, spec in specs.items():
        if [part.name for part in rules[spec]] != ["rope"]:
            held = None if index in asked else held_by(parts.layers[index])
            bound[index] = _bind(parts, index, rules[spec], done) if held is None else held.rule
    # 3. Plain, if transformers has the rule and all layers that turn have the same; else layer by
    #    layer
    plan = PositionPlan({index: specs[index] for index in bound}, dict.fromkeys(specs))
    if bound and (plain := _plain(parts, bound, done)) is not None:
        plan.config, plan.rotary = plain
        return plan
    shared: dict[tuple, list] = {}
    for index, rule in bound.items():
        own = parts.layers[index].rotary
        last = shared.setdefault((specs[index], None if own is None else own.layer_type), [])
        plan.layers[index] = LayerPositions(rule, own, last=last)
    return plan


def reached(parts: anatomy.Anatomy, rule: tuple[Part, ...]) -> list[int]:
    """The layers that a rule goes to when none are named: those that it makes sense in."""
    turns = any(part.slot == "far" or getattr(part, "turns", False) for part in rule)
    attending = [layer for layer in parts.layers if layer.attends]
    can = [layer for layer in attending if layer.rotary_dims or not turns]
    full = [layer for layer in can if layer.own_window is None]
    if full and any(part.stretches for part in rule):
        can = full
    return [layer.index for layer in can]


def held_by(layer: anatomy.Layer) -> LayerPositions | None:
    """The rule that a layer's swapped attention has now, with what it has learned."""
    return getattr(getattr(layer.attention, SWAP, None), "positions", None)


def apply(model: nn.Module, parts: anatomy.Anatomy, plan: PositionPlan) -> None:
    """Writes the plan into the config and the rotary module, or takes back what was written; the
    layers' own part is `effattn.surgery.swapping`'s."""
    undo(model)
    if not plan.specs:
        return
    record = PositionSwap(plan.specs)
    if plan.rotary is not None:
        module = parts.layers[0].rotary_module
        record.config = {name: copy.deepcopy(getattr(parts.config, name)) for name in plan.config}
        record.attributes, record.buffers = _attributes(module), dict(module._buffers)
        _write(parts.config, module, plan.config, _attributes(plan.rotary), plan.rotary._buffers)
    setattr(model, ATTRIBUTE, record)


def undo(model: nn.Module) -> None:
    """The config and the rotary module are what they were."""
    record = active(model)
    if record is None:
        return
    if record.config is not None:
        parts = anatomy.of(model)
        _write(
            parts.config,
            parts.layers[0].rotary_module,
            record.config,
            record.attributes,
            record.buffers,
        )
    delattr(model, ATTRIBUTE)


def put_back(model: nn.Module, parts: anatomy.Anatomy, record: PositionSwap | None) -> None:
    """The config and the rotary module as they were with an earlier `record`, when what came after
    `apply` failed.
    """
    undo(model)
    if record is not None:
        apply(model, parts, make(parts, record.specs))


def saved(model: nn.Module) -> tuple[dict, dict]:
    """(what goes under "effattn" in config.json, what changes beside it). Rules that are written
    into the config need neither. A rule that transformers has, but would decode wrongly (its cached
    keys go stale), is written in its own terms as well, and the terms of the model before it are
    kept."""
    record = active(model)
    if record is None or record.config is not None:
        return {}, {}
    ours: dict = {"positions": {str(index): spec for index, spec in sorted(record.specs.items())}}
    parts = anatomy.of(model)
    held = {i: held_by(parts.layers[i]).rule for i in record.specs}
    plain = _plain(parts, held, record, varying=True)
    if plain is None:
        return ours, {}
    config, _ = plain
    return ours | {"trained": {name: getattr(parts.config, name) for name in config}}, config


def _trained(parts: anatomy.Anatomy, layer: anatomy.Layer, done: PositionSwap | None) -> Trained:
    """What a layer was trained with, whatever has been written into the config since."""
    before = {} if done is None or done.config is None else done.config
    length = before.get("max_position_embeddings", parts.trained_length or 0)
    rotary = layer.rotary
    if rotary is None:
        return Trained(length, layer.heads, layer.head_dim, 0)
    rope = before.get("rope_parameters", getattr(parts.config, "rope_parameters", None) or {})
    others = [one for one in rope.values() if isinstance(one, dict)]
    rope = rope.get(rotary.layer_type, rope)
    kind, inv_freq, scaling = rope.get("rope_type", "default"), None, 1.0
    # What the config says is how far the model goes with another type's rule; this type has none.
    originals = [one[ORIGINAL] for one in others if ORIGINAL in one]
    if kind == "default" and originals:
        length = min(originals)
    if not before:
        own = rotary.rope()
        inv_freq, scaling = None if own.inv_freq.is_meta else own.inv_freq, own.attention_scaling
    return Trained(
        length,
        layer.heads,
        layer.head_dim,
        layer.rotary_dims,
        float(rope.get("rope_theta") or 10000.0),
        rotary.interleaved,
        kind,
        inv_freq,
        scaling,
    )


def _bind(
    parts: anatomy.Anatomy, index: int, rule: tuple[Part, ...], done: PositionSwap | None
) -> Positions:
    """The rule for one layer. Errors name it."""
    trained = _trained(parts, parts.layers[index], done)
    try:
        bound = Positions(rule, trained)
    except ValueError as error:
        raise type(error)(f"layer {index}: {error}") from error
    if bound.raw_keys and isinstance(bound.rotation, OwnRope) and trained.kind in LENGTH_DEPENDENT:
        raise Unsupported(
            f"layer {index}: positions: {bound.spec!r} turns keys when they are read, and the "
            f"model's rotary rule {trained.kind!r} depends on the sequence's length; valid beside "
            "it is a rotation of its own, such as ntk(factor=...)+rerope(window=...)"
        )
    return bound


def _plain(
    parts: anatomy.Anatomy,
    bound: dict[int, Positions],
    done: PositionSwap | None,
    varying: bool = False,
) -> tuple[dict, nn.Module] | None:
    """(config fields, rotary module) with which plain transformers turns every layer as these rules
    do, and those without one as before `done`; None where it has no such rule, or turns otherwise.
    varying: rules that vary with the length, too."""
    turning = [layer for layer in parts.layers if layer.rotary_dims]
    if not turning:
        return None
    kinds: dict[str, dict] = {}
    for index, rule in bound.items():
        new = (
            rule.rotation.parameters(rule.trained)
            if len(rule.parts) == 1 and rule.rotation is not None
            else None
        )
        if new is None or rule.rotation.varies is not varying or rule.rotation.turns is False:
            return None
        if kinds.setdefault(parts.layers[index].rotary.layer_type, new) != new:
            return None
    # A layer that keeps the model's own needs parameters of its own: those of its type.
    if any(layer.rotary.layer_type in kinds for layer in turning if layer.index not in bound):
        return None
    # The rule in transformers' own words, in a copy of the config, and the rotary module that its
    # class makes of it: only if that turns as our rule does, is the model plain.
    config = copy.deepcopy(parts.config)
    for name, value in ((done and done.config) or {}).items():
        setattr(config, name, copy.deepcopy(value))
    old = config.rope_parameters
    for kind, new in kinds.items():
        kept = old.get(kind, old).get("partial_rotary_factor")
        kinds[kind] = new if kept is None else {**new, "partial_rotary_factor": kept}
    changed = {
        "rope_parameters": {**old, **kinds} if set(kinds) & set(old) else next(iter(kinds.values()))
    }
    if "dynamic" not in {new["rope_type"] for new in kinds.values()}:
        length = max(rule.rotation.reach(rule.trained) for rule in bound.values())
        changed["max_position_embeddings"] = length
    # Phi-3: it goes before what rope_parameters say
    if hasattr(config, ORIGINAL):
        changed[ORIGINAL] = next(iter(bound.values())).trained.length
    for name, value in changed.items():
        setattr(config, name, copy.deepcopy(value))
    if not _reads_back(config):
        return None
    rotary = type(parts.layers[0].rotary_module)(config)
    for index, rule in bound.items():
        its, ours = parts.layers[index].rotary_in(rotary).rope(), rule.rope()
        same = (
            its.inv_freq.shape == ours.inv_freq.shape
            and its.attention_scaling == ours.attention_scaling
        )
        if not same or not torch.allclose(its.inv_freq, ours.inv_freq, rtol=1e-5, atol=0):
            return None
    return changed, rotary


def _reads_back(config) -> bool:
    """Whether the config's class takes the rules that it holds for what they are: Phi-3's knows
    LongRoPE alone, refuses others as it saves, and reads YaRN as LongRoPE."""
    try:
        again = type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError, KeyError):
        return False
    return _kinds(again.rope_parameters) == _kinds(config.rope_parameters)


def _kinds(rope: dict) -> list:
    """The rule that rope_parameters name, for all layers or by their type."""
    return [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)]


def _attributes(module: nn.Module) -> dict:
    """What a rotary module says beside its buffers, and what stands around its forward."""
    left = {"training", *placement.AROUND}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in left
    }


def _write(
    config, module: nn.Module, fields: dict, attributes: dict, buffers: dict[str, Tensor]
) -> None:
    device = next(iter(module._buffers.values())).device
    for name, value in fields.items():
        setattr(config, name, copy.deepcopy(value))
    module.__dict__.update(attributes | {"config": config})
    module._buffers.update({name: buffer.to(device) for name, buffer in buffers.items()})
