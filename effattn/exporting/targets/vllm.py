"""Checkpoints with the conventions that vLLM's loader reads. No server runs here."""

from __future__ import annotations

from pathlib import Path

from effattn.errors import Unsupported
from effattn.exporting import plain
from effattn.exporting.targets.base import Source, Target, register
from effattn.hf import anatomy


@register("vllm")
class Vllm(Target):
    """A folder of a class that vLLM's sources list."""

    @classmethod
    def require(cls, check: bool) -> None:
        if check:
            raise Unsupported("check: vLLM is not run by effattn; valid is check=False")

    @classmethod
    def refuse(cls, source: Source, format: str | None) -> None:
        parts = anatomy.of(source.model)
        plain.check_vllm(parts)
        source.notes += plain.notes_for_vllm(parts)

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        plain.write(source.model, source.tokenizer, folder)
