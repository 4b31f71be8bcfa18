"""What each layer becomes: a plan, in fields that are chosen apart from each other.

    choice = LayerChoice(kv_heads=4, ffn=512, cache="int8", ffn_weights="nf4")

A layer has two blocks, attention and FFN, which cost apart from each other: what one becomes
changes no bytes of the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from effattn.hf import anatomy
from effattn.projections.base import PROJECTIONS
from effattn.projections.packed import FORMATS as PACKED

FULL = "full"
SINKS = 4  # first tokens that a window keeps

# field -> the axis that `allow` and `forbid` name; what decides it further is `axis_of`
FIELDS = {
    "kv_heads": "heads",
    "latent": "latent",
    "cache": "cache",
    "window": "window",
    "attention_weights": "weights",
    "ffn": "ffn",
    "ffn_weights": "weights",
}
SKIP = "skip"  # the axis of what is left out: no K/V heads, no inner dimensions
PROJECTED, SPARSE = "projections", "sparsity"  # axes of other forms of weights
AXES = tuple(dict.fromkeys([*FIELDS.values(), SKIP, PROJECTED, SPARSE]))
BLOCKS = {
    "attention": ("kv_heads", "latent", "cache", "window", "attention_weights"),
    "ffn": ("ffn", "ffn_weights"),
}
WEIGHTS = ("attention_weights", "ffn_weights")


def axis_of(field: str, value: object) -> str:
    """The axis that a field's value belongs to."""
    if field in WEIGHTS:
        name = str(value).partition("(")[0]
        if name in PROJECTIONS.members():
            return PROJECTED
        return SPARSE if name in PACKED.members() else FIELDS[field]
    return SKIP if value == 0 else FIELDS[field]


# axes whose values are fitted to calibration text
SHAPED = ("heads", "latent", SKIP, "ffn", PROJECTED, SPARSE)


def is_shaped(field: str, value: object) -> bool:
    """Whether a field's value needs calibration, and makes other modules of it."""
    return axis_of(field, value) in SHAPED


def is_structured(field: str, value: object) -> bool:
    """Whether a value's weights are no plain linears, which bitsandbytes does not pack."""
    return axis_of(field, value) in ("latent", PROJECTED, SPARSE)


@dataclass(frozen=True)
class LayerChoice:
    """One layer. kv_heads: key/value heads, 0: no attention; cache: a spec of `swap(cache=...)`;
    window: tokens that a query sees beside the first ones, None as the model has it; ffn: inner
    dimensions, 0: no FFN; attention_weights, ffn_weights: a form of `effattn.fitting.forms`, or
    None for what they are; latent: so many numbers are remembered of a token, None: its keys and
    values."""

    kv_heads: int
    ffn: int
    cache: str = FULL
    window: int | None = None
    attention_weights: str | None = None
    ffn_weights: str | None = None
    latent: int | None = None

    @classmethod
    def of(cls, layer: anatomy.Layer) -> LayerChoice:
        """A layer as it is."""
        return cls(layer.kv_heads, layer.feed_forward.size)

    def changes(self, parent: LayerChoice) -> dict[str, object]:
        """The fields that differ from the parent's."""
        own, other = vars(self), vars(parent)
        return {name: value for name, value in own.items() if value != other[name]}

    def words(self, parent: LayerChoice) -> str:
        """What is different, in words."""
        told = {
            "kv_heads": "gqa(kv_heads={})",
            "latent": "latent(rank={})",
            "cache": "cache {}",
            "window": f"sliding(window={{}}, sinks={SINKS})",
            "attention_weights": "attention in {}",
            "ffn": "ffn {}",
            "ffn_weights": "ffn in {}",
        }
        left_out = {"kv_heads": "no attention", "ffn": "no FFN"}
        return ", ".join(
            left_out[name] if value == 0 else told[name].format(value)
            for name, value in self.changes(parent).items()
        )


@dataclass(frozen=True)
class Plan:
    """A choice for every layer, in order."""

    layers: tuple[LayerChoice, ...]

    @classmethod
    def of(cls, parts: anatomy.Anatomy) -> Plan:
        """A model as it is."""
        return cls(tuple(LayerChoice.of(layer) for layer in parts))

    @classmethod
    def from_dicts(cls, rows: Sequence[dict]) -> Plan:
        """What `to_dicts` gave."""
        return cls(tuple(LayerChoice(**row) for row in rows))

    def to_dicts(self) -> list[dict]:
        """For JSON."""
        return [asdict(layer) for layer in self.layers]

    def with_field(self, name: str, value, layers: Sequence[int] | None = None) -> Plan:
        """The same with one field of some layers (None: all) set."""
        some = range(len(self.layers)) if layers is None else layers
        new = [replace(one, **{name: value}) if i in some else one for i, one in self._each()]
        return Plan(tuple(new))

    def also(self, other: Plan, parent: Plan) -> Plan | None:
        """Both plans at once; None where they say different things of one field."""
        mine = {change[:2] for change in self.changes(parent)}
        layers = list(self.layers)
        for index, name, value in other.changes(parent):
            if (index, name) in mine:
                return None
            layers[index] = replace(layers[index], **{name: value})
        return Plan(tuple(layers))

    def changes(self, parent: Plan) -> Iterator[tuple[int, str, object]]:
        """(layer, field, value) of everything that differs from the parent's."""
        for index, own in self._each():
            for name, value in own.changes(parent.layers[index]).items():
                yield index, name, value

    def shaped(self, parent: Plan) -> list[int]:
        """The layers in which something was fitted to calibration text."""
        found = (i for i, name, value in self.changes(parent) if is_shaped(name, value))
        return list(dict.fromkeys(found))

    def key(self) -> str:
        """A text that is equal for equal plans."""
        return "; ".join(
            ",".join(f"{value}" for value in asdict(layer).values()) for layer in self.layers
        )

    def specs(self, name: str, parent: Plan) -> dict[str, object]:
        """Runs of layers -> a changed field's value, as `swap` takes layers: {"0-3": 4}."""
        found: dict[str, object] = {}
        start = 0
        # a layer that stays is in no run, also where its neighbours become what it is
        pairs = zip(self.layers, parent.layers, strict=True)
        values = [(getattr(a, name), getattr(a, name) != getattr(b, name)) for a, b in pairs]
        for index in range(1, len(values) + 1):
            if index == len(values) or values[index] != values[start]:
                value, changed = values[start]
                if changed:
                    layers = f"{start}" if index - 1 == start else f"{start}-{index - 1}"
                    found[layers] = value
                start = index
        return found

    def lines(self, parent: Plan, how: str) -> list[str]:
        """The plan as calls that make it of the parent, in order. how: the arguments that say what
        weights are fitted to."""
        fields = {name: self.specs(name, parent) for name in FIELDS}
        windows = {
            layers: f"sliding(window={window}, sinks={SINKS})"
            for layers, window in fields.pop("window").items()
        }
        caches = fields.pop("cache")
        told = []
        given = [f"{name}={value}" for name, value in fields.items() if value]
        if given:
            fitted = [how] if self.shaped(parent) else []
            told.append(f"effattn.shrink({', '.join(['model', *given, *fitted])})")
        swapped = [f"{windows}"] if windows else []
        swapped += [f"cache={caches}"] if caches else []
        if swapped:
            told.append(f"effattn.swap({', '.join(['model', *swapped])})")
        return told

    def _each(self) -> Iterator[tuple[int, LayerChoice]]:
        return iter(enumerate(self.layers))


def field_names() -> list[str]:
    """The fields of a choice."""
    return [field.name for field in fields(LayerChoice)]
