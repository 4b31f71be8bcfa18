"""What a kind of heads is: how its spec is read, and what it does to a model.

    change = KINDS.find("gqa").change(parts, "gqa(kv_heads=2)", {"kv_heads": 2})
    change.carry_out(model, calibration)

A kind is one file of this package: a class that registers itself under the name of its specs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from effattn.axes import Axis
from effattn.calibration.walk import Progress, Walk
from effattn.errors import check_choice
from effattn.hf.anatomy import Anatomy


class Job:
    """A conversion with its calibration, checked, which a walk carries out."""

    @property
    def batches(self) -> list[Tensor] | None:
        """The windows that hidden states are made of, int64 (batch, length) each; None: none are
        needed."""
        raise NotImplementedError

    @property
    def settings(self) -> dict:
        """What an unfinished run must have in common with one that goes on from it."""
        raise NotImplementedError

    def carry_out(self, walk: Walk, progress: Progress | None = None) -> list[dict]:
        """Changes every layer; returns a row of facts, JSON, for each."""
        raise NotImplementedError

    def config(self, config: dict, rows: list[dict]) -> dict:
        """config.json of what comes out, made of the parent's."""
        raise NotImplementedError

    def report(self, old: Anatomy, new: Anatomy, rows: list[dict]) -> Any:
        """What the function on a live model returns."""
        raise NotImplementedError


@dataclass(frozen=True)
class Change:
    """What a spec comes to in one model, checked as far as that needs no calibration.

    convert(model, calibration) rewrites the model, all or nothing; job(parts, calibration, bos) is
    what does the same on a walk, bos the token itself. kv_heads: key/value heads by then, None for
    as many as there are. latent: whether keys and values are latents by then."""

    convert: Callable[..., Any]
    job: Callable[..., Job]
    kv_heads: int | None = None
    latent: bool = False


class Kind:
    """A kind of heads. What it does not write refuses."""

    name: ClassVar[str]  # set by `register`

    @classmethod
    def change(cls, parts: Anatomy, spec: str, options: dict) -> Change | None:
        """What heads of these options are for this model; None where there is nothing to do.
        ValueError and Unsupported for what cannot be."""
        raise NotImplementedError


KINDS: Axis[Kind] = Axis("heads", "heads", "effattn.heads.kinds")
register = KINDS.register


def check_options(name: str, options: dict, function: Callable, *apart: str) -> None:
    """ValueError for options that are no arguments of `function`; those in `apart` are given
    otherwise."""
    valid = [one for one in inspect.signature(function).parameters if one not in apart]
    for option in options:
        check_choice(f"heads: {name}: option", option, valid)
