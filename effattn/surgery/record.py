"""What a checkpoint says about a swap: the entry "effattn" of its config.json, and the weights that
a swap added.

The entry is on a swapped model's config from the moment of the swap, so that whatever writes the
config (a Trainer, `save_pretrained`) writes it, too; beside it `attn_implementation` is "effattn",
so that plain transformers refuses to load that checkpoint as the model that it was before.
`effattn.load` reads both kinds. `effattn.save` leaves that mark out: what it writes as weights is
the model's own alone, and plain transformers may load it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn import registry
from effattn.errors import Unsupported
from effattn.hf import hooks, latents, placement, positions
from effattn.hf.names import METHOD
from effattn.hf.trusted import KEY
from effattn.hf.weight_files import Stored, header, read, shortened, stored
from effattn.projections import packed
from effattn.specs import parse_spec
from effattn.states import caches
from effattn.surgery import replace

LEARNED = "effattn.safetensors"  # the weights that plain transformers does not know
MARK = "attn_implementation"


def is_plain(spec: str) -> bool:
    """Whether plain transformers computes the same as this backend, in any layer."""
    return registry.backends()[parse_spec(spec)[0]].plain


def of(model: nn.Module) -> dict:
    """What about the model plain transformers would not know from its config: {} when nothing."""
    done = getattr(model, hooks.ATTRIBUTE, None)
    rules = positions.active(model)
    specs = {} if done is None else done.specs
    plain = {spec for spec in set(specs.values()) if is_plain(spec)}
    found = {
        "pattern": {index: spec for index, spec in specs.items() if spec not in plain},
        "positions": {} if rules is None or rules.config is not None else rules.specs,
        "cache": {} if done is None else done.caches,
    }
    found = {
        axis: {str(index): specs[index] for index in sorted(specs)}
        for axis, specs in found.items()
        if specs
    }
    others = {
        "heads": latents.record(model),
        "projections": replace.record(model),
        "packed": packed.record(model),
    }
    return found | {name: entry for name, entry in others.items() if entry}


def check_caches(model: nn.Module) -> None:
    """Unsupported for a cache that no spec says, so that nobody could read it back."""
    done = getattr(model, hooks.ATTRIBUTE, None)
    for index, spec in ({} if done is None else done.caches).items():
        if spec.partition("(")[0] not in caches.kinds():
            raise Unsupported(
                f"save: layer {index}: cache {spec} was made of an object, which no file holds; "
                "valid is one with a spec, such as swap(model, cache='full')"
            )


def mark(model: nn.Module) -> None:
    """Puts the record of the model as it is now on its config, or takes it off where nothing is to
    be said.
    """
    if not hasattr(model, "config"):  # nothing that could be saved
        return
    fields = vars(model.config)
    for name in (KEY, MARK):
        fields.pop(name, None)
    if found := of(model):
        fields |= {KEY: found, MARK: KEY}


def write(model: nn.Module, file: Path) -> None:
    """Makes config.json that of a checkpoint whose weights are the model's own.

    Rules that transformers has, but decodes wrongly, are written in its terms as well; projections
    that are no linears make it another `model_type`."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in (KEY, MARK):
        config.pop(name, None)
    found = of(model)
    ours, plain = positions.saved(model)
    found |= ours
    config |= plain
    if found.keys() & {"heads", "projections", "packed"}:
        found["model_type"] = config["model_type"]
        config["model_type"] = KEY
    if found:
        config[KEY] = found
    if found or "per_layer_config" in config:
        # after `import effattn`, transformers asks us to restore it; without, it warns by this name
        config.setdefault("quantization_config", dict(METHOD))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_learned(name: str) -> bool:
    """Whether a swap added the weight of this name."""
    return not hooks.LEARNED_PARTS.isdisjoint(name.split("."))


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state_dict that a swap added, by name."""
    added: dict[str, Tensor] = {}
    # a state_dict of the whole model takes longer than everything else that a swap does to it
    for path, module in model.named_modules(remove_duplicate=False):
        for part in (name for name in module._modules if name in hooks.LEARNED_PARTS):
            prefix = f"{path}.{part}." if path else f"{part}."
            if module._modules[part] is not None:
                added |= module._modules[part].state_dict(prefix=prefix)
    return {name: placement.fetched(model, name, tensor) for name, tensor in added.items()}


def once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without further names of the same tensor, which layers may share."""
    return {names[0]: tensors[names[0]] for names in _shared(tensors)}


def _shared(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        # two views of one memory of the same shape are one tensor (a tied parameter)
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return list(groups.values())


@torch.no_grad()
def load_learned(model: nn.Module, name: str) -> None:
    """Fills what a swap added from the checkpoint's files. ValueError unless names and shapes are
    the same.
    """
    wanted = learned(model)
    groups = _shared(wanted)
    folder = _folder(name)
    files = _learned_files(folder) if wanted or (folder / LEARNED).is_file() else {}
    _fit("missing", [names[0] for names in groups if not files.keys() & set(names)], files)
    _fit("unexpected", files.keys() - wanted.keys(), files)
    for names in groups:
        key = next(one for one in names if one in files)
        saved, tensor = files[key], wanted[key]
        if saved.shape != tuple(tensor.shape):
            raise ValueError(
                f"weights: {saved.file}: {key}: got {saved.shape}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(read(folder / saved.file, [key])[key])


def _fit(what: str, names, files: dict[str, Stored]) -> None:
    if names:
        file = next(iter(files.values())).file if files else LEARNED
        raise ValueError(
            f"weights: {file} does not fit the swap in config.json, {what}: "
            f"{shortened(sorted(names))}"
        )


def _learned_files(folder: Path) -> dict[str, Stored]:
    """Every weight that a swap added: beside the model's own weights, or among them."""
    beside = header(folder / LEARNED) if (folder / LEARNED).is_file() else {}
    inside = {name: one for name, one in stored(folder).items() if is_learned(name)}
    if beside and inside:
        other = next(iter(inside.values())).file
        raise ValueError(
            f"weights: {str(folder)!r} holds what a swap added in {LEARNED} and in {other}: one "
            "of them is of another save; delete it"
        )
    return inside or beside


def _folder(name: str) -> Path:
    """Where the files of a checkpoint lie; of a hub name, those that have been loaded."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    cached_file(name, LEARNED, _raise_exceptions_for_missing_entries=False)
    config = cached_file(name, "config.json")
    assert config is not None  # it was read before
    return Path(config).parent
