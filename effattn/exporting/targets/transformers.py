"""Plain checkpoints, for transformers where effattn is not installed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from effattn.exporting import plain
from effattn.exporting.targets.base import Source, Target, register


@register("transformers")
class Transformers(Target):
    """A folder that needs nothing of effattn."""

    @classmethod
    def adapt(cls, model: nn.Module) -> tuple[nn.Module, list[str]]:
        return plain.windows(model)

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        plain.write(source.model, source.tokenizer, folder)

    @classmethod
    def check(
        cls, source: Source, folder: Path, format: str | None, text: Tensor, said: str
    ) -> dict[str, object]:
        return plain.check(source.model, folder, text)
