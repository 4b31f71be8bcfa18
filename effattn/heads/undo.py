"""Attention modules as they were: whatever is written into them meanwhile can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effattn.hf.anatomy import Anatomy, Layer

_TABLES = ("_parameters", "_modules")


@contextmanager
def all_or_nothing(parts: Anatomy) -> Iterator[Undo]:
    """While open, an error (or Ctrl-C) puts back every layer that `remember` was told of, and the
    config's heads.
    """
    undo = Undo()
    config, fields = parts.config, ("num_key_value_heads", "head_dim", "multi_query")
    had = {name: vars(config)[name] for name in fields if name in vars(config)}
    try:
        yield undo
    except BaseException:
        undo.put_back()
        for name in fields:
            vars(config).pop(name, None)
        vars(config).update(had)
        raise


class Undo:
    """Module by module what it had: the same parameter objects again, with the same values."""

    def __init__(self) -> None:
        self._modules: list[tuple[nn.Module, dict, dict[str, dict]]] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def remember(self, layer: Layer, ffn: bool = False) -> None:
        """Call before the layer's heads are written. What is written in place (o_proj, norms) is
        copied to the CPU; q, k and v get new parameters, and the old ones are kept. ffn: its
        output projection is written, too."""
        inside = dict.fromkeys([*layer.attention.modules(), *layer.qkv_modules])
        for module in inside:
            tables = {name: dict(vars(module)[name]) for name in _TABLES}
            self._modules.append((module, dict(vars(module)), tables))
        norms = [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
        feeding = [layer.feed_forward.output] if ffn else []
        for module in (layer.o.module, *norms, *feeding):
            self._values += [(p, p.detach().to("cpu", copy=True)) for p in module.parameters()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything that was remembered, as it was."""
        for module, attributes, tables in self._modules:
            vars(module).update(attributes)
            for name, table in tables.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)
        for parameter, value in self._values:
            parameter.copy_(value)
