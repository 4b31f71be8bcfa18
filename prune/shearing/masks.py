"""L0 masks over a live model: hidden dimensions, heads, FFN dimensions and layers, applied by
hooks.

    masks = Masks(anatomy.of(model), {"heads": 4, "ffn": 352})
    with masks.applied(parts):
        masks.values = masks.draw(generator)        # or masks.settled()
        model(input_ids=ids)

Section 2.1 of Sheared LLaMA (arXiv:2310.06694). Where a mask stands decides how it is folded into
the weights later (`effattn.prune.shearing.folding`), so each stands at one linear module's input or
output:

| axis | gates | multiply |
|---|---|---|
| hidden | (D,), for all layers | outputs of embedding, o_proj and down_proj, and the head's input |
| heads | (L, K), one a key/value group | the input of o_proj, all query heads of the group |
| ffn | (L, F) | the input of down_proj |
| layers | (L,) | the outputs of o_proj and down_proj |

A norm over the hidden dimensions takes its mean square over those that are kept: the others are 0
in the residual stream, so x sqrt(D / kept) goes in and the result is scaled back, which is the
same, epsilon included.

L: layers; K: key/value groups; F: inner dimensions of the FFN; D: hidden size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.prune.shearing import hard_concrete

AXES = ("hidden", "heads", "ffn", "layers")
START = 2.5  # log alpha of a gate at the start: fully open with probability 0.71
# standard deviation of log alphas that are ranked by importance: few gates at a time are half open
SPREAD = 10.0
RANKED_START = 2.3 * SPREAD  # their mean: all but 1 % are open
Values = dict[str, Tensor]  # axis -> gates


class Masks(nn.Module):
    """log alpha of every gate; only the axes of `target` (axis -> how many stay) have gates.

    It is start · level + own, with a `level` for every row (all gates of a layer, or of the axis),
    which begins at 1, and an `own` for every gate, as parameters by axis. The constraints move a
    row as one by its level; which of its gates close first is in their own. (With one parameter a
    gate, as in the paper, those that are far from closing have no gradient, and an adaptive
    optimizer brings the others all to the border: half open gates, and no ranking left.)

    start: the log alpha that all begin with (the released code begins at 0, where half of the model
    is closed on average, and has 0.4 billion tokens to recover)."""

    def __init__(self, parts: hf.Anatomy, target: dict[str, int], start: float = START):
        super().__init__()
        sizes = {axis: size for axis, size in shapes(parts).items() if axis in target}
        device = parts.embeddings.weight.device
        self.target = dict(target)
        self.own = nn.ParameterDict(
            {axis: nn.Parameter(torch.zeros(size, device=device)) for axis, size in sizes.items()}
        )
        self.level = nn.ParameterDict(
            {
                axis: nn.Parameter(torch.ones(*size[:-1], 1, device=device))
                for axis, size in sizes.items()
            }
        )
        self.start = dict.fromkeys(sizes, float(start))
        self.bound = dict.fromkeys(sizes, hard_concrete.BOUND)
        self.values: Values = {}
        self._handles: list = []

    @property
    def log_alpha(self) -> Values:
        """Axis -> log alphas, with gradients."""
        return {axis: self.start[axis] * self.level[axis] + own for axis, own in self.own.items()}

    @torch.no_grad()
    def rank(
        self, axis: str, importance: Tensor, spread: float = SPREAD, start: float = RANKED_START
    ) -> None:
        """Spreads the log alphas of an axis around `start` by the rank of importance (its gates'
        shape) within each row, like a normal distribution of that standard deviation: what looks
        least important is the first to close."""
        own = self.own[axis]
        rank = importance.argsort(-1).argsort(-1).to(own)
        own.copy_(spread * torch.special.ndtri((rank + 0.5) / rank.shape[-1]))
        self.start[axis] = start
        self.bound[axis] = max(hard_concrete.BOUND, float(self.log_alpha[axis].abs().max()))

    def draw(self, generator: torch.Generator) -> Values:
        """Random gates; `generator` is on the CPU, so that a seed means the same on every
        device.
        """
        found = {}
        for axis, log_alpha in self.log_alpha.items():
            noise = torch.rand(log_alpha.shape, generator=generator).to(log_alpha)
            found[axis] = hard_concrete.sample(log_alpha, noise)
        return found

    def settled(self, final: bool = False) -> Values:
        """Gates without noise: as many open as are expected now, or (`final`) exactly the
        target.
        """
        return {
            axis: hard_concrete.settled(log_alpha, self.target[axis] if final else None)
            for axis, log_alpha in self.log_alpha.items()
        }

    def removed(self) -> Values:
        """The expected share of closed gates of each row, with gradients: (L,) for heads and ffn,
        otherwise (1,).
        """
        return {
            axis: 1 - hard_concrete.open_probability(log_alpha).mean(-1).reshape(-1)
            for axis, log_alpha in self.log_alpha.items()
        }

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps every log alpha where its gate can still change, or where its rank has put it."""
        for axis, own in self.own.items():
            level, bound = self.start[axis] * self.level[axis], self.bound[axis]
            own.copy_(own.clamp(-bound - level, bound - level))

    @contextmanager
    def applied(self, parts: hf.Anatomy) -> Iterator[None]:
        """While it lasts, the model computes with whatever gates `self.values` holds."""
        self.attach(parts)
        try:
            yield
        finally:
            self.detach()

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def attach(self, parts: hf.Anatomy) -> None:
        """Puts the hooks of `applied` on."""
        handles = self._handles

        def scale_input(module: nn.Module, axis: str, row: int, repeat: int = 1) -> None:
            def hook(_, args):
                z = self.values[axis][row].to(args[0].dtype)
                return (args[0] * z.repeat_interleave(repeat), *args[1:])

            handles.append(module.register_forward_pre_hook(hook))

        def scale_output(module: nn.Module, axis: str, row: int | None = None) -> None:
            def hook(_, args, output):
                z = self.values[axis] if row is None else self.values[axis][row]
                return output * z.to(output.dtype)

            handles.append(module.register_forward_hook(hook))

        for layer in parts:
            if "heads" in self.own:
                scale_input(
                    layer.o.module,
                    "heads",
                    layer.index,
                    layer.heads // layer.kv_heads * layer.value_dim,
                )
            if "ffn" in self.own:
                scale_input(layer.feed_forward.output, "ffn", layer.index)
            if not {"hidden", "layers"} & set(self.own):
                continue
            for module in (layer.o.module, layer.feed_forward.output):
                if "layers" in self.own:
                    scale_output(module, "layers", layer.index)
                if "hidden" in self.own:
                    scale_output(module, "hidden")
        if "hidden" in self.own:
            scale_output(parts.embeddings, "hidden")
            for norm in hidden_norms(parts):
                handles += self._narrow(norm)
            # what the head reads, after the norm's own correction
            scale_output(parts.final_norm, "hidden")

    def _narrow(self, norm: nn.Module) -> list:
        """Hooks that make an RMS norm take its mean over the kept dimensions only."""

        def factor() -> Tensor:
            z = self.values["hidden"]
            return (len(z) / (z > 0).sum()).sqrt()

        return [
            norm.register_forward_pre_hook(
                lambda _, args: (args[0] * factor().to(args[0].dtype), *args[1:])
            ),
            norm.register_forward_hook(lambda _, args, output: output / factor().to(output.dtype)),
        ]


def shapes(parts: hf.Anatomy) -> dict[str, tuple[int, ...]]:
    """Axis -> the shape of its gates in this model; a mixture of experts has no "ffn"."""
    layers, hidden = len(parts.layers), parts.embeddings.weight.shape[1]
    ffn = (
        {"ffn": (layers, parts.layers[0].feed_forward.size)}
        if parts.layers[0].family.ffn_in
        else {}
    )
    return {"hidden": (hidden,), "heads": (layers, parts.kv_heads), **ffn, "layers": (layers,)}


def hidden_norms(parts: hf.Anatomy) -> list[nn.Module]:
    """The norms over the hidden dimensions, the final one last; those inside attention are over
    heads.
    """
    return [
        n for layer in parts for n in layer.norms if n not in set(layer.attention.modules())
    ] + [parts.final_norm]


@torch.no_grad()
def check_axes(parts: hf.Anatomy, axes: list[str]) -> None:
    """Unsupported, naming the axes that can be masked, when one of `axes` cannot in this model."""
    reasons: dict[str, str] = {}
    if not parts.layers[0].family.ffn_in:
        reasons |= dict.fromkeys(("hidden", "ffn", "layers"), "its FFN is a mixture of experts")
    # Tried instead of told by class: a norm that subtracts a mean makes 0 of a flat vector, and one
    # with a bias is no odd function.
    weight = parts.embeddings.weight
    flat = torch.ones(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    if any(
        float(norm(flat).abs().max()) < 1e-3 or not torch.equal(norm(-flat), -norm(flat))
        for norm in hidden_norms(parts)
    ):
        reasons.setdefault(
            "hidden",
            "its norms subtract a mean or add a bias, so removed dimensions would not stay 0",
        )
    if "layers" not in reasons and _undone(parts):
        reasons["layers"] = "a norm after o_proj or down_proj undoes a factor on what a layer adds"
    for axis in axes:
        if axis in reasons:
            valid = ", ".join(other for other in AXES if other not in reasons)
            raise Unsupported(
                f"target: {axis}: {type(parts.model).__name__} cannot be sheared along it: "
                f"{reasons[axis]}; valid axes are {valid}"
            )


def _undone(parts: hf.Anatomy) -> bool:
    """Whether halving what o_proj and down_proj give leaves a layer's output as it is."""
    seen: list[Tensor] = []
    layer = parts.layers[0]
    ids = torch.arange(4, device=parts.embeddings.weight.device)[None]

    def note(_, __, output):
        seen.append((output[0] if isinstance(output, tuple) else output).float())

    # with half of what they write, and with nothing: if halving hardly differs from the whole, next
    # to what nothing changes, a norm behind has undone it
    writers = (layer.o.module, layer.feed_forward.output)
    handle = layer.block.register_forward_hook(note)
    for factor in (1.0, 0.5, 0.0):
        more = [m.register_forward_hook(lambda _, __, y, f=factor: y * f) for m in writers]
        parts.model(input_ids=ids, use_cache=False)
        for each in more:
            each.remove()
    handle.remove()
    whole, half, none = seen
    return bool((whole - half).norm() < 1e-2 * (whole - none).norm())
