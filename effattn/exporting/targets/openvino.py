"""OpenVINO models, which keep their cache by themselves."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from effattn.exporting import checking, openvino_cpu, openvino_model, plain
from effattn.exporting.targets.base import Source, Target, register
from effattn.hf import anatomy


@register("openvino")
class OpenVINO(Target):
    """A model with its config and its tokenizer beside."""

    formats = openvino_model.FORMATS
    engine = openvino_cpu

    @classmethod
    def require(cls, check: bool) -> None:
        openvino_model.require()

    @classmethod
    def adapt(cls, model: nn.Module) -> tuple[nn.Module, list[str]]:
        return plain.windows(model)

    @classmethod
    def refuse(cls, source: Source, format: str | None) -> None:
        openvino_model.check(anatomy.of(source.model))
        if any(layer.own_window is not None for layer in anatomy.of(source.model).layers):
            source.notes.append("windows are in the masks: the cache keeps all tokens")

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        assert format is not None
        openvino_model.write(source.model, folder, format)
        source.model.config.save_pretrained(folder)
        if (generation := getattr(source.model, "generation_config", None)) is not None:
            generation.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)

    @classmethod
    def check(
        cls, source: Source, folder: Path, format: str | None, text: Tensor, said: str
    ) -> dict[str, object]:
        model, tokenizer = source.model.float(), source.tokenizer
        return checking.compare(openvino_cpu, folder, model, tokenizer, checking.CLOSE, text, said)
