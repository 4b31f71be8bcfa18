"""First-order Taylor: what setting a structure's weights to zero would change, |sum w dL/dw| over
its coupled tensors.

LLM-Pruner (arXiv:2305.11627), equation 4, its "vector" form: signed inside a structure, so that
what cancels cancels. A head's tensors are its rows of q, k, v and its columns of o; an FFN
dimension's its rows and its column. The sum over the rows of W of w dL/dw is the sum over tokens of
y dL/dy, for y = W x (and over columns x dL/dx): no weight gradients are needed, and each window has
its own. Magnitudes are averaged over windows, since at the end of training the gradients' own
average is zero but for noise."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.hf.anatomy import Anatomy, Layer
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    by_group,
    by_sample,
    criterion,
    gradients,
    losses,
    watching_blocks,
)


@criterion("taylor", ("heads", "ffn", "layers"), needs_loss=True, place=10)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """heads, ffn: see above. layers: |sum (y - x) dL/dy| for a layer that makes y of x."""
    sums = Sums(parts)
    for batch in batches:
        signed = _Signed(len(batch))
        with (
            gradients(parts),
            watching_blocks(parts, signed.see_block if "layers" in targets else lambda *_: None),
        ):
            handles = [handle for layer in parts for handle in signed.watch(layer, targets)]
            try:
                losses(parts.model, batch).sum().backward()
            finally:
                for handle in handles:
                    handle.remove()
        for (target, layer), values in signed.total.items():
            sums.add(target, layer, values.abs().sum(0))
    return sums.importance()


class _Signed:
    """Sums of w dL/dw by target and layer, one for each of a batch's windows: (B, n), or (B,) for
    layers.
    """

    def __init__(self, samples: int):
        self.samples = samples
        self.total: dict[tuple[str, int], Tensor] = {}

    def add(self, target: str, layer: int, values: Tensor) -> None:
        key = (target, layer)
        self.total[key] = values if key not in self.total else self.total[key] + values

    def watch(self, layer: Layer, targets: list[str]) -> list:
        """Hooks on one layer's linear modules."""
        handles = []
        if "heads" in targets:
            for projection in (layer.q, layer.k, layer.v, layer.o):
                handles.append(self._hook(projection.module, layer, projection))
        if "ffn" in targets:
            feed_forward = layer.feed_forward
            handles += [self._hook(module, layer) for module in feed_forward.inputs]
            handles.append(self._hook(feed_forward.output, layer, output=True))
        return handles

    def _hook(self, module, layer: Layer, projection=None, output: bool = False):
        """Adds x dL/dx of a module's input, or y dL/dy of its output, once the backward pass comes
        by.
        """

        def of_tensor(tensor: Tensor) -> None:
            value = tensor.detach()

            def arrived(gradient: Tensor) -> None:
                # signed sums over the tokens of a window: what cancels cancels
                product = by_sample((gradient * value).float(), self.samples).sum(1)
                if projection is None:
                    self.add(
                        "ffn",
                        layer.index,
                        product.unflatten(-1, (-1, layer.feed_forward.size)).sum(1),
                    )
                    return
                rows = projection.rows(torch.arange(projection.heads)).to(product.device)
                per_head = product[:, rows].unflatten(-1, (projection.heads, -1)).sum(-1)
                self.add("heads", layer.index, by_group(layer, per_head))

            tensor.register_hook(arrived)

        if output or (projection is not None and projection.output):
            return module.register_forward_pre_hook(lambda _, args: of_tensor(args[0]))
        return module.register_forward_hook(lambda _, args, result: of_tensor(result))

    def see_block(self, layer: Layer, before: Tensor, after: Tensor) -> None:
        change = (after - before).detach()
        after.register_hook(
            lambda gradient: self.add(
                "layers", layer.index, (gradient * change).float().flatten(1).sum(1)
            )
        )
