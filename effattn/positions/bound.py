"""Position rules bound to a model's rotation: what `rotary=` of a backend's call takes.

`effattn.positions.rule` makes one by hand, `effattn.swap(positions=...)` one for each layer. A
backend calls `place` with raw queries and keys, and gets what its kernels take.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries and keys; D: size of a head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.kernels.decode.turn import Turn
from effattn.kernels.flash.rules import Bias, Far
from effattn.positions.base import Added, Part, Rotation, Trained, spec_of
from effattn.positions.logn import LogN
from effattn.positions.rerope import Far as Clipped
from effattn.positions.rope import OwnRope, Rope
from effattn.positions.xpos import XPos


@dataclass(frozen=True, eq=False)
class Placed:
    """Queries and keys where a rule puts them, and what the kernels are to do beside: `far`, what
    distant pairs score with instead; `turn`, with which keys are as they came (raw) and turned as
    they are read; `bias`, what is added to scores."""

    q: Tensor
    k: Tensor
    far: Far | None = None
    turn: Turn | None = None
    bias: Bias | None = None


class Positions(nn.Module):
    """A position rule of one layer. Its parts are `rotation`, `far`, `scale` and `bias`, None for
    what it leaves alone.

    A bias without a rotation beside it replaces the rotation; "rope+alibi" has both. `learned`: the
    parameter of a bias that is learned (kerple, t5), (heads, n) float32. `rotates`: whether q and k
    come raw; set it to False where they have been turned by `rope()` already, and only the rest is
    to be done."""

    def __init__(self, parts: tuple[Part, ...], trained: Trained):
        """parts: of `parse`. trained: what the model was trained with. Raises ValueError or
        Unsupported for what this model cannot have."""
        super().__init__()
        slots = {part.slot: part for part in parts}
        self.far: Clipped | None = slots.get("far")
        self.scale: LogN | None = slots.get("scale")
        self.bias: Added | None = slots.get("bias")
        self.rotation: Rotation | None = slots.get("rotation")
        if self.rotation is None and self.bias is None and trained.dims:
            self.rotation = OwnRope()
        for part in parts:
            part.check(trained)
        self.parts, self.trained = parts, trained
        learned = None if self.bias is None else self.bias.new_parameters(trained)
        self.learned = None if learned is None else nn.Parameter(learned)
        self.rotates = True
        self.heads: tuple[int, ...] | None = None  # those of the biases that are meant; None: all
        # what does not change from call to call
        self._kept: dict[str, tuple[tuple, Rope | Bias]] = {}

    def extra_repr(self) -> str:
        return self.spec

    def of_heads(self, heads: Sequence[int]) -> Positions:
        """The same rule, and parameters, for some of the query heads."""
        some = copy.copy(self)
        some.heads = tuple(heads)
        return some

    @property
    def spec(self) -> str:
        """What `effattn.positions.parse` makes the same parts of."""
        return spec_of(self.parts)

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned at all."""
        return self.rotation is not None and self.rotation.turns

    @property
    def raw_keys(self) -> bool:
        """Whether what a query sees of an old key changes as the sequence grows, so that keys are
        stored raw.
        """
        return self.turns and (
            self.far is not None or self.rotation.varies or isinstance(self.rotation, XPos)
        )

    @property
    def scores(self) -> bool:
        """Whether it decides scores pair by pair, which the kernels of exact patterns can do."""
        return self.far is not None or self.bias is not None

    @property
    def only_turns(self) -> bool:
        """Whether cos and sin are all there is to it."""
        return not (self.raw_keys or self.scores or self.scale is not None)

    @property
    def causal_only(self) -> bool:
        """Whether some part is defined for causal attention alone."""
        return any(part.causal_only for part in self.parts)

    def rope(
        self, length: int | Tensor | None = None, device: torch.device | None = None
    ) -> Rope | None:
        """The rotation at this length (tokens of the sequence, or of every row (B,)); None without
        one.
        """
        return self._rope(length, device) if self.turns else None

    def _rope(self, length: int | Tensor | None, device: torch.device | None) -> Rope:
        def make():
            inv_freq, scaling = self.rotation.frequencies(self.trained, length)
            return Rope(  # a copy at each step, where it varies, that the host does not wait for
                inv_freq if device is None else inv_freq.to(device, non_blocking=True),
                scaling,
                None,
                self.trained.interleaved,
            )

        return make() if self.rotation.varies else self._keep("rope", (device,), make)

    def _keep(self, what: str, key: tuple, make: Callable[[], Rope | Bias]) -> Rope | Bias:
        """What `make` gave last for this key."""
        if self._kept.get(what, (None,))[0] != key:
            self._kept[what] = (key, make())
        return self._kept[what][1]

    def forward(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q (B, Hq, Tq, D) and k (B, Hkv, Tk, D) as pairs below the window see each other.
        Positions (T,) or (B, T).
        """
        length = k.shape[2]
        # the others ask for none, and an int is one that the host waits for
        if self.turns and (self.rotation.varies or isinstance(self.rotation, XPos)):
            length = k_positions.amax(dim=-1) + 1
            length = length if length.ndim else int(length)
        placed = self.place(q, k, q_positions, k_positions, length, k.shape[2])
        return placed.q, placed.k

    def place(
        self,
        q: Tensor,
        k: Tensor,
        at_q: Tensor,
        at_k: Tensor | None,
        length: int | Tensor,
        tokens: int,
        few: bool = False,
    ) -> Placed:
        """q (B, Hq, Tq, D) and k (B, Hkv, Tk, D) at positions (T,) or (B, T) of sequences of
        `length` tokens, an int or (B,), `tokens` at most with padding. few: keys stay as they are,
        for a kernel that turns them itself, where `turnable` says so; `at_k` is not needed then."""
        bias = None if self.bias is None else self._bias(tokens, q.device)
        if bias is not None and self.heads is not None and len(bias.params) > 1:
            bias = Bias(bias.kind, bias.params[list(self.heads)])
        if not (self.rotates and self.turns):
            return Placed(self._scaled(q, at_q), k, bias=bias)
        rope = self._rope(length, q.device)
        near_q, far_q = self._queries(q, at_q, rope)
        if few and self.turnable(one_length=not isinstance(length, Tensor)):
            clipped = (
                {}
                if self.far is None
                else {"window": self.far.window, "slow": self.far.slow, "q_far": far_q}
            )
            turn = Turn(rope.inv_freq, rope.interleaved, rope.attention_scaling, **clipped)
            return Placed(near_q, k, turn=turn, bias=bias)
        # xPOS fades queries and keys from a centre on, in opposite directions: the products depend
        # on the distance alone, and neither side overflows. In a decoding step the query is the
        # centre.
        near_k, far = rope.turn(k, at_k), None
        if isinstance(self.rotation, XPos):
            centre = (
                at_q[..., :1]
                if few
                else (length.double()[:, None] if isinstance(length, Tensor) else length) / 2
            )
            near_q = self.rotation.fade(near_q, at_q, centre, self.trained, keys=False)
            near_k = self.rotation.fade(near_k, at_k, centre, self.trained, keys=True)
        if self.far is not None:
            far = Far(far_q, rope.turn(k, self.far.key_positions(at_k)), self.far.window)
        return Placed(near_q, near_k, far, bias=bias)

    def turnable(self, one_length: bool) -> bool:
        """Whether kernels can turn raw keys themselves: not where rows have frequencies of their
        own, and not xPOS.
        """
        if not (self.rotates and self.turns):
            return True
        return not isinstance(self.rotation, XPos) and (one_length or not self.rotation.varies)

    def _queries(self, q: Tensor, at_q: Tensor, rope: Rope) -> tuple[Tensor, Tensor | None]:
        """q as near keys see it and as far ones do, turned and scaled."""
        if self.far is None:
            return self._scaled(rope.turn(q, at_q), at_q), None
        # both in one call: two small launches less in a step
        where = torch.cat([at_q, self.far.query_positions(at_q)], dim=-1)
        both = self._scaled(
            rope.turn(torch.cat([q, q], dim=2), where), torch.cat([at_q, at_q], dim=-1)
        )
        return both.split(q.shape[2], dim=2)

    def _scaled(self, q: Tensor, at_q: Tensor) -> Tensor:
        if self.scale is None:
            return q
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        factors = self.scale.factors(at_q, self.trained).to(dtype)[..., None]
        return (q.to(dtype) * (factors[:, None] if factors.ndim == 3 else factors)).to(q.dtype)

    def _bias(self, tokens: int, device: torch.device) -> Bias:
        def make():
            learned = self.learned
            if learned is not None:  # distances have more digits than bfloat16
                learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
            bias = self.bias.bias(self.trained, tokens, learned)
            return bias if bias.params.device == device else Bias(bias.kind, bias.params.to(device))

        tokens = 1 << (tokens - 1).bit_length()  # the same for many steps
        return make() if self.learned is not None else self._keep("bias", (tokens, device), make)


def turn_of(rotary: Callable | None, device: torch.device | None = None) -> Turn | None:
    """How a kernel on `device` that turns raw keys as it reads them does the same; None where
    nothing turns. Unsupported for rules that are more than an angle a position."""
    if isinstance(rotary, Positions) and not (rotary.raw_keys or rotary.scores):
        rotary = rotary.rope(device=device)
    if rotary is None:
        return None
    if not isinstance(rotary, Rope):
        raise Unsupported(
            f"rotary: got {type(rotary).__name__}, by which packed keys cannot be turned as they "
            "are read; valid are Rope and position rules that turn by fixed angles"
        )
    return Turn(rotary.inv_freq, rotary.interleaved, rotary.attention_scaling)
