"""Checkpoints: whatever plain transformers can express is saved as plain transformers.

    effattn.save(model, "out")            # all or nothing: a folder appears at the end, complete
    model = effattn.load("out")           # re-applies what plain transformers cannot express
    model, tokenizer = load_model("embedded")

A swap that plain transformers cannot express is kept in config.json under "effattn", and what its methods learn in
effattn.safetensors; model.safetensors has the model's own weights only. Where these are not what the plain class
expects (structured projections), config.json's `model_type` is "effattn", which plain transformers refuses, and the
model's own is under "effattn". No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effattn.errors import check_choice
from effattn.hf import caches, hooks, packing, placement, positions
from effattn.hf import swap as swapping
from effattn.hf.families import ENCODERS
from effattn.projections import packed, replace

KEY = "effattn"  # in config.json
LEARNED = "effattn.safetensors"  # the weights that plain transformers does not know
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def save(model: nn.Module, path: str | Path, tokenizer=None) -> Path:
    """Writes the model (and its tokenizer) to the new folder `path`, which it returns.

    Raises ValueError for a folder that is not empty and for weights with NaN or Inf. If anything fails, nothing is
    left behind.
    """
    packing.steady(model)
    placement.require_own(model, "save")
    check_finite(model)
    with atomic_folder(path) as folder, placement.saving(model):
        learned = _learned(model)
        plain = {name: tensor for name, tensor in model.state_dict().items() if name not in learned}
        with packing.leaving_out(model, learned):
            model.save_pretrained(folder, state_dict=plain if learned else None)
        if learned:
            save_file({name: tensor.contiguous() for name, tensor in _once(learned).items()}, folder / LEARNED)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_swap(model, folder / "config.json")
    return Path(path)


def load(path: str | Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The model of a checkpoint (folder, hub name or "embedded"), with its swap applied again, in eval mode.

    A causal LM, or for encoders the class that was saved. ValueError when the learned weights do not fit the swap.
    """
    import transformers

    name = resolve(path)
    dtype = _dtype(dtype)
    config = _read_config(name, path)
    packing.check_format(config, path)
    again = config.__dict__.pop(KEY, {})
    for field, value in again.get("trained", {}).items():  # the model before its rule was written in plain terms
        setattr(config, field, value)
    if "projections" in again or "packed" in again:
        model = _load_structured(name, config, dtype, again)
    else:
        cls = transformers.AutoModelForCausalLM
        if config.model_type in ENCODERS:
            cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        model = cls.from_pretrained(name, config=config, dtype=dtype).eval()
    check_finite(packing.steady(model))
    if axes := {axis: again[axis] for axis in ("pattern", "positions", "cache") if axis in again}:
        swapping.swap(model, **axes)
        _load_learned(model, name)
    return model


def _load_structured(name: str, config, dtype: torch.dtype | str, again: dict) -> nn.Module:
    """A model whose weights are not what its plain class expects: a class that is shaped first and loaded then.

    ValueError when the checkpoint's weights are not exactly those that its config.json promises.
    """
    import transformers

    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ValueError(f"config.json: architectures: got {config.architectures!r}, which transformers does not have")

    class Shaped(cls):
        def __init__(self, config):
            super().__init__(config)
            replace.rebuild(self, again.get("projections", {}))
            packed.rebuild(self, again.get("packed", []))

    for name_of in ("__name__", "__qualname__", "__module__"):  # transformers renames weights by them
        setattr(Shaped, name_of, getattr(cls, name_of))
    model, found = Shaped.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # mismatched sizes are found below
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found.get(what):
            listed = ", ".join(sorted(str(each) for each in found[what]))
            raise ValueError(f"weights: they do not fit config.json, {what.replace('_', ' ')}: {listed}")
    model.__class__ = cls
    return model.eval()


@torch.no_grad()
def load_again(folder: str | Path, model: nn.Module, tokens: Tensor) -> tuple[nn.Module, dict]:
    """The checkpoint in `folder`, loaded, and how far its logits on tokens (N,) are from those of `model`, saved there:
    {"max_logit_difference", "tokens"}. Raises RuntimeError when they differ by more than rounding."""
    device = placement.input_device(model)
    again, ids = load(folder).to(device), tokens[None].to(device)
    ours, theirs = (one(input_ids=ids, use_cache=False).logits.float() for one in (model, again))
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * float(ours.abs().max()):
        raise RuntimeError(f"the saved checkpoint gives other logits (largest difference {difference:.3g})")
    return again, {"max_logit_difference": difference, "tokens": ids.shape[1]}


def load_model(name: str | Path, dtype: torch.dtype | str = "auto"):
    """(model in eval mode, tokenizer) of "embedded", a folder or a hub name. ValueError when it is none of them."""
    from transformers import AutoTokenizer

    dtype = _dtype(dtype)
    if str(name) == "embedded":
        from effattn import embedded

        model, tokenizer = embedded.load() if dtype == "auto" else embedded.load(dtype)
        check_finite(model)
        return model, tokenizer
    model = load(name, dtype)
    return model, AutoTokenizer.from_pretrained(resolve(name))


def resolve(name: str | Path) -> str:
    """What transformers loads `name` from: a folder ("embedded" has one too), or else a hub name as it is.

    ValueError, without touching the network, for what can be neither.
    """
    if str(name) == "embedded":
        from effattn import embedded

        return str(embedded.directory())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model: the folder {str(name)!r} has no config.json, it is not a checkpoint")
        return str(name)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise ValueError(_not_found(name, "it is no folder, and no hub name (owner/name) looks like that"))
    return str(name)


def check_finite(model: nn.Module) -> None:
    """ValueError naming the first weight that holds NaN or Inf."""
    for name, tensor in placement.weights(model):
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            tensor = tensor.float()  # torch does not ask 8-bit floats
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"weights: {name} holds NaN or Inf ({bad} of {tensor.numel()} values)")


def check_new_folder(argument: str, path: str | Path) -> None:
    """ValueError when `path` exists and is not an empty folder."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{argument}: {str(path)!r} exists and is not an empty folder; nothing was written")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; renames it to `path` at the end, or removes it when the body fails.

    ValueError when `path` exists and is not an empty folder.
    """
    check_new_folder("path", path)
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)  # mkdtemp's folders are private
        for file in [*folder.rglob("*"), folder]:
            _fsync(file)
        os.replace(folder, target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state_dict that a swap added, by name."""
    parts = {hooks.PATTERN, hooks.GLOBAL, hooks.POSITIONS}
    found = {name: tensor for name, tensor in model.state_dict().items() if parts & set(name.split("."))}
    return {name: placement.fetched(model, name, tensor) for name, tensor in found.items()}


def _once(learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without further names of the same tensor, which layers may share."""
    first: dict[tuple, str] = {}
    return {name: x for name, x in learned.items() if first.setdefault((x.data_ptr(), x.shape), name) == name}


@torch.no_grad()
def _load_learned(model: nn.Module, name: str) -> None:
    """Fills what a swap added from the checkpoint's file. ValueError unless names and shapes are the same."""
    wanted = _once(_learned(model))
    file = Path(name) / LEARNED
    if wanted and not Path(name).is_dir():
        from transformers.utils import cached_file

        file = Path(cached_file(name, LEARNED, _raise_exceptions_for_missing_entries=False) or file)
    saved = load_file(file) if file.is_file() else {}
    for what, names in (("missing", wanted.keys() - saved.keys()), ("unexpected", saved.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"weights: {LEARNED} does not fit the swap in config.json, {what}: {', '.join(sorted(names))}"
            )
    for key, tensor in wanted.items():
        if tensor.shape != saved[key].shape:
            raise ValueError(
                f"weights: {LEARNED}: {key}: got {tuple(saved[key].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[key])


def _write_swap(model: nn.Module, file: Path) -> None:
    """Adds to config.json what plain transformers would not know, or would get wrong, without it."""
    done = swapping.active(model)
    specs = {} if done is None else {i: spec for i, spec in done.specs.items() if not swapping.is_plain(spec)}
    config = json.loads(file.read_text())
    config.pop(KEY, None)
    more = {"pattern": {str(index): spec for index, spec in sorted(specs.items())}} if specs else {}
    more |= {} if done is None else caches.saved(done.caches)
    ours, plain = positions.saved(model)
    more |= ours
    config |= plain
    others = {"projections": replace.record(model), "packed": list(packed.layers_of(model))}
    if others := {name: record for name, record in others.items() if record}:
        more |= {"model_type": config["model_type"], **others}
        config["model_type"] = KEY
    if more:
        config[KEY] = more
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_config(name: str, asked: str | Path):
    """The cheap part first, so that an unknown name is one clear error and not the hub library's.

    Of a checkpoint whose model_type is "effattn", the configuration of the model inside.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        if config.get("model_type") != KEY:
            return AutoConfig.from_pretrained(name)
        kind = config.get(KEY, {}).get("model_type")
        check_choice("config.json: effattn: model_type", kind, CONFIG_MAPPING)
        return CONFIG_MAPPING[kind].from_dict(config | {"model_type": kind})
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"model: the folder {name!r} cannot be read: {error}") from error
        raise ValueError(_not_found(asked, str(error).splitlines()[0])) from None


def _not_found(name: str | Path, why: str) -> str:
    hint = " (did you mean 'embedded'?)" if difflib.get_close_matches(str(name), ["embedded"], cutoff=0.8) else ""
    return (
        f"model: got {str(name)!r}{hint}, which is not 'embedded', not an existing folder, "
        f"and not found as a hub name: {why}"
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
        return dtype if dtype == "auto" else getattr(torch, dtype)
    return dtype
