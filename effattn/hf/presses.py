"""Scores of kvpress as a policy of ours: `swap(model, cache=effattn.kvpress(press))`.

    press = kvpress.SnapKVPress(compression_ratio=0.5)
    effattn.swap(model, cache=effattn.kvpress(press))

kvpress itself is not imported: a press is anything that has `compression_ratio` and kvpress'
`score(module, hidden_states, keys, values, attentions, kwargs)`.

B: rows; H: key/value heads; M: tokens of a prompt; D: of a key; E: of a hidden state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf.placement import bare
from effattn.states.evict import Evict
from effattn.states.policies import Policy, Seen

WHOLE = "prompts in one piece, in an empty cache, without padding"


class ScorerPress(Protocol):
    """What is asked of a press."""

    compression_ratio: float

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict,
    ) -> Tensor:
        """(B, H, M): the tokens with the highest stay."""
        ...


class Asked(NamedTuple):
    """What an attention module was called with: hidden_states (B, T, E), and the other
    arguments."""

    module: nn.Module
    hidden_states: Tensor
    kwargs: dict


@dataclass(frozen=True, eq=False)  # a press may have no hash
class Press(Policy):
    """The scores of a press."""

    press: ScorerPress
    name: ClassVar[str] = "kvpress"
    asks: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        if seen.context is None:
            raise Unsupported("kvpress: a press asks a live model; valid is swap(model, cache=...)")
        module, hidden, kwargs = seen.context
        tokens = seen.k.shape[2]
        if hidden.shape[1] < tokens or not bool(seen.real.all()):
            raise Unsupported(f"kvpress: presses score {WHOLE}; valid are other policies of evict")
        twin = bare(module)
        if "rotary_emb" not in twin._modules and kwargs.get("rotary_emb") is not None:
            twin._modules["rotary_emb"] = kwargs["rotary_emb"]
        given = {name: value for name, value in kwargs.items() if name != "rotary_emb"}
        if given.get("position_embeddings") is not None:  # not of tokens that may be taken back
            given["position_embeddings"] = tuple(
                x[:, :tokens] for x in given["position_embeddings"]
            )
        with torch.no_grad():
            found = self.press.score(twin, hidden[:, :tokens], seen.k, seen.v, None, given)
        if not isinstance(found, Tensor) or found.shape != seen.real.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"kvpress: score: got {got}, valid is {tuple(seen.real.shape)}")
        return found


def kvpress(
    press: ScorerPress,
    *,
    sinks: int = 0,
    recent: int = 0,
    adaptive: bool = False,
    floor: float = 0.2,
    format: str | None = None,
) -> Evict:
    """A cache for `swap(cache=...)` that keeps, after a prompt, the tokens that `press` would: of
    each K/V head the share 1 - compression_ratio with the highest scores, in real bytes.

    press: a kvpress `ScorerPress`. The others as in "evict(...)"; kvpress itself keeps no sinks or
    recent tokens beside the scores. Such a swap cannot be saved: a press is an object. ValueError
    for what is no press, Unsupported (at the prompt) for anything but whole prompts without
    padding. Source: https://github.com/NVIDIA/kvpress."""
    kind, ratio = type(press).__name__, getattr(press, "compression_ratio", None)
    if not callable(getattr(press, "score", None)) or isinstance(press, type):
        got = press.__name__ if isinstance(press, type) else kind
        raise ValueError(f"kvpress: press: got {got}, valid is a ScorerPress, such as KnormPress()")
    if not isinstance(ratio, (int, float)) or not (math.isfinite(ratio) and 0 < ratio < 1):
        raise ValueError(
            f"kvpress: compression_ratio of {kind}: got {ratio!r}, valid is a share above 0 and "
            "below 1"
        )
    ratio = float(ratio)  # numpy's float64 is a float too
    made = Evict(
        f"kvpress({kind}, compression_ratio={ratio!r})",
        Press(press),
        keep=1 - ratio,
        sinks=sinks,
        recent=recent,
        every=None,
        adaptive=adaptive,
        floor=floor,
        format=format,
    )
    made.check()
    return made


def ask(state: Any, module: nn.Module, args: tuple, kwargs: dict, rotary: Any) -> None:
    """Tells a state whose policy asks for it what its attention module is called with. rotary: the
    layer's, or None."""
    hidden = args[0] if args else kwargs["hidden_states"]
    given = kwargs | {"rotary_emb": None if rotary is None else rotary.module}
    state.context = Asked(module, hidden, given)
