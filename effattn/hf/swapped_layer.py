"""What a swap says of one layer of a live model: its backend, positions and cache."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.hf.anatomy import Rotary
from effattn.hf.positions import LayerPositions
from effattn.interface import Backend
from effattn.states.base import State
from effattn.states.caches import LayerCache
from effattn.states.latent import LatentState


@dataclass
class SwappedLayer:
    """One layer of a swapped model. `backend` None: it keeps what it had, the implementation
    `original`.
    """

    index: int
    original: str
    checks_positions: bool = False  # looks for packed documents, on behalf of other layers
    backend: Backend | None = None
    pattern: str = ""  # the backend's full spec
    raw_keys: bool = False  # the backend's positions are its own: it gets q and k before rotation
    # ... and rotates them by this; None where the model has no rotation
    rotary: Rotary | None = None
    own_window: int | None = None  # the backend does what the model's own windowed layer did
    positions: LayerPositions | None = None  # a position rule instead of the model's own
    cache: LayerCache | None = None  # another cache instead of the backend's own state
    latent: int | None = None  # numbers that are remembered of a token instead of keys and values

    @property
    def own_positions(self) -> bool:
        """Whether the backend counts positions itself, whatever position_ids say."""
        return self.raw_keys or (self.positions is not None and self.positions.in_call is not None)

    @property
    def holds(self) -> str:
        """What a cache of this layer holds, in words: two layers with the same words may take over
        each other's.
        """
        own_raw = self.positions is not None and self.positions.raw and self.rotary is None
        pre_rope = self.rotary is not None and self.backend.farthest is None
        raw = own_raw or pre_rope
        if self.latent is not None:
            return f"{self.pattern}, latents of {self.latent}"
        return f"{self.pattern}, raw keys" if raw else self.pattern

    def new_state(self) -> State:
        """An empty state, for one batch of sequences."""
        return state_of(self.backend, self.cache, self.latent is not None)


def state_of(backend: Backend, cache: LayerCache | None, latent: bool) -> State:
    """An empty state of a layer with these choices."""
    if not latent:
        return backend.new_state() if cache is None else cache.new_state(backend)
    state = LatentState(backend.new_state(), cache)
    state.owner = backend.signature
    return state
