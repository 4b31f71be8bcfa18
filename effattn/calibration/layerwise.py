"""Runs a model one decoder layer at a time over a calibration set.

A method that works layer by layer needs the inputs of one layer at a time: the hidden states of the
whole set are kept at the layer boundary (N x hidden, in the model's dtype, on the CPU), and only
one layer's statistics exist at any moment. The layer's other arguments (rotary embeddings, mask)
are recorded from the model's own forward, so nothing here knows an architecture.

A layer is run no further than asked, and what its heads gave may be kept, so that what follows
them is computed again (its weights have changed) and attention is not.

N: tokens of the set, in rows of `length`, `batch` of them at a time; D: hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn

from effattn.encoding import begun
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.placement import input_device

MOST_NUMBERS = 2**25  # of an FFN's inner activations in a batch: 2,048 tokens of width 16,384


class Stop(Exception):
    """Ends a forward pass of the model where the rest of it is not needed."""


@contextmanager
def instead(blocks: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """While open, `forward(block, ...)` is what these decoder layers do."""
    blocks = list(blocks)
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(forward, block)
        yield
    finally:
        for block, old in zip(blocks, own, strict=True):
            del block.forward
            if old is not None:
                block.forward = old


def passed(hidden: torch.Tensor) -> torch.Tensor:
    """What a decoder layer that does nothing returns of its input, so that the next gets it:
    whether a model takes the output itself or its [0], only what comes after sees."""
    return hidden if hidden.dim() > 3 else hidden[None]


def windows(
    tokens: torch.Tensor, length: int, batch: int, bos: int | None = None
) -> list[torch.Tensor]:
    """Cuts tokens (N,) into batches of windows (batch, length), the rest dropped; N >= length. bos:
    the token that takes the place of each one's first."""
    count = len(tokens) // length
    rows = tokens[: count * length].view(count, length)
    return list(begun(rows, bos).split(batch))


def tokens_at_once(anatomy: Anatomy, most: int) -> int:
    """How many tokens of a calibration set are run together: `most`, or fewer where FFNs are so
    wide that their activations, and not the layer's weights, would take the memory."""
    width = getattr(anatomy.config, anatomy.layers[0].family.ffn_size, None)
    return min(most, MOST_NUMBERS // width) if width else most


class LayerRunner:
    """The calibration set of token batches, seen layer by layer.

    runner.embed() -> the first layer's inputs; runner.run(layer, hidden) -> the next layer's
    inputs; runner.until(layer, hidden, module) -> what a module of the layer gets."""

    def __init__(self, anatomy: Anatomy, batches: list[torch.Tensor]):
        self.anatomy, self.batches = anatomy, batches
        self.device = input_device(anatomy.model)
        # masks and positions depend on the number of rows, and the last batch may have fewer
        self._arguments = {size: self._record(size) for size in {len(batch) for batch in batches}}
        # by layer, once it has run: how many values its attention returns behind the output
        # projection's own, such as its probabilities, which no layer reads (-1: it returns that
        # alone); None where it returns something else
        self._behind: dict[int, int | None] = {}

    @torch.no_grad()
    def _record(self, size: int) -> list[tuple[tuple, dict]]:
        """Every layer's arguments besides the hidden states, for batches of `size` rows. The layers
        themselves are passed over, so their weights need not be there."""
        recorded: list[tuple[tuple, dict]] = []
        blocks = [layer.block for layer in self.anatomy]

        def note(block, *args, **kwargs):
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            recorded.append((args, kwargs))
            if block is blocks[-1]:
                raise Stop
            return passed(hidden)

        batch = next(batch for batch in self.batches if len(batch) == size)
        with instead(blocks, note), suppress(Stop):
            self.anatomy.model(input_ids=batch.to(self.device), use_cache=False)
        return recorded

    def embed(self) -> list[torch.Tensor]:
        """The inputs of layer 0, one (batch, length, D) tensor for each batch, on the CPU."""
        return [self.embed_batch(batch) for batch in self.batches]

    @torch.no_grad()
    def embed_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """The inputs of layer 0 for one batch of tokens (batch, length): (batch, length, D) on the
        CPU.
        """
        hidden = []

        def hook(module, args, kwargs):
            hidden.append((args[0] if args else kwargs["hidden_states"]).cpu())
            raise Stop

        handle = self.anatomy.layers[0].block.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with suppress(Stop):
                self.anatomy.model(input_ids=batch.to(self.device), use_cache=False)
        finally:
            handle.remove()
        return hidden.pop()

    @torch.no_grad()
    def run(self, index: int, hidden: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Runs layer `index` on each batch of `hidden`; yields (batch number, its output on the
        CPU).
        """
        for number, states in enumerate(hidden):
            yield number, self.call(index, states).cpu()

    @torch.no_grad()
    def until(
        self,
        index: int,
        hidden: Iterable[torch.Tensor],
        module: nn.Module,
        heads: Sequence[torch.Tensor] = (),
    ) -> Iterator[torch.Tensor]:
        """What `module`, a part of layer `index`, gets for each batch of `hidden`, on the layer's
        device; the rest of the layer is not run. heads: as for `call`, by batch."""
        seen: list[torch.Tensor] = []

        def stop(_, args):
            seen.append(args[0])
            raise Stop

        handle = module.register_forward_pre_hook(stop)
        try:
            for number, states in enumerate(hidden):
                with suppress(Stop):
                    self.call(index, states, heads[number] if heads else None)
                yield seen.pop()
        finally:
            handle.remove()

    def call(
        self, index: int, states: torch.Tensor, heads: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output of layer `index` for one batch of hidden states, on the layer's device. heads:
        what its output projection got for them (from `until`), if nothing before that has changed:
        attention is not computed again."""
        args, kwargs = self._arguments[len(states)][index]
        layer = self.anatomy.layers[index]
        behind = self._behind.get(index)
        if heads is None or behind is None:
            how = self._learning(layer)
        else:
            how = self._given(layer, heads, behind)
        with how:
            output = layer.block(states.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def noticing(self, index: int) -> Iterator[list[bool]]:
        """While open, the first run of a layer tells whether what its output projection gives is
        added to the hidden states as it is, by what the layer's next part gets: not scaled, normed,
        or added later. Gives a list with that answer, which is empty before."""
        layer = self.anatomy.layers[index]
        told: list[bool] = []
        came: list[torch.Tensor] = []
        given: list[torch.Tensor] = []
        got: list[torch.Tensor] = []
        parts = [part for part in layer.block.children() if part is not layer.attention]

        def note(seen: list[torch.Tensor], args: tuple, kwargs: dict) -> None:
            if not told:
                seen.extend(args[:1] or list(kwargs.values())[:1])

        def tell(*_) -> None:
            if told:
                return
            total = came[0] + given[0].view(came[0].shape)
            flat = total.flatten()  # OPT's next part gets tokens without rows
            told.append(any(torch.is_tensor(x) and torch.equal(x.flatten(), flat) for x in got))
            for seen in (came, given, got):
                seen.clear()

        handles = [
            part.register_forward_pre_hook(lambda _, *call: note(got, *call), with_kwargs=True)
            for part in parts
        ]
        handles += [
            layer.block.register_forward_pre_hook(
                lambda _, *call: note(came, *call), with_kwargs=True
            ),
            layer.o.module.register_forward_hook(lambda _, __, y: note(given, (y,), {})),
            layer.block.register_forward_hook(tell),
        ]
        try:
            yield told
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def ends_in(self, index: int, states: torch.Tensor, module: nn.Module) -> bool:
        """Whether the last that a layer does is to add what `module` gives. states: one batch."""
        given: list[torch.Tensor] = []

        def nothing(_, __, y):
            given.append(y)
            return torch.zeros_like(y)

        handle = module.register_forward_hook(nothing)
        try:
            without = self.call(index, states)
        finally:
            handle.remove()
        added, whole = given[0].view_as(without), self.call(index, states)
        # to rounding: where the FFN stands beside attention, there are three to add, in any order,
        # and attention may be large where `without` is small
        parts = (without, added, whole, states.to(whole.device))
        few = 4 * torch.finfo(whole.dtype).eps * sum(x.abs() for x in parts)
        return bool(((without + added - whole).abs() <= few).all())

    @contextmanager
    def _given(self, layer: Layer, heads: torch.Tensor, behind: int) -> Iterator[None]:
        """While open, the layer's attention gives its output projection of `heads`, and `behind`
        times None after it."""
        attention = layer.attention
        own = vars(attention).get("forward")

        def forward(*args, **kwargs):
            output = layer.o.module(heads.to(self.device))
            return output if behind < 0 else (output, *[None] * behind)

        attention.forward = forward
        try:
            yield
        finally:
            del attention.forward
            if own is not None:
                attention.forward = own

    @contextmanager
    def _learning(self, layer: Layer) -> Iterator[None]:
        """While open, a first run of the layer tells whether what its attention returns is what
        the output projection gave, and nothing is done to it in between."""
        if layer.index in self._behind:
            yield
            return
        given: list[torch.Tensor] = []

        def note(_, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            same = [(x.data_ptr(), x.numel()) for x in given] == [(first.data_ptr(), first.numel())]
            count = len(rest) if isinstance(output, tuple) else -1
            self._behind[layer.index] = count if same else None

        handles = [
            layer.o.module.register_forward_hook(lambda _, __, output: given.append(output)),
            layer.attention.register_forward_hook(note),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def watch(module: nn.Module, see: Callable[[torch.Tensor, torch.Tensor], None]):
    """While open, calls `see(input, output)` with what `module` gets and gives, as (tokens,
    features).
    """

    def hook(_, args, output):
        see(args[0].flatten(0, -2), output.flatten(0, -2))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
