"""effattn swaps, shrinks and measures attention in Hugging Face models.

Importing it loads no model code; every public name is imported at its first use. transformers
learns to load what `effattn.save` writes, and the names "effattn:..." of attentions
(`effattn.plugin`); nothing else of it changes."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from effattn.plugin import importing

_FUNCTIONS = {
    "Budget": "effattn.fitting.budget",
    "Shape": "effattn.interface",
    "backend": "effattn.registry",
    "backends": "effattn.registry",
    "convert_files": "effattn.surgery.from_files",
    "convert_gqa": "effattn.heads.gqa",
    "convert_latent": "effattn.surgery.latents",
    "convert_mla": "effattn.heads.mla.convert",
    "describe": "effattn.surgery.describing",
    "export": "effattn.exporting.export",
    "fit": "effattn.fitting.fit",
    "fit_windows": "effattn.swapping.windows",
    "learn_windows": "effattn.swapping.spans",
    "flex_attention": "effattn.kernels.flex",
    "kvpress": "effattn.hf.presses",
    "load": "effattn.surgery.checkpoint",
    "measure": "effattn.measuring.measurement",
    "measure_approximation": "effattn.linearizing.approximation",
    "new_cache": "effattn.hf.cache",
    "perplexity": "effattn.evaluate.loss",
    "rehost": "effattn.rehosting.rehosted",
    "restore": "effattn.surgery.swapping",
    "save": "effattn.surgery.checkpoint",
    "shrink": "effattn.fitting.shrinking",
    "swap": "effattn.surgery.swapping",
}
_MODULES = ("conformance", "embedded", "evaluate", "kernels", "positions", "prune", "quant")

__all__ = [*sorted(_FUNCTIONS), *_MODULES]

try:
    __version__ = version("effattn")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

importing.install()


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"effattn.{name}")
    raise AttributeError(f"module 'effattn' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
