"""What every attention backend is: one call, checked in one place.

    attn = effattn.backend("dense")
    y = attn(q, k, v, causal=True)                       # whole sequences
    state = attn.new_state()
    y = attn(q, k, v, state=state)                       # the same call prefills, continues and decodes

A backend subclasses `Backend`, sets `traits` and `implementations`, and writes `attend` and `cost`.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv). Queries are the LAST Tq of the Tk positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported, check_choice

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Traits:
    """What a backend is. `exact`: equals softmax attention over the keys it may see; `state`: what it remembers."""

    exact: bool
    causal: bool
    bidirectional: bool
    learned: bool
    state: str


@dataclass(frozen=True)
class Shape:
    """The sizes of one call, as `cost` needs them. `itemsize` is bytes per element; `value_dim` defaults to D."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int = 0
    itemsize: int = 2
    causal: bool = True

    def __post_init__(self):
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.batch * self.kv_heads * self.keys * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def query_bytes(self) -> int:
        return self.batch * self.heads * self.queries * self.head_dim * self.itemsize

    @property
    def output_bytes(self) -> int:
        return self.batch * self.heads * self.queries * self.value_dim * self.itemsize


@dataclass(frozen=True)
class Cost:
    """The fewest a call must do: operations (a multiply-add is 2), bytes moved, and bytes remembered afterwards."""

    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def intensity(self) -> float:
        """FLOP per byte moved; infinite when nothing moves."""
        moved = self.read_bytes + self.write_bytes
        return self.flops / moved if moved else math.inf


class State:
    """What a backend remembers of one batch of sequences. Sizes in tokens; `index` tensors are int64 over the batch."""

    @property
    def seq_len(self) -> int:
        """Tokens seen, whether or not they are still held."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new keys (B, Hkv, T, D) and values (B, Hkv, T, Dv); returns those to attend over."""
        raise NotImplementedError

    def reorder(self, index: Tensor) -> None:
        """Row i becomes the old row index[i] (beam search): index has the batch's length."""
        raise NotImplementedError

    def select(self, index: Tensor) -> None:
        """Keeps the rows of `index`."""
        raise NotImplementedError

    def repeat(self, n: int) -> None:
        """Each row n times, next to each other."""
        raise NotImplementedError

    def crop(self, n: int) -> None:
        """Keeps the first n tokens. ValueError unless 0 <= n <= seq_len."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets everything."""
        raise NotImplementedError


class FullState(State):
    """Every key and value, as they came."""

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def seq_len(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values, (B, Hkv, seq_len, D) and (B, Hkv, seq_len, Dv)."""
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        for which, old, new in (("k", self.k, k), ("v", self.v, v)):
            if (old.shape[:2], old.shape[3], old.dtype) != (new.shape[:2], new.shape[3], new.dtype):
                raise ValueError(
                    f"{which}: the state holds {tuple(old.shape)} {old.dtype}, got new tokens "
                    f"{tuple(new.shape)} {new.dtype}; only the number of tokens may differ"
                )
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v

    def reorder(self, index: Tensor) -> None:
        if self.k is not None and len(index) != self.k.shape[0]:
            raise ValueError(f"index: expected {self.k.shape[0]} rows, got {len(index)}; select() changes the batch")
        self.select(index)

    def select(self, index: Tensor) -> None:
        if self.k is not None:
            self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)

    def repeat(self, n: int) -> None:
        if self.k is not None:
            self.k, self.v = self.k.repeat_interleave(n, dim=0), self.v.repeat_interleave(n, dim=0)

    def crop(self, n: int) -> None:
        if not 0 <= n <= self.seq_len:
            raise ValueError(f"crop: got {n}, the state holds {self.seq_len} tokens; valid is 0 to {self.seq_len}")
        if n == 0:
            self.reset()
        elif n < self.seq_len:
            self.k, self.v = self.k[:, :, :n].contiguous(), self.v[:, :, :n].contiguous()

    def reset(self) -> None:
        self.k = self.v = None


class Backend(nn.Module):
    """Base class: checks the arguments, keeps the state, rotates, then calls the subclass's `attend`."""

    name: ClassVar[str]  # set by `registry.register`
    traits: ClassVar[Traits]
    implementations: ClassVar[tuple[str, ...]] = ("auto", "torch", "reference")
    plain: ClassVar[bool] = False  # the same function as the attention that plain transformers runs

    def __init__(self, impl: str = "auto"):
        """`impl`: "auto" chooses, and `chosen_impl` says what; any other one runs or raises."""
        super().__init__()
        check_choice("impl", impl, IMPLEMENTATIONS)
        if impl not in self.implementations:
            available = ", ".join(self.implementations)
            raise NotImplementedError(
                f"no {impl.capitalize()} kernel for {self.name} in this version; available: {available}"
            )
        self.impl = impl
        self.chosen_impl: str | None = None if impl == "auto" else impl

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, padding_mask: Tensor | None, scale: float
    ) -> Tensor:
        """The method itself, on checked arguments: all keys and values, rotated. Returns (B, Hq, Tq, Dv)."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        """The fewest operations and bytes that a call of this shape needs."""
        raise NotImplementedError

    def new_state(self) -> State:
        """An empty state, for one batch of sequences."""
        return FullState()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        padding_mask: Tensor | None = None,
        state: State | None = None,
        scale: float | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attention of q over k and v, (B, Hq, Tq, Dv) in q's dtype. A query that may see no key gives 0.

        padding_mask: (B, Tk) bool, True = a real token, on either side. With a `state`, k and v are the NEW tokens,
        Tk counts the past too, and the state then holds both. scale: default D^-0.5.

        rotary: q and k are raw, and `rotary(q, k, q_positions, k_positions)` returns them rotated, in the same shapes.
        Positions are int64, (Tq,) and (Tk,), or (B, Tq) and (B, Tk) with a padding mask: real tokens count from 0.
        The state then holds raw keys, which are rotated when they are read.

        Raises ValueError for shapes, dtypes or devices that do not fit together, Unsupported for what the backend's
        traits exclude; nothing is appended to the state then.
        """
        self._check(q, k, v, causal, padding_mask, state, scale, rotary)
        if state is not None:
            k, v = state.append(k, v)
        if rotary is not None:
            q, k = self._rotate(rotary, q, k, padding_mask)
        return self.attend(q, k, v, causal, padding_mask, q.shape[-1] ** -0.5 if scale is None else float(scale))

    def _rotate(self, rotary: Rotary, q: Tensor, k: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if padding_mask is None:
            positions = torch.arange(k.shape[2], device=k.device)
        else:
            positions = (padding_mask.cumsum(dim=1) - 1).clamp(min=0)
        rotated = rotary(q, k, positions[..., -q.shape[2] :], positions)
        for before, after, which in zip((q, k), rotated, "qk", strict=True):
            if after.shape != before.shape:
                raise ValueError(f"rotary: returned {which} {tuple(after.shape)}, expected {tuple(before.shape)}")
        return rotated

    def _check(self, q, k, v, causal, padding_mask, state, scale, rotary) -> None:
        if causal and not self.traits.causal:
            raise Unsupported(f"{self.name}: causal=True is not possible with this method; valid is causal=False")
        if not causal and not self.traits.bidirectional:
            raise Unsupported(f"{self.name}: causal=False is not possible with this method; valid is causal=True")
        tensors = {"q": q, "k": k, "v": v}
        for which, x in tensors.items():
            if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape[1:]:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{which}: expected (batch, heads, tokens, head_dim), all of them >= 1, got {got}")
        if not q.is_floating_point() or len({x.dtype for x in tensors.values()}) > 1:
            raise ValueError(f"q, k, v: expected one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        if len({x.device for x in tensors.values()}) > 1:
            raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
        batch, heads, queries, dim = q.shape
        kv_heads, new = k.shape[1:3]
        if k.shape != (batch, kv_heads, new, dim):
            raise ValueError(f"k: expected ({batch}, kv_heads, keys, {dim}) to fit q, got {tuple(k.shape)}")
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v: expected ({batch}, {kv_heads}, {new}, value_dim) to fit k, got {tuple(v.shape)}")
        if heads % kv_heads:
            raise ValueError(f"q: expected a multiple of k's {kv_heads} heads, got {heads} heads")
        if state is not None and not isinstance(state, State):
            raise ValueError(f"state: expected one from {self.name}'s new_state(), got {type(state).__name__}")
        total = new + (0 if state is None else state.seq_len)
        if total < queries:
            raise ValueError(f"k: expected at least q's {queries} tokens, got {total} (queries are the last keys)")
        if padding_mask is not None:
            if padding_mask.shape != (batch, total):
                with_past = f" ({total - new} in the state + {new} new)" if state is not None else ""
                raise ValueError(
                    f"padding_mask: expected ({batch}, {total}){with_past}, got {tuple(padding_mask.shape)}"
                )
            if padding_mask.dtype != torch.bool or padding_mask.device != q.device:
                got = f"{padding_mask.dtype} on {padding_mask.device}"
                raise ValueError(f"padding_mask: expected torch.bool on {q.device}, got {got}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        if rotary is not None and not callable(rotary):
            raise ValueError(f"rotary: expected a callable rule, got {type(rotary).__name__}")
