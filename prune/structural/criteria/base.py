"""What criteria share: how one makes itself known, their result, and one pass over the calibration
windows, forward only or with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.walk import Stream
from effattn.evaluate.logits import next_token_losses
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.last_logits import last_only

TARGETS = ("heads", "ffn", "layers")
AT_ONCE = 2**22  # numbers in fp64, 32 MiB


@dataclass
class Importance:
    """fp64 on the CPU, higher is worth more; None: not asked for. heads (L, K): K/V heads with
    their query heads, in multi-head attention single heads. ffn (L, F). layers (L,)."""

    heads: Tensor | None = None
    ffn: Tensor | None = None
    layers: Tensor | None = None

    def check(self) -> None:
        """FloatingPointError naming the first layer with a score that is no number."""
        for name in TARGETS:
            found = getattr(self, name)
            if found is None:
                continue
            bad = (~torch.isfinite(found.view(len(found), -1))).any(1).nonzero().flatten()
            if len(bad):
                raise FloatingPointError(
                    f"layer {int(bad[0])}: the importance of its {name} is NaN or infinity"
                )


Score = Callable[..., Importance]


@dataclass(frozen=True)
class Criterion:
    """`score(parts, batches, targets, seed)` ranks the structures of `targets`, some of those that
    it knows; batches: int64 (batch, length) each. needs_loss: whether it takes gradients of the
    loss on next tokens. place: where it stands in lists, the lowest first. stops: it also takes
    `removed`, target -> how many structures of a layer will go, and puts no more of them in order
    than those. reads: whether it takes the text at all."""

    name: str
    targets: tuple[str, ...]
    score: Score
    needs_loss: bool = False
    place: int = 80
    stops: bool = False
    reads: bool = True


_CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str,
    targets: tuple[str, ...],
    *,
    needs_loss: bool = False,
    place: int = 80,
    stops: bool = False,
    reads: bool = True,
) -> Callable[[Score], Score]:
    """Function decorator: makes a `score` known under `name`; see `Criterion`."""

    def add(score: Score) -> Score:
        if name in _CRITERIA:
            raise ValueError(f"criterion {name!r} is registered already")
        _CRITERIA[name] = Criterion(name, targets, score, needs_loss, place, stops, reads)
        return score

    return add


def registered() -> dict[str, Criterion]:
    """name -> criterion, of those whose files were imported, in their places and then by name."""
    return dict(sorted(_CRITERIA.items(), key=lambda item: (item[1].place, item[0])))


class Told(list[Tensor]):
    """Batches that tell how many of them a pass is through with: (done, all)."""

    def __init__(self, batches: list[Tensor], progress: Callable[[int, int], None]):
        super().__init__(batches)
        self.progress = progress

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(super().__iter__()):
            yield batch
            self.progress(number + 1, len(self))  # the next one is asked for


class AtLayer(list[Tensor]):
    """Batches whose hidden states at one layer are known: a pass over them (`forward`) runs this
    layer alone, whose weights are there, and moves `stream` one layer on. What sees a layer is
    called as in a pass over the whole model; scores are of this layer alone."""

    def __init__(self, runner: LayerRunner, layer: Layer, stream: Stream):
        super().__init__(runner.batches)
        self.runner, self.layer, self.stream = runner, layer, stream

    def run(self) -> Iterator[int]:
        """How many windows each batch had, after the layer has been run on it."""
        for number, states in self.runner.run(self.layer.index, self.stream.source):
            self.stream.sink[number] = states
            yield len(states)


class Sums:
    """Sums over calibration windows, by target and layer."""

    def __init__(self, parts: Anatomy):
        self.parts = parts
        self.total: dict[tuple[str, int], Tensor] = {}

    def add(self, target: str, layer: int, values: Tensor) -> None:
        """values (n,), or () for a layer."""
        key = (target, layer)
        values = values.detach().double().cpu()
        self.total[key] = values if key not in self.total else self.total[key] + values

    def importance(self, heads: Callable[[Layer, Tensor], Tensor] | None = None) -> Importance:
        """Stacks the sums. `heads` makes (K,) of what was added for a layer's heads; None: it is
        (K,) already.
        """
        found: dict[str, list[Tensor]] = {}
        for (target, index), values in sorted(self.total.items()):
            values = (
                heads(self.parts.layers[index], values) if target == "heads" and heads else values
            )
            found.setdefault(target, []).append(values)
        return Importance(**{target: torch.stack(values) for target, values in found.items()})


def in_fp64(x: Tensor) -> Iterator[Tensor]:
    """x (..., n) as rows in fp64, a few at a time: of wide FFNs all would be larger than the
    layer's weights."""
    rows = x.detach().flatten(0, -2)
    for some in rows.split(max(1, AT_ONCE // rows.shape[-1])):
        yield some.double()


def by_group(layer: Layer, per_query_head: Tensor) -> Tensor:
    """(..., H) of query heads summed over those that share a K/V head: (..., K)."""
    return per_query_head.unflatten(-1, (layer.kv_heads, -1)).sum(-1)


def by_sample(x: Tensor, samples: int) -> Tensor:
    """(B·T, n) or (B, T, n) as (B, T, n)."""
    return x.reshape(samples, -1, x.shape[-1])


@contextmanager
def watching(parts: Anatomy, see_input: Callable[[str, Layer, Tensor], None]) -> Iterator[None]:
    """While open, `see_input("heads" | "ffn", layer, x)` gets what each o_proj and each FFN's
    output module takes.
    """
    handles = []
    for layer in parts:
        pairs = [("heads", layer.o.module)]
        if layer.family.ffn_in:
            pairs.append(("ffn", layer.feed_forward.output))
        for target, module in pairs:
            hook = lambda _, args, target=target, layer=layer: see_input(target, layer, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_blocks(
    parts: Anatomy, see: Callable[[Layer, Tensor, Tensor], None] = lambda *_: None
) -> Iterator[None]:
    """While open, `see(layer, input, output)` gets the hidden states around each layer.
    FloatingPointError naming the first layer whose output is not finite."""

    def hook_of(layer: Layer):
        def hook(_, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(after).all():
                raise FloatingPointError(
                    f"layer {layer.index}: the calibration activations contain NaN or infinity"
                )
            see(layer, before, after)

        return hook

    handles = [
        layer.block.register_forward_hook(hook_of(layer), with_kwargs=True) for layer in parts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward(parts: Anatomy, batches: list[Tensor]) -> Iterator[int]:
    """Runs the model on each batch, or one layer (`AtLayer`); yields how many windows it had, after
    the hooks have seen it.
    """
    if isinstance(batches, AtLayer):
        yield from batches.run()
        return
    last = last_only(parts.model)  # nobody reads them
    for batch in batches:
        ids = batch.to(parts.embeddings.weight.device)
        parts.model(input_ids=ids, use_cache=False, **last)
        yield len(batch)


@contextmanager
def gradients(parts: Anatomy) -> Iterator[None]:
    """While open, activations have gradients and no parameter has: half the work of a training
    step's backward pass.
    """
    wanted = {parameter: parameter.requires_grad for parameter in parts.model.parameters()}
    parts.model.requires_grad_(False)
    handle = parts.embeddings.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, state in wanted.items():
            parameter.requires_grad_(state)


def losses(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each window in nats a token, (B,), with gradients."""
    table = cast(nn.Embedding, model.get_input_embeddings())
    ids = batch.to(table.weight.device)
    return next_token_losses(model, ids).mean(1)
