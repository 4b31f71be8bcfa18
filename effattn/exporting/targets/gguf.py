"""GGUF files, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from effattn.exporting import checking, gguf_file, gguf_tokenizer, llama_cpp
from effattn.exporting.targets.base import Source, Target, register
from effattn.hf import anatomy


@register("gguf")
class Gguf(Target):
    """One file with the tokenizer in it."""

    formats = gguf_file.FORMATS
    engine = llama_cpp

    @classmethod
    def require(cls, check: bool) -> None:
        gguf_file.require_gguf()
        if check:
            llama_cpp.require()

    @classmethod
    def refuse(cls, source: Source, format: str | None) -> None:
        assert format is not None
        parts = anatomy.of(source.model)
        gguf_file.check(parts, format)
        if none := gguf_file.without_ffn(parts):
            source.notes.append(f"{len(none)} layers without an FFN have one of zeros")
        gguf_tokenizer.of(source.tokenizer, parts.embeddings.weight.shape[0])

    @classmethod
    def write(cls, source: Source, folder: Path, format: str | None) -> None:
        assert format is not None
        size = source.model.get_input_embeddings().weight.shape[0]
        vocabulary = gguf_tokenizer.of(source.tokenizer, size)
        gguf_file.write(source.model, vocabulary, folder / llama_cpp.FILE, format)

    @classmethod
    def check(
        cls, source: Source, folder: Path, format: str | None, text: Tensor, said: str
    ) -> dict[str, object]:
        # our own numbers without the rounding of a 16-bit model's steps
        model = source.model.float()
        limit = checking.COARSE if format == "q8_0" else checking.CLOSE
        return checking.compare(llama_cpp, folder, model, source.tokenizer, limit, text, said)
