"""What of a result runs in which engine: the one table that exports refuse by, that their reports
show, and that the documentation has.

    lost(model, "gguf")        # ["topk(window=8) in layers 0, 1 (`topk`: the keys ...): no"]"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from effattn.hf import uneven
from effattn.surgery import record
from effattn.surgery.swapping import restore, swap

AS_IS, ZEROS, NO, YES = "as is", "dense, with zeros", "no", "yes"
EFFATTN = "effattn"  # transformers after `import effattn`; no export, but what effattn.save writes
BY_LAYER = ("pattern", "positions", "cache", "heads")  # layer -> spec, in a record
# target of an export -> the engine that reads it
ENGINES = {
    EFFATTN: "after `import effattn`",
    "transformers": "transformers",
    "gguf": "llama.cpp",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
}
# what people ask for and is not here -> why, and what to take
NOT_HERE = {
    "onnx": "an ONNX graph is handed the whole cache at every step and hands it back, an OpenVINO "
    "model keeps it; of transformers' exporters effattn takes that one: to='openvino'",
}


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a model, and what each engine makes of it.

    name: in a checkpoint's record. said: in words. runs: target -> what its engine does with it;
    NO, with a reason behind it or not: it cannot. members: of the axis of that name, those that
    this is said of; empty: all of which nothing else is said."""

    name: str
    said: str
    runs: dict[str, str]
    members: tuple[str, ...] = ()

    def lost_in(self, target: str) -> bool:
        """Whether this target's engine would compute something else."""
        return self.runs[target].startswith(NO)


def _part(name: str, said: str, *runs: str, of: tuple[str, ...] = ()) -> Part:
    return Part(name, said, dict(zip(ENGINES, runs, strict=True)), of)


PAGES = "as a full cache, which has the same bits"
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
    _part("pattern", "`topk`: the keys that suit a query best", YES, *[NO] * 4, of=("topk",)),
    _part("pattern", "`gated`: linear attention that forgets", YES, *[NO] * 4, of=("gated",)),
    _part("pattern", "`hybrid`: a window, and sums beyond it", YES, *[NO] * 4, of=("hybrid",)),
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
    _part("cache", "`paged`: pages that rows share", YES, *[PAGES] * 4, of=("paged",)),
    _part(
        "cache",
        "`evict`: the tokens that matter most",
        YES,
        NO,
        NO,
        NO + ": its own rule, by options of OpenVINO GenAI",
        NO,
        of=("evict",),
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


def parts_of(model: nn.Module) -> Iterator[tuple[Part, str]]:
    """What of the table is in a model beside plain parts, and where, in words."""
    for name, entry in record.of(model).items():
        if name in BY_LAYER:
            by_part: dict[Part, dict[str, str]] = {}
            for index, spec in entry.items():
                by_part.setdefault(_of(name, spec), {})[index] = spec
            yield from ((part, _specs(own)) for part, own in by_part.items())
        else:
            yield _of(name), f"{len(entry)} matrices"
    if layers := uneven.overrides(model.config):
        yield _of("layers"), f"layers {', '.join(map(str, layers))}"


def _of(name: str, spec: str = "") -> Part:
    """The row of a spec's own, where it has one, or that of all others of its axis."""
    member = spec.partition("(")[0]
    rows = [part for part in PARTS if part.name == name]
    return next((part for part in rows if member in part.members), rows[-1])


def _specs(entry: dict[str, str]) -> str:
    """Layers by what they have: "sliding(window=4) in layers 0, 1"."""
    by_spec: dict[str, list[str]] = {}
    for index, spec in entry.items():
        by_spec.setdefault(spec, []).append(index)
    return "; ".join(f"{spec} in layers {', '.join(where)}" for spec, where in by_spec.items())


def lost(model: nn.Module, target: str) -> list[str]:
    """What this target's engine cannot express of a model: what it is, and the engine's answer."""
    return [
        f"{said} ({part.said}): {part.runs[target]}"
        for part, said in parts_of(model)
        if part.lost_in(target)
    ]


def unpaged(model: nn.Module) -> list[str]:
    """Takes pages off a model: its own cache has the same bits, and so has the engine's. What was
    done, in words."""
    pages = [part for part in PARTS if part.name == "cache" and PAGES in part.runs.values()]
    paged = {
        index: "full"
        for index, spec in record.of(model).get("cache", {}).items()
        if _of("cache", spec) in pages
    }
    if not paged:
        return []
    swap(model, cache=paged)
    if not record.of(model):
        restore(model)
    return [f"pages in {len(paged)} layers are {PAGES}"]


def table() -> list[list[str]]:
    """The rows of the capability table: the part, and what each engine makes of it."""
    return [[part.said, *(part.runs[target] for target in ENGINES)] for part in PARTS]
