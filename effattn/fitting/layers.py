"""A model run over windows of text one layer at a time, in fp32 at least.

    layers = Layers(model, batches)
    hidden = layers.run(0, layers.embed())       # what layer 0 gives, by batch
    layers.finish(hidden)                        # what the final norm gives, once all have run

Two runs of one model in bfloat16 that only sum in another order differ, by more than most changes
of a cache do. So a layer with weights of 16 bits is run with a copy of them in fp32, which is gone
after it, and hidden states are fp32. What a layer has packed stays packed: of a packed cache a few
tokens at a time read their past, as in decoding; any other gets whole windows, which is the same
and quicker.

B: windows; T: tokens of each; D: hidden size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from effattn.calibration.layerwise import LayerRunner, Stop, instead, passed
from effattn.hf import anatomy, hooks
from effattn.hf.cache import new_cache

PIECE = 16  # tokens at a time through a packed cache


class Layers:
    """model: a causal LM in eval mode, swapped or not. batches: token ids (B, T) int64. piece:
    tokens at a time through packed caches, of which 1 is decoding itself; whole: also through
    those that are not packed."""

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, batches: Sequence[Tensor], piece: int = PIECE, whole: bool = True
    ):
        self.parts, self.batches = anatomy.of(model), list(batches)
        self.piece, self.whole = piece, whole
        with self._wide():
            self.runner = LayerRunner(self.parts, self.batches)

    def __len__(self) -> int:
        return len(self.parts.layers)

    def embed(self) -> list[Tensor]:
        """The inputs of layer 0, (B, T, D) by batch, on the CPU."""
        with self._wide():
            return self.runner.embed()

    @torch.no_grad()
    def run(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What a layer gives for its inputs, both (B, T, D) by batch, on the CPU."""
        block = self.parts.layers[index].block
        with self._wide(block):
            if self.whole and not is_packed(self.parts.layers[index]):
                return [output for _, output in self.runner.run(index, hidden)]
            pairs = zip(self.batches, hidden, strict=True)
            return [self._through_cache(index, ids, states) for ids, states in pairs]

    @torch.no_grad()
    def finish(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the final norm gives for what the last layer gave, (B, T, D) by batch."""
        norm = self.parts.final_norm
        with widened(tensors(norm)):
            return [norm(states.to(self.runner.device)) for states in hidden]

    @contextmanager
    def _wide(self, *blocks: nn.Module) -> Iterator[None]:
        """While open, these blocks and what is outside of all blocks, but for the tables of tokens,
        have their weights in fp32, and so are hidden states."""
        parts = self.parts
        tables = [parts.embeddings, parts.model.get_output_embeddings()]
        within = [layer.block for layer in parts if layer.block not in blocks]
        left = {id(x) for module in [*within, *filter(None, tables)] for x in tensors(module)}
        handle = parts.embeddings.register_forward_hook(lambda _, __, output: wide(output))
        try:
            with widened(x for x in tensors(parts.model) if id(x) not in left):
                yield
        finally:
            handle.remove()

    def _through_cache(self, index: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """What layer `index` gives for `hidden`, which read of the past what its cache has kept; no
        other layer is run."""
        layers, cache, seen = self.parts.layers, new_cache(self.parts.model), []
        own, held = layers[index].block, cache.layers[index]
        # whichever is asked how long the past is
        cache.layers = [held if layer.index == index else _As(held) for layer in layers]

        def enter(_, args, kwargs):
            states = hidden.split(self.piece, dim=1)[len(seen)].to(self.runner.device)
            if args:
                return (states, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": states}

        def leave(_, __, output):
            seen.append((output[0] if isinstance(output, tuple) else output).cpu())
            raise Stop

        def skip(_, *args, **kwargs):
            return passed(args[0] if args else kwargs["hidden_states"])

        handles = [
            own.register_forward_pre_hook(enter, with_kwargs=True),
            own.register_forward_hook(leave),
        ]
        called = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        try:
            with instead((layer.block for layer in layers if layer.block is not own), skip):
                for one in ids.split(self.piece, dim=1):
                    with suppress(Stop):
                        self.parts.model(input_ids=one.to(self.runner.device), **called)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(seen, dim=1)


class _As:
    """Stands in a cache for a layer that is not run, and says what another one says."""

    def __init__(self, other: CacheLayerMixin):
        self._other = other

    def __getattr__(self, name: str):
        return getattr(self._other, name)


def is_packed(layer: anatomy.Layer) -> bool:
    """Whether a layer's cache is packed, so that a whole window would not read it."""
    swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
    return swapped is not None and swapped.cache is not None


HALVES = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """In fp32, if it is of 16 bits."""
    return x.float() if x.dtype in HALVES else x


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def widened(some: Iterable[Tensor]) -> Iterator[None]:
    """While open, these parameters and buffers are in fp32 if they are of 16 bits; afterwards they
    are what they were, where they were."""
    own = [(x, x.data) for x in some if x.dtype in HALVES]
    try:
        for x, data in own:
            x.data = data.float()
        yield
    finally:
        for x, data in own:
            x.data = data
