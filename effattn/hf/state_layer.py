"""A layer of transformers' Cache that holds a backend's own state: a ring, recurrent sums, raw
keys.

transformers' attention modules call `keys, values = cache.update(k, v, index)` and hand both to the
attention function. `StateLayer.update` returns a `Handle` in their place: the new tokens and where
to put them. `effattn.hf.live` gives it to `StateLayer.attend`, where the backend appends them to
its state. `effattn.hf.cache.place` puts the right layers into a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from effattn.errors import Unsupported
from effattn.interface import Backend
from effattn.padding import of_tokens
from effattn.states.base import State
from effattn.states.caches import LayerCache
from effattn.states.full import ROLLBACK


class NotATensor(Unsupported, AttributeError):
    """Something other than effattn's attention function got a `Handle`."""


class Handle:
    """The new keys and values of one call, on their way to the attention function. Everyone else is
    told off.
    """

    def __init__(self, layer: StateLayer, k: Tensor, v: Tensor):
        self.layer, self.k, self.v = layer, k, v

    def __getattr__(self, name: str):
        raise NotATensor(f"{_STRANGER} (it asked for .{name})")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NotATensor(f"{_STRANGER} (it called {getattr(function, '__name__', function)})")


_STRANGER = (
    "cache: this layer was made by effattn.swap for its own attention, and another attention "
    "function reads it; give a model that is not swapped a cache of its own, such as "
    "transformers.DynamicCache()"
)


@dataclass
class _Undo:
    """What brings back tokens that a state has evicted already: the state before them, and how to
    add some again.
    """

    state: State
    again: Callable[[State, int], None]  # appends that many tokens


class StateLayer(CacheLayerMixin):
    """One layer's `State`, in transformers' Cache. `pattern`: the spec of the backend that it
    belongs to, `cache`: the format of what it holds, if it is packed. `given`: made by hand, so
    that the format need not be the swap's.

    `get_seq_length` is the number of tokens seen, held or not, and mask sizes say the same. A state
    takes back up to `ROLLBACK` tokens by itself. When more of a call may be rejected (assisted
    decoding; `candidates`), a copy of the state from before them is kept until the next call."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        index: int,
        pattern: str,
        state: State,
        cache: LayerCache | None = None,
        given: bool = False,
    ):
        self.index, self.pattern, self.state = index, pattern, state
        self.cache, self.given = cache, given
        self.is_initialized = False
        self.record_past = False
        self.dtype = self.device = None
        self.candidates = 0
        self._waiting = False  # between update and attend
        self._leaving = False  # offload was asked for meanwhile
        self._undo: _Undo | None = None

    def __repr__(self) -> str:
        return f"StateLayer({self.words}, {self.get_seq_length()} tokens, {self.nbytes} bytes)"

    @property
    def words(self) -> str:
        """What it holds."""
        return words_of(self.pattern, self.cache)

    @property
    def keys(self) -> Tensor | None:
        """What the state holds, as it lies there (a ring starts anywhere); None where it holds no
        keys.
        """
        return getattr(self.state, "k", None)

    @keys.setter
    def keys(self, new) -> None:
        raise Unsupported(
            f"cache: layer {self.index} ({self.words}) holds its own state, in which keys and "
            "values cannot be cut or replaced; hooks that do so need plain 'dense' layers without "
            "cache=, or effattn.restore(model)"
        )

    @property
    def values(self) -> Tensor | None:
        """The values that the state holds, if it holds any as such."""
        return getattr(self.state, "v", None)

    @values.setter
    def values(self, new) -> None:
        self.keys = new

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self.state.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As transformers asks before the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Handle, Handle]:
        """The new tokens as a handle, twice. They are in the state once the attention function has
        run.
        """
        if self._waiting:
            raise Unsupported(
                f"cache: layer {self.index} ({self.words}) was updated twice without attention in "
                "between; only a model that effattn.swap has changed can use it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._waiting = True
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def take(self, handle: Handle) -> tuple[Tensor, Tensor]:
        """The new tokens of a handle, which has arrived: what is refused from here on leaves the
        layer as it was.
        """
        self._waiting = False
        return handle.k, handle.v

    def attend(
        self, backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call
    ) -> Tensor:
        """`backend` over the past and the new tokens k, v, which the state then holds. mask: (B,
        all tokens) bool.
        """
        # More of the last tokens may be taken back than the state keeps by itself: a copy from
        # before them. Not while training, where nobody takes tokens back, nor in a graph, which
        # could not copy.
        self._undo = None
        if self.device != k.device:
            self._move(k.device)
            self.device = k.device
        last = min(self.candidates, k.shape[2] - 1)
        if (
            last > ROLLBACK
            and self.state.evicts
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        ):
            out = self._attend_in_two(backend, q, k, v, mask, last, call)
        else:
            self.state.candidates = last
            out = backend(q, k, v, padding_mask=mask, state=self.state, **call)
        if self._leaving:
            self._leaving = False
            self._move("cpu")
        return out

    def _attend_in_two(self, backend, q, k, v, mask, last: int, call: dict) -> Tensor:
        """The tokens that stay, a copy of the state, then the `last` ones. By definition the same
        as all at once.
        """
        total = self.state.seq_len + k.shape[2]

        def run(state: State, start: int, stop: int) -> Tensor:
            some = [x[:, :, start:stop] for x in (q, k, v)]
            seen = None if mask is None else mask[:, : total - k.shape[2] + stop]
            extras = of_tokens(call, *[lambda x: x[:, :, start:stop]] * 2)
            return backend(*some, padding_mask=seen, state=state, **extras)

        stay = k.shape[2] - last
        first = run(self.state, 0, stay)
        before = copy.deepcopy(self.state)
        out = torch.cat([first, run(self.state, stay, k.shape[2])], dim=2)
        self._undo = _Undo(before, lambda state, tokens: run(state, stay, stay + tokens))
        return out

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would; nothing is changed."""
        left = int(self.state.seq_len) + tokens_to_remove
        undo = self._undo
        if tokens_to_remove and (
            undo is None or left < undo.state.seq_len or -tokens_to_remove <= ROLLBACK
        ):
            self.state.check_crop(left)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: 0 or a negative number. ValueError for what cannot be brought
        back.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: got {tokens_to_remove}, valid is 0 or minus the number of tokens to take "
                "back"
            )
        if self.is_initialized:
            self.check_crop(tokens_to_remove)
        undo, self._undo = self._undo, None
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        # few tokens back, or none recorded: the state does it; else the copy, and of the tokens
        # after it those that stay once more
        left = self.state.seq_len + tokens_to_remove
        if undo is None or left < undo.state.seq_len or -tokens_to_remove <= ROLLBACK:
            self.state.crop(left)
            return
        self.state = undo.state
        if left > self.state.seq_len:
            with torch.no_grad():
                undo.again(self.state, left - self.state.seq_len)

    def activate_past_recording(self) -> None:
        """From now on, the last tokens of a call may be taken back before the next one."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask for so many new tokens: the whole past."""
        return self.state.seq_len + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, held or not."""
        return self.state.seq_len

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda state: state.reorder(self._index(beam_idx)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        self._change(lambda state: state.repeat(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """`indices`: rows, or a bool mask over them."""
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._change(lambda state: state.select(self._index(indices)))

    def reset(self) -> None:
        self._waiting = False
        self._change(lambda state: state.reset())
        self.is_initialized = False

    def _change(self, what: Callable[[State], None]) -> None:
        self._undo = None
        what(self.state)

    def _index(self, rows: Tensor) -> Tensor:
        return rows if self.keys is None else rows.to(self.keys.device)

    def offload(self) -> None:
        """Moves the state to the CPU; when its new tokens have yet to come, right after that."""
        if self._waiting:
            self._leaving = True
        else:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device) -> None:
        self._undo = None
        self.state.move(device)


class FixedLayer(StateLayer):
    """A `StateLayer` of a static state: transformers is told lengths as tensors; `generate` does
    not compile it.
    """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:
        return query_length, self.state.seq_len

    def get_max_length(self) -> int:
        return self.state.length


def words_of(pattern: str, cache: LayerCache | None) -> str:
    """What a layer with this pattern and cache holds."""
    return pattern if cache is None else f"{pattern}, {cache.spec}"
