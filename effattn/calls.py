"""What a call of a backend asks, beside q, k and v.

B: rows; Hq: query heads; Tq, Tk: queries and keys; D: of a head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effattn.kernels.decode.turn import Turn
from effattn.kernels.flash.dropout import Dropout
from effattn.kernels.flash.pattern import Layout
from effattn.kernels.flash.rules import Bias, Far
from effattn.kernels.latent import Latent
from effattn.sinks import Sinks
from effattn.states.base import State


@dataclass(eq=False)  # nobody writes to it; `frozen` would cost 6 µs a call to make
class Call:
    """What a call says beside q, k and v, checked.

    causal, scale (a number), softcap (a number), sink_logits (Hq,), global_qkv, global_mask (B,
    Tk), latent: as in `Backend.forward`. layout: where the keys lie. q_first (B, Hq, Tq, D): the
    queries as the first keys (sinks) see them, None when those see them as all others do. A
    position rule's: `far`, what distant pairs use instead of q and k; `turn`, with which k is raw,
    and turned when it is read; `bias`, what is added to scores. state: where the method has to read
    more than k and v (`State.read_by_method`); with it padding_mask (B, tokens so far) bool,
    padding on the left. prefix (B, Tk) bool. dropout: the rate of weights that are 0, and `drop`
    which ones. sinks: what is scored apart."""

    causal: bool
    layout: Layout
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    q_first: Tensor | None = None
    far: Far | None = None
    turn: Turn | None = None
    bias: Bias | None = None
    global_qkv: tuple[Tensor, ...] | None = None
    global_mask: Tensor | None = None
    latent: Latent | None = None
    state: State | None = None
    padding_mask: Tensor | None = None
    dropout: float = 0.0
    drop: Dropout | None = None
    prefix: Tensor | None = None
    sinks: Sinks | None = None
