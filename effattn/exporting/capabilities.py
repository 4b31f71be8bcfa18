"""What of a result runs in which engine: the one table that exports refuse by, that their reports
show, and that the documentation has.

    lost(model, "gguf")        # {"pattern": "layers 0-29: sliding(window=512); no"}"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effattn.hf import uneven
from effattn.surgery import record

AS_IS, ZEROS, NO, YES = "as is", "dense, with zeros", "no", "yes"
EFFATTN = "effattn"  # transformers after `import effattn`; no export, but what effattn.save writes
# target of an export -> the engine that reads it
ENGINES = {
    EFFATTN: "after `import effattn`",
    "transformers": "transformers",
    "gguf": "llama.cpp",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
}


@dataclass(frozen=True)
class Part:
    """A part of a model, and what each engine makes of it.

    name: in a checkpoint's record. said: in words. runs: target -> what its engine does with it;
    NO, with a reason behind it or not: it cannot."""

    name: str
    said: str
    runs: dict[str, str]

    def lost_in(self, target: str) -> bool:
        """Whether this target's engine would compute something else."""
        return self.runs[target].startswith(NO)


def _part(name: str, said: str, *runs: str) -> Part:
    return Part(name, said, dict(zip(ENGINES, runs, strict=True)))


DENSE = NO + ': projections="dense" multiplies them out'
PARTS = (
    _part("plain", "fewer KV heads, smaller FFNs, fewer layers, alike in all", *[AS_IS] * 5),
    _part("rope", "YaRN, linear and Llama 3's scaling, another base", *[AS_IS] * 5),
    _part(
        "layers",
        "layers that differ: heads, FFN width, no attention or FFN",
        YES,
        NO + ", until its classes build them",
        "of Llama, as `deci`",
        YES,
        "of Llama, as `block_configs` of AnyModel and DeciLM",
    ),
    _part("packed", "zeros, packed 2:4 or bitmask", YES, ZEROS, ZEROS, ZEROS, ZEROS),
    _part(
        "windows",
        "`sliding` without sinks",
        YES,
        "as `ministral`, of Llama without biases; Qwen 2 and 3 as they are",
        NO,
        "as transformers, in the mask",
        "as `ministral`, of Llama without biases, by its Transformers backend",
    ),
    _part("pattern", "another pattern (sinks, LSH, linear, ...)", YES, NO, NO, NO, NO),
    _part("positions", "rules that transformers has not (ReRoPE, ALiBi, ...)", YES, NO, NO, NO, NO),
    _part(
        "cache",
        "a packed cache",
        YES,
        NO,
        NO + ": its own formats, by its flags",
        NO + ": its own formats, by its options",
        NO,
    ),
    _part(
        "mla",
        "MLA, of `convert-mla`",
        AS_IS,
        AS_IS,
        NO + ": effattn writes no such file",
        NO + ": effattn writes no such model",
        "as is, which effattn need not export",
    ),
    _part("heads", "latent keys and values", YES, NO, NO, NO, NO),
    _part("projections", "Monarch or low-rank projections", YES, *[DENSE] * 4),
)


def found_in(model: nn.Module) -> dict[str, str]:
    """What of the table is in a model beside plain parts: name -> what it is, in words."""
    said = {
        name: _specs(entry) if name in ("pattern", "positions", "cache", "heads") else _count(entry)
        for name, entry in record.of(model).items()
    }
    if layers := uneven.overrides(model.config):
        said["layers"] = f"layers {', '.join(map(str, layers))}"
    return said


def _specs(entry: dict[str, str]) -> str:
    """Layers by what they have: "sliding(window=4) in layers 0, 1"."""
    by_spec: dict[str, list[str]] = {}
    for index, spec in entry.items():
        by_spec.setdefault(spec, []).append(index)
    return "; ".join(f"{spec} in layers {', '.join(where)}" for spec, where in by_spec.items())


def _count(entry: dict) -> str:
    return f"{len(entry)} matrices"


def lost(model: nn.Module, target: str) -> dict[str, str]:
    """What this target's engine cannot express of a model: name -> what it is, and the engine's
    answer."""
    parts = {part.name: part for part in PARTS}
    return {
        name: f"{said} ({parts[name].said}): {parts[name].runs[target]}"
        for name, said in found_in(model).items()
        if parts[name].lost_in(target)
    }


def table() -> list[list[str]]:
    """The rows of the capability table: the part, and what each engine makes of it."""
    return [[part.said, *(part.runs[target] for target in ENGINES)] for part in PARTS]
