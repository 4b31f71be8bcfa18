"""Tensors that a function written for flex attention takes from around it, and which want
gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def captured(score_mod: Callable | None, like: Tensor) -> list[Tensor]:
    """The tensors of `score_mod` that ask for gradients: variables around it, global ones, its
    defaults, the object that it is a method of, and those of functions among them. ValueError if
    its scores depend on others. like: of whose device and dtype scores are."""
    if score_mod is None:
        return []
    found: dict[int, Tensor] = {}
    _walk(score_mod, found, set())
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    score = torch.zeros((), dtype=torch.float64, device=like.device)
    with torch.enable_grad():
        result = score_mod(score.to(torch.promote_types(like.dtype, torch.float32)), *[zero] * 4)
    if isinstance(result, Tensor) and result.requires_grad and _others(result, found.values()):
        raise ValueError(
            "score_mod: it uses a tensor that asks for gradients and that is no variable of it or "
            "of the function around it, where they cannot be had; valid is one that is, or "
            ".detach()"
        )
    return list(found.values())


def _walk(
    thing,
    found: dict[int, Tensor],
    seen: set[int],
) -> None:
    """Adds the tensors that are reached from `thing`."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.requires_grad:
            found[id(thing)] = thing
        return
    inside: list = []
    if isinstance(thing, functools.partial):
        inside = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, nn.Module):
        inside = [*thing.parameters(), *thing.buffers()]
    elif isinstance(thing, (list, tuple)):
        inside = list(thing)
    elif isinstance(thing, dict):
        inside = list(thing.values())
    elif callable(thing):
        cells = getattr(thing, "__closure__", None) or ()
        inside = [cell.cell_contents for cell in cells if _filled(cell)]
        inside += getattr(thing, "__defaults__", None) or ()
        names = getattr(getattr(thing, "__code__", None), "co_names", ())
        inside += [thing.__globals__[name] for name in names if name in thing.__globals__]
        inside += [getattr(thing, "__self__", None), getattr(thing, "__dict__", None)]
    for one in inside:
        _walk(one, found, seen)


def _filled(cell) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is set later
        return False


def _others(result: Tensor, found) -> bool:
    """Whether the graph of `result` ends anywhere but in the tensors `found`."""
    ends = {x.grad_fn for x in found if x.grad_fn is not None}
    leaves = {id(x) for x in found}
    todo, seen = [result.grad_fn], set()
    if result.grad_fn is None:  # a leaf itself
        return id(result) not in leaves
    while todo:
        node = todo.pop()
        if node is None or node in seen or node in ends:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in leaves:
            return True
        todo += [one for one, _ in node.next_functions]
    return False
