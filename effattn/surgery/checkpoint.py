"""Checkpoints: whatever plain transformers can express is saved as plain transformers.

    effattn.save(model, "out")            # all or nothing: a folder appears at the end, complete
    model = effattn.load("out")           # re-applies what plain transformers cannot express
    model, tokenizer = load_model("embedded")

A swap that plain transformers cannot express is kept in config.json under "effattn", and what its
methods learn in effattn.safetensors; model.safetensors has the model's own weights only. Where
these are not what the plain class expects (structured projections), config.json's `model_type` is
"effattn", which plain transformers refuses, and the model's own is under "effattn". What
`save_pretrained` and a Trainer write of a swapped model is loaded, too
(`effattn.surgery.record`). No pickle anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from effattn.hf import loading, packing, parentage, placement
from effattn.hf.adapters import require_own_weights
from effattn.hf.beginning import settle
from effattn.hf.placement import check_finite
from effattn.hf.source import DTYPES as DTYPES
from effattn.hf.source import dtype_of, load_tokenizer, read_config, resolve
from effattn.outputs import atomic_folder
from effattn.surgery import card, record, restoring
from effattn.surgery.record import LEARNED


def save(model: PreTrainedModel, path: str | Path, tokenizer=None) -> Path:
    """Writes the model (and its tokenizer) to the new folder `path`, which it returns, with a model
    card (README.md).

    Weights are written as safetensors in their own dtypes. Raises ValueError for a folder that is
    not empty and for weights with NaN or Inf, and Unsupported for adapters that are not merged,
    which the checkpoint would lose (peft saves them by itself), and for caches that were made of
    objects (`effattn.kvpress`). If anything fails, nothing is left behind."""
    # All checks before the folder: it appears with everything in it, or not at all.
    packing.steady(model)
    require_own_weights(model)
    placement.require_own(model, "save")
    check_finite(model)
    record.check_caches(model)
    with atomic_folder(path) as folder, placement.saving(model):
        learned = record.learned(model)
        plain = {name: tensor for name, tensor in model.state_dict().items() if name not in learned}
        with packing.leaving_out(model, learned):
            model.save_pretrained(folder, state_dict=plain if learned else None)
        if learned:
            save_file(
                {name: tensor.contiguous() for name, tensor in record.once(learned).items()},
                folder / LEARNED,
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        record.write(model, folder / "config.json")
        card.write(folder, parentage.of_model(model))
    return Path(path)


def load(path: str | Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The model of a checkpoint (folder, GGUF file, hub name, "embedded" or "smollm2"), with its
    swap applied again, in eval mode. dtype: of the weights, a torch dtype or its name; "auto": as
    stored, bfloat16 of a GGUF file.

    Its class is the one that was saved. ValueError for weights that are missing, unexpected or of
    another shape, for learned weights that do not fit the swap, and for a class that transformers
    does not have."""
    dtype = dtype_of(dtype)
    name = resolve(path, dtype)
    config = read_config(name, path)
    packing.check_format(config, path)
    # First a plain model is built, then swapped.
    again = restoring.take(config)
    shape = _shape(again)
    learned = bool(again.keys() & set(restoring.AXES))
    model = loading.build(name, config, dtype, shape, learned=learned)
    check_finite(packing.steady(model))
    return restoring.finish(again, model, name)


def outline(name: str | Path) -> tuple[nn.Module, Any]:
    """(the causal LM of what `load` takes without its weights, swapped as it was; its tokenizer):
    what a checkpoint is, for as long as its configuration takes to read. It computes nothing.
    Raises what `load_model` does, but for what is wrong with numbers."""
    folder = resolve(name)
    config = read_config(folder, name)
    loading.check_causal(config, name)
    packing.check_format(config, name)
    again = restoring.take(config)
    model = loading.outline(folder, config, _shape(again))
    return restoring.hang(again, model), load_tokenizer(folder)


def _shape(again: dict) -> Callable[[nn.Module], None] | None:
    """What makes a plain model's modules those of a checkpoint; None where they are the same."""
    changed = again.keys() & set(restoring.SHAPES)
    return partial(restoring.shape, again) if changed else None


@torch.no_grad()
def load_again(folder: str | Path, model: nn.Module, tokens: Tensor) -> tuple[nn.Module, dict]:
    """The checkpoint in `folder`, loaded, and how far its logits on tokens (N,) are from those of
    `model`, saved there: {"max_logit_difference", "tokens"}. Raises RuntimeError when they differ
    by more than rounding."""
    device = placement.input_device(model)
    again, ids = load(folder).to(device), tokens[None].to(device)
    ours, theirs = (one(input_ids=ids, use_cache=False).logits.float() for one in (model, again))
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * float(ours.abs().max()):
        raise RuntimeError(
            f"the saved checkpoint gives other logits (largest difference {difference:.3g})"
        )
    return again, {"max_logit_difference": difference, "tokens": ids.shape[1]}


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", *, bos: bool | None = None):
    """(causal LM in eval mode, tokenizer) of what `load` takes, which settles its BOS
    (`effattn.hf.beginning`; None: as the tokenizer does it). ValueError when it is none of them."""
    dtype = dtype_of(dtype)
    if str(name) == "embedded":
        from effattn import embedded

        model, tokenizer = (
            embedded.load(dtype) if isinstance(dtype, torch.dtype) else embedded.load()
        )
        check_finite(model)
        settle(model, bos, tokenizer)
        return model, tokenizer
    folder = resolve(name, dtype)
    loading.check_causal(read_config(folder, name), name)
    model, tokenizer = load(name, dtype), load_tokenizer(folder)
    settle(model, bos, tokenizer)
    return model, tokenizer
