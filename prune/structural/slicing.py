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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.families import ENCODERS, FAMILIES, of_layers
from effattn.hf.placement import require_here
from effattn.hf.weights import not_plain, packing
from effattn.surgery.replace import record
from effattn.surgery.swapping import active


@dataclass(frozen=True)
class Keep:
    """What stays, as int64 indices; None: everything.

    hidden: (D',) of the residual stream's dimensions. heads and ffn: a tensor for each layer that
    stays, in order, of the same length: K/V groups (a K/V head with its query heads; in multi-head
    attention a head), inner dimensions of the FFN. layers: (L',). Their order does not matter: what
    stays keeps the model's."""

    hidden: Tensor | None = None
    heads: Sequence[Tensor] | None = None
    ffn: Sequence[Tensor] | None = None
    layers: Tensor | None = None


def slice_model(model: nn.Module, keep: Keep) -> nn.Module:
    """A new model of the same class, with a config that says its smaller shape: `save_pretrained`
    writes a checkpoint that plain transformers loads. Same device, dtype, mode and generation
    settings; `model` is not changed.

    Raises ValueError for indices that are wrong, and Unsupported, naming the class and what it
    could hold, where its config cannot express the shape; or for a model that is swapped or whose
    weights are not plain."""
    check_plain(model)
    parts = hf.of(model)
    keep = _checked(parts, keep)
    config = sliced_config(model.config, keep)
    state = _sliced_state(parts, keep)
    with torch.device("meta"):
        wanted = {
            name: tensor.shape
            for name, tensor in type(model)(copy.deepcopy(config)).state_dict().items()
        }
    for name in sorted(wanted.keys() | state.keys()):
        shape = state[name].shape if name in state else None
        if shape != wanted.get(name):
            made, kept = (
                tuple(one) if one is not None else "not at all" for one in (wanted.get(name), shape)
            )
            raise Unsupported(
                f"{type(model).__name__} cannot hold this shape: its config makes {name} {made}, "
                f"what is kept is {kept}"
            )
    new = type(model).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    _check_kinds(parts, hf.of(new), keep)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def _check_kinds(old: hf.Anatomy, new: hf.Anatomy, keep: Keep) -> None:
    """Unsupported where a layer became one of another kind because its number is another."""
    staying = range(len(old.layers)) if keep.layers is None else keep.layers.tolist()
    for index, after in zip(staying, new, strict=True):
        before = old.layers[index]
        for what in ("window", "rotary_dims", "causal"):
            if getattr(before, what) != getattr(after, what):
                raise Unsupported(
                    f"layers: layer {index} of {type(old.model).__name__} has {what} "
                    f"{getattr(before, what)}, as layer "
                    f"{after.index} it gets {getattr(after, what)}: its config says it by its "
                    "number"
                )


def sliced_config(config, keep: Keep):
    """A copy of a transformers config with the shape that `keep` leaves. Raises Unsupported where
    transformers refuses such a config, naming the numbers of heads that it takes."""
    _check_explicit_heads(config, keep)
    new = _with_sizes(config, keep)
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


def reachable_heads(config, keep: Keep | None = None) -> list[int]:
    """The numbers of K/V heads (in multi-head attention: of heads) that a model of this config can
    be cut to, the rest of its shape as `keep` leaves it."""
    keep = keep or Keep()
    sizes = _Sizes.of(config)
    if _derives_head_dim(config):
        hidden = sizes.hidden if keep.hidden is None else len(keep.hidden)
        wanted, rest = divmod(hidden, sizes.head_dim * (sizes.heads // sizes.kv_heads))
        return [] if rest or wanted > sizes.kv_heads else [wanted]
    one = torch.arange(sizes.kv_heads)
    layers = sizes.layers if keep.layers is None else len(keep.layers)
    options = {n: replace(keep, heads=[one[:n]] * layers) for n in range(1, sizes.kv_heads + 1)}
    return [n for n, option in options.items() if not _refusal(_with_sizes(config, option))]


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @classmethod
    def of(cls, config) -> _Sizes:
        config = config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        return cls(hidden, heads, kv_heads, head_dim, config.num_hidden_layers)


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
    sizes = _Sizes.of(config)
    hidden = sizes.hidden if keep.hidden is None else len(keep.hidden)
    heads = (
        sizes.heads if keep.heads is None else len(keep.heads[0]) * (sizes.heads // sizes.kv_heads)
    )
    if hidden != heads * sizes.head_dim:
        raise Unsupported(
            f"{type(config).__name__} cannot hold {heads} heads of {sizes.head_dim} with hidden "
            f"size {hidden}: in "
            f"this class the heads make up the hidden size; with {heads} heads, hidden has to be "
            f"{heads * sizes.head_dim}"
        )


def _with_sizes(config, keep: Keep):
    """A copy of the config with the new shape, not yet checked."""
    new = copy.deepcopy(config)
    text, sizes = new.get_text_config(), _Sizes.of(config)
    family = (FAMILIES | ENCODERS)[text.model_type]
    changes = {}
    if keep.hidden is not None:
        changes |= {name: len(keep.hidden) for name in family.hidden_size}
    if keep.heads is not None:
        groups = len(keep.heads[0])
        changes["num_attention_heads"] = groups * (sizes.heads // sizes.kv_heads)
        if getattr(text, "num_key_value_heads", None) is not None:
            changes["num_key_value_heads"] = groups
    if keep.ffn is not None:
        changes[family.ffn_size] = len(keep.ffn[0])
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


def _checked(parts: hf.Anatomy, keep: Keep) -> Keep:
    """`keep` with its indices validated, sorted and on the CPU."""
    if not isinstance(keep, Keep):
        raise ValueError(
            f"keep: got {type(keep).__name__}, valid is an effattn.prune.structural.slicing.Keep"
        )
    count = len(parts.layers)
    layers = _indices("keep.layers", keep.layers, count)
    staying = range(count) if layers is None else layers.tolist()
    hidden = _indices("keep.hidden", keep.hidden, _Sizes.of(parts.config).hidden)
    found = {}
    for name in ("heads", "ffn"):
        given = getattr(keep, name)
        if given is None:
            found[name] = None
            continue
        if len(given) != len(staying):
            raise ValueError(
                f"keep.{name}: got {len(given)} tensors, valid is one for each of {len(staying)} "
                "layers"
            )
        size = [
            parts.layers[i].kv_heads if name == "heads" else parts.layers[i].feed_forward.size
            for i in staying
        ]
        found[name] = [_indices(f"keep.{name}[{i}]", one, size[i]) for i, one in enumerate(given)]
        counts = sorted({len(one) for one in found[name]})
        if len(counts) > 1:
            raise ValueError(
                f"keep.{name}: got {', '.join(map(str, counts))} by layer; a config holds one "
                "number, the same for all"
            )
    return Keep(hidden, found["heads"], found["ffn"], layers)


def _indices(argument: str, got: Tensor | None, size: int) -> Tensor | None:
    if got is None:
        return None
    if not isinstance(got, Tensor) or got.dtype != torch.int64 or got.dim() != 1 or not len(got):
        told = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(
            f"{argument}: got {told}, valid is an int64 tensor (n,) of indices, n at least 1"
        )
    got = got.detach().cpu().unique()  # sorted
    if int(got[0]) < 0 or int(got[-1]) >= size:
        raise ValueError(
            f"{argument}: indices run from {int(got[0])} to {int(got[-1])}, valid are 0 to "
            f"{size - 1}"
        )
    return got


class _Cuts:
    """Which dimension of which parameter is indexed by what; parameters not in here are unknown."""

    def __init__(self):
        self.of: dict[int, list[tuple[int, Tensor]]] = {}

    def add(self, parameter: Tensor | None, *cuts: tuple[int, Tensor | None]) -> None:
        if parameter is not None:
            self.of.setdefault(id(parameter), []).extend(
                (dim, index) for dim, index in cuts if index is not None
            )

    def linear(self, module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
        self.add(module.weight, (0, rows), (1, columns))
        self.add(module.bias, (0, rows))

    def apply(self, parameter: Tensor) -> Tensor:
        new = parameter.detach()
        for dim, index in self.of.get(id(parameter), ()):
            new = new.index_select(dim, index.to(new.device))
        return new.clone() if new.data_ptr() == parameter.data_ptr() else new


def _sliced_state(parts: hf.Anatomy, keep: Keep) -> dict[str, Tensor]:
    """The new model's state_dict, by its names."""
    cuts = _Cuts()
    for table in (parts.embeddings, parts.head, parts.positions):
        if table is not None:
            cuts.add(table.weight, (1, keep.hidden))
            cuts.add(getattr(table, "bias", None))
    for parameter in () if parts.final_norm is None else parts.final_norm.parameters():
        cuts.add(parameter, (0, keep.hidden))
    names = {id(module): name for name, module in parts.model.named_modules()}
    renamed: dict[str, str | None] = {}  # prefixes; None: what goes
    staying = range(len(parts.layers)) if keep.layers is None else keep.layers.tolist()
    for layer in parts:
        path = names[id(layer.block)]
        if layer.index not in staying:
            renamed[path] = None
            continue
        place = staying.index(layer.index)
        renamed[path] = f"{path.rpartition('.')[0]}.{place}"
        groups = None if keep.heads is None else keep.heads[place]
        for module, number in _cut_attention(cuts, layer, groups, keep.hidden):
            own = names[id(module)].removeprefix(path)
            renamed[path + own] = (
                None if number is None else f"{renamed[path]}{own.rpartition('.')[0]}.{number}"
            )
        if keep.ffn is not None or keep.hidden is not None:
            inner = None if keep.ffn is None else keep.ffn[place]
            feed_forward = layer.feed_forward
            for module in feed_forward.inputs:
                cuts.linear(
                    module, None if inner is None else feed_forward.rows(inner), keep.hidden
                )
            cuts.linear(feed_forward.output, keep.hidden, inner)
    if keep.hidden is not None:
        _check_known(parts, cuts, staying, names)
    parameters = dict(parts.model.named_parameters(remove_duplicate=False))
    state = {}
    for name, tensor in parts.model.state_dict().items():
        new_name = _rename(name, renamed)
        if new_name is not None:
            state[new_name] = cuts.apply(parameters.get(name, tensor))
            _rescale(parts, keep, parameters.get(name), state, new_name)
    return state


def _cut_attention(cuts: _Cuts, layer: hf.Layer, groups: Tensor | None, hidden: Tensor | None):
    """Adds the cuts of one attention layer. Yields (module, its new number or None) of norms that
    are a module for each head (StableLM)."""
    share = layer.heads // layer.kv_heads
    queries = None if groups is None else (groups[:, None] * share + torch.arange(share)).flatten()
    rows: dict[nn.Module, list[Tensor]] = {}
    for projection, heads in ((layer.q, queries), (layer.k, groups), (layer.v, groups)):
        rows.setdefault(projection.module, []).extend(
            [] if heads is None else [projection.rows(heads)]
        )
    # fused ones keep their layout, since what stays keeps its order
    for module, some in rows.items():
        cuts.linear(module, torch.cat(some).sort().values if some else None, hidden)
    cuts.linear(layer.o.module, hidden, None if queries is None else layer.o.rows(queries))
    cuts.add(layer.sinks, (0, queries))
    own = []
    for norm, size, heads in (
        (layer.q_norm, layer.heads, queries),
        (layer.k_norm, layer.kv_heads, groups),
    ):
        if norm is None:
            continue
        own += norm.modules()
        for parameter in norm.parameters():
            by_head = parameter.numel() == size * layer.head_dim and not hasattr(norm, "norms")
            if heads is None or not by_head or parameter.numel() == layer.head_dim:
                cuts.add(parameter)  # shared by all heads
            elif parameter.dim() > 1:
                cuts.add(parameter, (0, heads))
            else:
                cuts.add(
                    parameter, (0, torch.arange(parameter.numel()).view(size, -1)[heads].flatten())
                )
        if hasattr(norm, "norms") and heads is not None:
            place = {head: number for number, head in enumerate(heads.tolist())}
            yield from ((module, place.get(head)) for head, module in enumerate(norm.norms))
    for norm in layer.norms:
        if not any(norm is one for one in own):
            for parameter in norm.parameters():
                cuts.add(parameter, (0, hidden))


def _check_known(
    parts: hf.Anatomy, cuts: _Cuts, staying: Sequence[int], names: dict[int, str]
) -> None:
    """Unsupported for parameters of which it is not known how they follow the hidden size."""
    gone = tuple(names[id(layer.block)] + "." for layer in parts if layer.index not in staying)
    for name, parameter in parts.model.named_parameters():
        if id(parameter) not in cuts.of and not name.startswith(gone):
            raise Unsupported(
                f"hidden: {type(parts.model).__name__} has {name}, which cannot be cut to fewer "
                "dimensions"
            )


def _rename(name: str, renamed: dict[str, str | None]) -> str | None:
    """The new name, by the longest prefix in `renamed`; None: it goes."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in renamed:
            return None if renamed[path] is None else renamed[path] + name.removeprefix(path)
    return name


def _rescale(
    parts: hf.Anatomy, keep: Keep, old: Tensor | None, state: dict[str, Tensor], name: str
) -> None:
    """Gemma multiplies its embeddings by sqrt(hidden size): what that loses goes into the table,
    and where the output embedding is the same table, out of the final norm again (whose gain is 1 +
    weight)."""
    if keep.hidden is None or not parts.layers[0].family.scaled_embeddings:
        return
    factor = (_Sizes.of(parts.config).hidden / len(keep.hidden)) ** 0.5
    if old is parts.embeddings.weight:
        state[name] = state[name] * factor
    elif old is parts.final_norm.weight and parts.head is None:
        state[name] = (1 + state[name]) / factor - 1
