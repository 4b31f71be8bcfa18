"""What a target of an export has to say of itself.

    @register("gguf")
    class Gguf(Target): ...

The table of what its engine runs is in `effattn.exporting.capabilities`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from effattn.axes import Axis
from effattn.exporting.checking import Engine


@dataclass
class Source:
    """A checkpoint that is exported: its model, and what was done so that the target has it.

    kv_cache: a format whose scales are written, of all layers but `kv_skip`, measured on the tokens
    `calibration` (or a function of the tokenizer; None: a text of the package's)."""

    name: str
    model: nn.Module
    tokenizer: Any
    notes: list[str]
    weight_bytes: int
    kv_cache: str | None = None
    kv_skip: tuple[int, ...] = ()
    calibration: Tensor | Callable[[Any], Tensor] | None = None


class Target:
    """Writes a model for an engine. Each function is called in this order, with the same `format`:
    one of `formats`, whose first is the default; None where there are none."""

    name: ClassVar[str]  # set by `register`
    formats: ClassVar[tuple[str, ...]] = ()
    caches: ClassVar[tuple[str, ...]] = ()  # formats of a cache that a checkpoint has scales for
    engine: ClassVar[Engine | None] = None  # that runs it here, and measures its speed

    @classmethod
    def require(cls, check: bool) -> None:
        """ValueError, saying what to install, for a package that is not there. Unsupported for a
        `check` that nobody can run."""

    @classmethod
    def adapt(cls, model: nn.Module) -> tuple[nn.Module, list[str]]:
        """The model with what the target has in another way, and what was done, in words."""
        return model, []

    @classmethod
    def refuse(cls, source: Source, format: str | None) -> None:
        """Unsupported for what the target has not. May add to `source.notes`."""

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        """Writes the export into an empty folder."""
        raise NotImplementedError

    @classmethod
    def check(
        cls, source: Source, folder: Path, format: str | None, text: Tensor, said: str
    ) -> dict[str, object]:
        """What is computed with the export against the model. text: tokens, int64 (N,); said: a
        string. RuntimeError where it is something else."""
        raise NotImplementedError


TARGETS: Axis[Target] = Axis("to", "target", "effattn.exporting.targets")
register: Callable = TARGETS.register
