"""What a config.json from outside may say. Everything is checked before anything is built from it.

transformers makes attributes of whatever a config.json holds; here its entries are held to types
and bounds, and the entry "effattn", which says what was swapped, to a list of fields. Specs go
through the grammar of `effattn.swap`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator

import torch

from effattn.axes import options_of
from effattn.errors import check_choice
from effattn.hf import caches
from effattn.hf.names import METHOD
from effattn.hf.weight_files import one_line
from effattn.positions.registry import parse as parse_positions
from effattn.projections import packed
from effattn.projections.base import recorded_kind
from effattn.projections.latent import check_spec
from effattn.registry import BACKENDS
from effattn.specs import parse_spec

# in config.json, and its attn_implementation where plain transformers must not load it
KEY = "effattn"
FIELDS = (
    "pattern",
    "positions",
    "cache",
    "trained",
    "model_type",
    "heads",
    "projections",
    "packed",
)
TRAINED = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
PRIVATE = ("_name_or_path", "_commit_hash", "_attn_implementation")
LAYERS, LABELS = 10_000, 1_000_000  # more than any model has; a configuration makes lists of them
DEPTH = 32
NO_RECORD = (
    f"config.json: quantization_config: quant_method is {KEY!r}, and the entry {KEY!r} that says "
    "what is to be restored is missing"
)
COUNTED = re.compile(r"(^|_)(layers?|experts)$")
SPEC = 10_000  # characters
WEIGHT = 1 << 30  # entries of a weight that a pattern may have
SIZE = 1 << 20  # of an option of a pattern, where the model's own numbers are smaller


def check_config(config: dict) -> None:
    """ValueError, naming the entry of config.json, for what no checkpoint says and what no model
    could be made of.
    """
    from transformers import PreTrainedConfig

    for where, name, value in _walk(
        {key: value for key, value in config.items() if key != KEY}, "config.json"
    ):
        if isinstance(value, float) and not math.isfinite(value) and "time_step_limit" not in where:
            raise ValueError(f"{where}: got {value}, valid is a finite number")
        most = LAYERS if COUNTED.search(name) else LABELS if name == "num_labels" else None
        if most is not None and type(value) in (int, float) and value > most:
            raise ValueError(f"{where}: got {value!r:.40}, valid is up to {most:,}")
        if name.endswith("attn_implementation"):
            _check_attention(where, value, config)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{where}: got {value!r}; code from the hub is never run")
        # transformers sets what a config.json names as attributes: no method or private one of its
        # class
        taken = name.startswith("_") and name not in PRIVATE and hasattr(PreTrainedConfig, name)
        if taken or callable(getattr(PreTrainedConfig, name, None)):
            raise ValueError(f"{where}: {name!r} is no setting of a model")
    if "configuration_files" in config:
        raise ValueError(
            "config.json: configuration_files: valid is one configuration, for every version"
        )
    _check_types(config)
    if KEY in config:
        check_record(config[KEY], config)
    elif config.get("model_type") == KEY:
        raise ValueError(
            f"config.json: model_type is {KEY!r}, and the entry {KEY!r} that belongs to it is "
            "missing"
        )
    elif config.get("quantization_config") == METHOD and "per_layer_config" not in config:
        raise ValueError(NO_RECORD)


def _walk(value, where: str, depth: int = 0) -> Iterator[tuple[str, str, object]]:
    """(path, name, value) of every entry of objects and lists inside each other. ValueError for too
    many of them.
    """
    if depth > DEPTH:
        raise ValueError(f"{where[:80]}...: nested too deeply, valid are {DEPTH} levels")
    entries = (
        value.items()
        if isinstance(value, dict)
        else [(where.rpartition(": ")[2], one) for one in value]
    )
    for name, one in entries:
        inside = f"{where}: {name:.80}" if isinstance(value, dict) else where
        yield inside, name if isinstance(value, dict) else "", one
        if isinstance(one, dict | list):
            yield from _walk(one, inside, depth + 1)


def _check_attention(where: str, value, config: dict) -> None:
    for one in value.values() if isinstance(value, dict) else [value]:
        if one == KEY and KEY not in config:
            raise ValueError(
                f"{where}: got {KEY!r}, and the entry {KEY!r} that says what was swapped is missing"
            )
        if one not in (None, KEY, *ATTENTION):
            raise ValueError(
                f"{where}: got {one!r:.80}, valid are {', '.join(map(repr, ATTENTION))}; code "
                "from the hub is never run"
            )


def _check_types(config: dict) -> None:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if kind != KEY and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"config.json: model_type: got {kind!r:.80}{hint}, which transformers {__version__} "
            "has not"
        )
    classes = config.get("architectures")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(one, str) for one in classes)
    ):
        raise ValueError(
            f"config.json: architectures: got {classes!r:.80}, valid is a list of names of classes"
        )
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is None or isinstance(value, dict):
            continue
        if not isinstance(value, str) or not isinstance(
            getattr(torch, value.removeprefix("torch."), None), torch.dtype
        ):
            raise ValueError(
                f"config.json: {name}: got {value!r:.80}, valid is a dtype such as 'bfloat16'"
            )
    for name in ("quantization_config", "id2label", "label2id"):
        if not isinstance(config.get(name), dict | None):
            raise ValueError(f"config.json: {name}: got {config[name]!r:.80}, valid is an object")


def check_record(record, config: dict) -> None:
    """ValueError, naming the field, unless the entry "effattn" is one that a swap of such a model
    writes.
    """
    where = f"config.json: {KEY}"
    if not isinstance(record, dict) or not record:
        raise ValueError(f"{where}: got {record!r:.80}, valid is an object of {', '.join(FIELDS)}")
    for field in record:
        check_choice(where, field, FIELDS)
    layers = _layers(config)
    for axis in ("pattern", "positions", "cache"):
        if axis in record:
            _check_specs(f"{where}: {axis}", axis, record[axis], layers, _bound(config))
    heads = record.get("heads", {})
    for index, spec in _object(f"{where}: heads", heads).items():
        _check_layer(f"{where}: heads", index, layers)
        check_spec(f"{where}: heads: {index}", spec, _bound(config))
    if "trained" in record:
        _check_trained(f"{where}: trained", record["trained"])
    if ("model_type" in record) != (config.get("model_type") == KEY):
        raise ValueError(
            f"{where}: model_type: it belongs to a config.json whose own is {KEY!r}, and only there"
        )
    if "model_type" in record:
        _check_types({"model_type": None if record["model_type"] == KEY else record["model_type"]})
    for name, entry in _object(f"{where}: projections", record.get("projections", {})).items():
        _check_projection(f"{where}: projections: {name:.80}", entry)
    packed.check_recorded(f"{where}: packed", record.get("packed", {}))


def _object(where: str, value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {value!r:.80}, valid is an object")
    return value


def _layers(config: dict) -> int:
    """How many layers a config.json says, by any of the names that its models have for it."""
    for name in ("num_hidden_layers", "n_layers", "n_layer", "num_layers"):
        if type(config.get(name)) is int:
            return config[name]
    return LAYERS


def _bound(config: dict) -> int:
    """The largest whole number that an option of a pattern may have."""
    own = [config.get(name) for name in ("vocab_size", "max_position_embeddings", "hidden_size")]
    return max(SIZE, *(value for value in own if type(value) is int), 0)


def _check_layer(where: str, index: str, layers: int) -> None:
    if not re.fullmatch(r"\d{1,5}", index) or int(index) >= layers:
        raise ValueError(
            f"{where}: got layer {index!r:.80}, valid are those of the model, '0' to '{layers - 1}'"
        )


def _check_specs(where: str, axis: str, specs, layers: int, bound: int) -> None:
    if not _object(where, specs):
        raise ValueError(f"{where}: got no layers")
    known: set[str] = set()  # most layers have the same
    for index, spec in specs.items():
        _check_layer(where, index, layers)
        if isinstance(spec, str) and spec in known:
            continue
        if not isinstance(spec, str) or len(spec) > SPEC:
            raise ValueError(
                f"{where}: {index}: got {spec!r:.80}, valid is a spec such as 'name(option=1)'"
            )
        try:
            if axis == "positions":
                parse_positions(spec)
            elif axis == "cache":
                caches.parse(spec, 1)
            else:
                _check_pattern(spec, bound)
        except ValueError as error:
            raise ValueError(f"{where}: {index}: {one_line(error)}") from error
        known.add(spec)


def _check_pattern(spec: str, bound: int) -> None:
    """Without building the backend, whose weights may be as large as its options say."""
    name, options = parse_spec(spec)
    valid = options_of(BACKENDS.find(name))
    for option, value in options.items():
        check_choice(f"{name}: option", option, valid)
        for one in value if isinstance(value, list | tuple) else [value]:
            if type(one) in (int, float) and option != "seed" and abs(one) > bound:
                raise ValueError(
                    f"{name}: {option}: got {one!r:.40}, valid here is up to {bound:,}"
                )
    # two sizes together make a weight (linformer's k x max_length), a third is of something else
    sizes = sorted(
        value for option, value in options.items() if type(value) is int and option != "seed"
    )[-2:]
    if math.prod(sizes) > WEIGHT:
        raise ValueError(
            f"{spec}: too large together, a weight of {sizes[0]:,} x {sizes[1]:,} is above "
            f"{WEIGHT:,}"
        )


def _check_trained(where: str, trained) -> None:
    for field, value in _object(where, trained).items():
        check_choice(where, field, TRAINED)
        if field == "rope_parameters":
            for inside, _, one in _walk(_object(f"{where}: {field}", value), f"{where}: {field}"):
                if type(one) not in (int, float, str, bool, type(None), dict, list):
                    raise ValueError(f"{inside}: got {one!r:.80}")
                if isinstance(one, float) and not math.isfinite(one):
                    raise ValueError(f"{inside}: got {one}, valid is a finite number")
        elif type(value) is not int or not 0 < value <= 1 << 40:
            raise ValueError(f"{where}: {field}: got {value!r:.80}, valid is a number of tokens")


def _check_projection(where: str, entry) -> None:
    kind = recorded_kind(entry)
    if not isinstance(entry, dict) or entry.keys() != set(kind.saved()):
        raise ValueError(
            f"{where}: {entry!r:.80} does not fit the model, valid is an object of "
            f"{', '.join(kind.saved())}"
        )
    for name, types in (*kind.SIZES.items(), ("spec", (str,))):
        if type(entry[name]) not in types or (
            type(entry[name]) is int and not 0 < entry[name] <= SIZE
        ):
            raise ValueError(f"{where}: {name}: got {entry[name]!r:.80}")
    for name in ("error", "output_error"):
        value = entry[name]
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(
                f"{where}: {name}: got {value!r:.80}, valid is a finite number or null"
            )
    parse_spec(entry["spec"])
