"""The config of a model that is cut, and which shapes its class can hold."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from effattn.errors import Unsupported
from effattn.hf import uneven
from effattn.hf.families import ENCODERS, FAMILIES, of_layers
from effattn.prune.structural.keep import Keep, Sizes


def sliced_config(config, keep: Keep):
    """A copy of a transformers config with the shape that `keep` leaves. Raises Unsupported where
    transformers refuses such a config, naming the numbers of heads that it takes."""
    _check_explicit_heads(config, keep)
    layers = _differing(config, keep)
    # of layers that differ the config as a whole keeps the sizes that it had
    new = _with_sizes(config, replace(keep, heads=None, ffn=None) if layers else keep)
    if layers:
        new.get_text_config().head_dim = Sizes.of(config).head_dim
        uneven.set_overrides(new.get_text_config(), layers)
    reason = _refusal(new)
    if reason:
        valid = reachable_heads(config, keep)
        hint = (
            f"; with this hidden size, K/V heads can be {', '.join(map(str, valid))}"
            if valid
            else ""
        )
        raise Unsupported(f"{type(config).__name__} cannot hold this shape: {reason}{hint}")
    return new


def _differing(config, keep: Keep) -> dict[int, dict[str, Any]]:
    """What single layers of the new model have that the others have not."""
    text, sizes = config.get_text_config(), Sizes.of(config)
    family = (FAMILIES | ENCODERS)[text.model_type]
    before, share = uneven.overrides(text), sizes.heads // sizes.kv_heads
    staying = range(sizes.layers) if keep.layers is None else keep.layers.tolist()
    found: dict[int, dict[str, Any]] = {}
    for place, index in enumerate(staying):
        own = dict(before.get(index, {}))
        skip = set(own.pop("skip", ()))
        if keep.heads is not None and not (groups := len(keep.heads[place])):
            skip.add(uneven.ATTENTION)
        elif keep.heads is not None:
            own |= {uneven.HEADS: groups * share, uneven.KV_HEADS: groups}
        if keep.ffn is not None and not (width := len(keep.ffn[place])):
            skip.add(uneven.FFN)
        elif keep.ffn is not None:
            own[family.ffn_size] = width
        found[place] = own | ({"skip": sorted(skip)} if skip else {})
    return found if len({str(one) for one in found.values()}) > 1 else {}


def reachable_heads(config, keep: Keep | None = None) -> list[int]:
    """The numbers of K/V heads (in multi-head attention: of heads) that a model of this config can
    be cut to, the rest of its shape as `keep` leaves it."""
    keep = keep or Keep()
    sizes = Sizes.of(config)
    # 1. Classes whose head size follows from hidden size and heads: one number of heads fits
    if _derives_head_dim(config):
        hidden = sizes.hidden if keep.hidden is None else len(keep.hidden)
        wanted, rest = divmod(hidden, sizes.head_dim * (sizes.heads // sizes.kv_heads))
        return [] if rest or wanted > sizes.kv_heads else [wanted]
    # 2. The others: whatever transformers takes; it is asked, since each version has its own checks
    one = torch.arange(sizes.kv_heads)
    layers = sizes.layers if keep.layers is None else len(keep.layers)
    options = {n: replace(keep, heads=[one[:n]] * layers) for n in range(1, sizes.kv_heads + 1)}
    return [n for n, option in options.items() if not _refusal(_with_sizes(config, option))]


def _derives_head_dim(config) -> bool:
    """Whether the class divides its hidden size by its heads, whatever a `head_dim` in its config
    says.
    """
    return not (FAMILIES | ENCODERS)[config.get_text_config().model_type].explicit_head_dim


def _check_explicit_heads(config, keep: Keep) -> None:
    """Unsupported where the class would take another head size from the new hidden size and number
    of heads.
    """
    if not _derives_head_dim(config):
        return
    sizes = Sizes.of(config)
    hidden = sizes.hidden if keep.hidden is None else len(keep.hidden)
    heads = (
        sizes.heads if keep.heads is None else len(keep.heads[0]) * (sizes.heads // sizes.kv_heads)
    )
    if hidden != heads * sizes.head_dim:
        raise Unsupported(
            f"{type(config).__name__} cannot hold {heads} heads of {sizes.head_dim} with hidden "
            f"size {hidden}: in this class the heads make up the hidden size; with {heads} heads, "
            f"hidden has to be {heads * sizes.head_dim}"
        )


def _with_sizes(config, keep: Keep):
    """A copy of the config with the new shape, not yet checked."""
    new = copy.deepcopy(config)
    uneven.taken(new.get_text_config())
    text, sizes = new.get_text_config(), Sizes.of(config)
    family = (FAMILIES | ENCODERS)[text.model_type]
    changes: dict[str, object] = {}
    if keep.hidden is not None:
        changes |= {name: len(keep.hidden) for name in family.hidden_size}
    if keep.heads is not None:
        groups = len(keep.heads[0])
        changes["num_attention_heads"] = groups * (sizes.heads // sizes.kv_heads)
        if getattr(text, "num_key_value_heads", None) is not None:
            changes["num_key_value_heads"] = groups
    if keep.ffn is not None:
        changes[family.ffn_size] = len(keep.ffn[0])
    # said explicitly: by default it is hidden size over heads, of which one has changed
    if (keep.heads is not None or keep.hidden is not None) and family.explicit_head_dim:
        changes["head_dim"] = sizes.head_dim
    if keep.layers is not None:
        changes["num_hidden_layers"] = len(keep.layers)
        changes |= of_layers(text, keep.layers.tolist())
    for name, value in changes.items():
        setattr(text, name, value)
    return new


def _refusal(config) -> str:
    """What transformers says against a config when it reads it from a file; empty: nothing."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # strict dataclasses raise classes of their own
        return " ".join(str(error.__cause__ or error).split())
    return ""
