"""What becomes of each layer: the new backend, with every n-th layer kept exact, and how many bytes
that remembers.
"""

from __future__ import annotations

from torch import Tensor, nn

from effattn import registry
from effattn.encoding import begun
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.beginning import bos_of
from effattn.interface import Shape
from effattn.linearizing.decay import fit_decays
from effattn.linearizing.inputs import projections_of
from effattn.specs import parse_layers, parse_spec
from effattn.surgery.swapping import restore, swap
from effattn.swapping.patterns import Pattern, parse_pattern
from effattn.swapping.spans import learn_windows
from effattn.training import lending as training

WINDOWS, LENGTH = 4, 512  # of the text that decays and codebooks are fitted on
CALIBRATION = 50_000  # tokens that projections are fitted on


def layer_specs(
    parts: hf.Anatomy, pattern: Pattern | None, keep_every: int, keep: str
) -> dict[int, str]:
    """layer -> spec; the last of every `keep_every` layers (0: none) is `keep`. ValueError for bad
    ones.
    """
    if pattern is None:
        return {}
    pattern, layers = parse_pattern(pattern), len(parts.layers)
    specs = (
        parse_layers(pattern, layers)
        if isinstance(pattern, dict)
        else dict.fromkeys(range(layers), pattern)
    )
    if keep_every:
        keep = parse_pattern(keep)
        specs |= {index: keep for index in range(keep_every - 1, layers, keep_every)}
    return dict(sorted(specs.items()))


def check_keep(keep_every: int, keep: str) -> None:
    """ValueError unless there are kept layers, of a pattern that has windows by head."""
    if not keep_every:
        raise ValueError(
            "learn_windows: got a penalty, and keep_every=0 keeps no layer that could learn "
            "windows; valid is keep_every of at least 1"
        )
    if parse_spec(keep)[0] != "sliding":
        raise ValueError(
            f"learn_windows: got a penalty and keep={keep!r}, which has no windows by head; valid "
            "is a sliding(...)"
        )


def learned(
    model: nn.Module, specs: dict[int, str], keep_every: int, keep: str, penalty: float, tokens
) -> dict[int, str]:
    """`specs`, in which the kept layers of `model`, not swapped yet, have windows by head that were
    learned on tokens (N,) int64, with the sinks of `keep` (`effattn.learn_windows`)."""
    kept = range(keep_every - 1, len(hf.of(model).layers), keep_every)
    found = learn_windows(
        model,
        tokens,
        penalty=penalty,
        sinks=parse_spec(keep)[1].get("sinks", 0),
        length=min(LENGTH, len(tokens)),
        layers=kept,
    )
    return specs | {index: found[str(index)] for index in kept}


def approximate(specs: dict[int, str]) -> list[int]:
    """The layers whose backend is no exact attention: those that have something to learn."""
    return [
        i for i, spec in specs.items() if not registry.backends()[parse_spec(spec)[0]].traits.exact
    ]


def apply(
    model: nn.Module,
    specs: dict[int, str],
    projections: str | None,
    tokens: Tensor,
    *,
    fit_decay: bool,
) -> dict[int, str]:
    """Swaps `model` in place; returns the specs with what was fitted on tokens (N,) int64: decays,
    codebooks.
    """
    sample = tokens[: min(len(tokens), WINDOWS * LENGTH)]
    sample = (
        sample.view(1, -1)
        if len(sample) < LENGTH
        else sample[: len(sample) // LENGTH * LENGTH].view(-1, LENGTH)
    )
    sample = begun(sample, bos_of(model))
    learns = [
        i
        for i, spec in specs.items()
        if hasattr(registry.backends()[parse_spec(spec)[0]], "calibrate")
    ]
    seen = projections_of(model, sample, learns) if learns else {}
    if fit_decay:
        specs = fit_decays(model, specs, sample)
    if projections is not None:
        swap(model, projections=projections, calibration=tokens[:CALIBRATION])
    if specs:
        swap(model, {str(index): spec for index, spec in specs.items()})
    for index, (_, k, _) in seen.items():
        getattr(hf.of(model).layers[index].attention, hooks.ATTRIBUTE).backend.calibrate(k)
    return specs


def check_trains(model: nn.Module, specs: dict[int, str]) -> None:
    """Unsupported when attention swapped as `specs` cannot be trained in this model, as with
    attention dropout, before anything is fitted or measured. The model is as before afterwards."""
    swap(model, {str(index): spec for index, spec in specs.items()})
    try:
        training.rehearse(model)
    finally:
        restore(model)


def learning_layers(model: nn.Module, specs: dict[int, str], projections: str | None) -> list[int]:
    """The layers that transfer trains."""
    return list(range(len(hf.of(model).layers))) if projections is not None else approximate(specs)


def state_bytes(model: nn.Module, contexts: tuple[int, ...]) -> list[dict]:
    """Bytes that one sequence's decode states take at each context, and that the plain K/V cache
    would.
    """
    rows = []
    for context in contexts:
        ours = plain = 0
        for layer in hf.of(model):
            size = layer.k.like.element_size()
            shape = Shape(
                1,
                layer.heads,
                layer.kv_heads,
                context,
                context,
                layer.head_dim,
                layer.value_dim,
                size,
            )
            held = getattr(layer.attention, hooks.ATTRIBUTE, None)
            own = registry.backend("dense").cost(shape).state_bytes
            plain += own
            ours += (
                own
                if held is None or held.backend is None
                else held.backend.cost(shape).state_bytes
            )
        rows.append({"context": context, "plain": plain, "ours": ours})
    return rows
