"""The weights of a model that is cut: which dimension of which parameter is indexed by what.

Shapes: D hidden dimensions, H query and K key/value heads of d dimensions, F inner dimensions of
the FFN. q, k and v are cut by rows (heads) and columns (D), o_proj by rows (D) and columns (heads);
fused projections and grouped heads by what `effattn.hf.anatomy` says are a head's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf.uneven import ATTENTION, FFN, NORMS
from effattn.prune.structural.keep import Keep, Sizes


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


def sliced_state(parts: hf.Anatomy, keep: Keep, only: hf.Layer | None = None) -> dict[str, Tensor]:
    """The new model's state_dict, by its names. only: what is in it of this layer, which stays."""
    cuts = _Cuts()
    for table in (parts.embeddings, parts.head, parts.positions):
        if table is not None:
            cuts.add(table.weight, (1, keep.hidden))
            cuts.add(getattr(table, "bias", None))
    for parameter in () if parts.final_norm is None else parts.final_norm.parameters():
        cuts.add(parameter, (0, keep.hidden))
    # Cuts are noted by parameter, so that a tied or fused one is cut once and as a whole; names
    # change where layers (or norms that are a module a head) get new numbers.
    names = {id(module): name for name, module in parts.model.named_modules()}
    renamed: dict[str, str | None] = {}  # prefixes; None: what goes
    staying = range(len(parts.layers)) if keep.layers is None else keep.layers.tolist()
    for layer in parts if only is None else [only]:
        path = names[id(layer.block)]
        # a layer goes with all its names; one that stays gets its new number in them
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
        for part, module in _left_out(layer, keep, place):
            renamed[path + names[id(module)].removeprefix(path)] = None
            renamed[f"{path}.{NORMS[part]}"] = None
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
    within = "" if only is None else f"{names[id(only.block)]}."
    for name, tensor in parts.model.state_dict().items():
        new_name = _rename(name, renamed) if name.startswith(within) else None
        if new_name is not None:
            state[new_name] = cuts.apply(parameters.get(name, tensor))
            _rescale(parts, keep, parameters.get(name), state, new_name)
    return state


def _left_out(layer: hf.Layer, keep: Keep, place: int) -> Iterator[tuple[str, nn.Module]]:
    """What goes as a whole from a layer, and how transformers calls it."""
    if keep.heads is not None and not len(keep.heads[place]):
        yield ATTENTION, layer.attention
    if keep.ffn is not None and not len(keep.ffn[place]):
        yield FFN, layer.ffn


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
    # A fused module is cut by the rows of all its parts at once. Sorted, since what stays keeps its
    # order: the layout of q, k and v in it stays what it was.
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
    factor = (Sizes.of(parts.config).hidden / len(keep.hidden)) ** 0.5
    if old is parts.embeddings.weight:
        state[name] = state[name] * factor
    elif old is parts.final_norm.weight and parts.head is None:
        state[name] = (1 + state[name]) / factor - 1
