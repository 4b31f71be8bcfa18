"""One layer given what a choice says of its weights, each part fitted to what the layer then gets.

Heads are merged in closed form (`effattn.heads`), keys and values become latents, an FFN's
dimensions go in the order in which others make up for them (ZipLM, arXiv:2302.04089), matrices
become low rank, Monarch or sparse, closest in their outputs. The output and the down projection are
solved again by least squares for what the parent gives; where one block is left out, what stays of
the layer is solved for the sum of both.

N: calibration tokens; D: hidden size; F: inner dimensions of an FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effattn.calibration.layerwise import LayerRunner
from effattn.calibration.refit import OutputRefit, lag
from effattn.fitting import forms
from effattn.fitting.plan import LayerChoice, is_structured
from effattn.heads.converting import Conversion, merge_heads
from effattn.heads.latent.converting import install
from effattn.heads.latent.spectrum import spectrum
from effattn.hf import latents, shapes, uneven
from effattn.hf.layer import Layer
from effattn.prune.structural.criteria.obs import removal_order


@dataclass
class Seen:
    """What the parent's layer gets and gives: the moment of its attention's inputs and some of them
    (`effattn.heads.converting.observe`), what its output projections give without their biases
    (N, D), the moment of its FFN's inputs (D, D), and the sum of z z^T of the inner dimensions
    (F, F), both in fp64. stream: the hidden states that it got, by batch, where what its attention
    gives is added to them as it is; None where it is not."""

    moment: Tensor
    inputs: Tensor | None
    attention: list[Tensor]
    ffn: list[Tensor]
    ffn_moment: Tensor
    gram: Tensor
    stream: list[Tensor] | None = None


def structured(form: str | None) -> str | None:
    """A form that is fitted; None for plain weights, also those that are packed at the end."""
    return form if form is not None and is_structured("ffn_weights", form) else None


@dataclass
class Shaping:
    """Carries out what a choice says of the weights of one layer of a twin. own: what the layer is;
    student: the inputs that it gets there; asked: how heads are merged."""

    runner: LayerRunner
    layer: Layer
    own: LayerChoice
    seen: Seen
    student: Sequence[Tensor]
    asked: Conversion

    @torch.no_grad()
    def carry_out(self, choice: LayerChoice) -> None:
        """Both blocks, the attention first."""
        if choice.kv_heads:
            self._attention(choice)
        else:
            shapes.leave_out(self.layer, uneven.ATTENTION)
        if choice.ffn:
            self._ffn(choice)
        else:
            shapes.leave_out(self.layer, uneven.FFN)

    def _attention(self, choice: LayerChoice) -> None:
        layer, seen = self.layer, self.seen
        form = structured(choice.attention_weights)
        if choice.kv_heads != self.own.kv_heads:
            asked = replace(self.asked, kv_heads=choice.kv_heads)
            merge_heads(layer, asked, seen.moment, seen.inputs)
        elif choice.latent is not None:
            moment = seen.moment.to(layer.k.like.device)
            install(layer, spectrum(layer, moment, seen.inputs).factors(choice.latent))
        elif form is not None:
            moment = seen.moment[:-1, :-1]  # without the ones
            for module in layer.qkv_modules:
                if module is not layer.o.module:
                    forms.put(layer.block, module, forms.fitted(form, module, moment))
        elif choice.ffn:
            return
        targets = seen.attention if choice.ffn else self._both(self.layer.feed_forward.output)
        self._refit(layer.o.module, self._caught_up(targets), form)

    def _caught_up(self, targets: list[Tensor]) -> list[Tensor]:
        """Targets with what lies between the parent's hidden states and the twin's at this layer,
        so that behind attention the two agree."""
        stream = self.seen.stream
        if stream is None:
            return targets
        pairs = zip(targets, stream, self.student, strict=True)
        return [y.float() + lag(theirs, ours) for y, theirs, ours in pairs]

    def _ffn(self, choice: LayerChoice) -> None:
        layer, seen, own = self.layer, self.seen, self.layer.feed_forward
        form = structured(choice.ffn_weights)
        if choice.ffn != self.own.ffn:
            narrow(layer, choice.ffn, seen.gram)
        elif form is not None:
            for module in own.inputs:
                forms.put(layer.block, module, forms.fitted(form, module, seen.ffn_moment))
        elif choice.kv_heads:
            return
        targets = seen.ffn if choice.kv_heads else self._both(layer.o.module)
        self._refit(own.output, targets, form)

    def _both(self, gone: nn.Linear) -> list[Tensor]:
        """What both blocks give together, with the bias of the one that is left out."""
        bias = 0 if gone.bias is None else gone.bias.detach().cpu()
        seen = self.seen
        return [one + other + bias for one, other in zip(seen.attention, seen.ffn, strict=True)]

    def _refit(self, output: nn.Linear, targets: list[Tensor], form: str | None) -> None:
        """Solves an output projection for `targets`, on what it gets when the layer gets `student`,
        and then gives it its form."""
        fit, index = OutputRefit(), self.layer.index
        for z, y in zip(self.runner.until(index, self.student, output), targets, strict=True):
            fit.add(z.flatten(0, -2), y.to(z.device))
        output.weight.copy_(fit.solve(output.weight))
        if form is not None:
            forms.put(self.layer.block, output, forms.fitted(form, output, fit.gram.mean))


@torch.no_grad()
def narrow(layer: Layer, width: int, gram: Tensor) -> None:
    """Leaves an FFN the `width` dimensions that others cannot make up for. gram (F, F), fp64."""
    output = layer.feed_forward.output
    order = removal_order(
        gram.cpu(),
        output.weight.detach().double().cpu(),
        removed=layer.feed_forward.size - width,
    )
    keep = order[len(order) - width :].sort().values
    shapes.keep_ffn(layer, keep.to(output.weight.device))


@torch.no_grad()
def hollow(layer: Layer, choice: LayerChoice, own: LayerChoice) -> None:
    """Gives a layer the sizes and the modules of a choice, with weights that mean nothing."""
    if choice.ffn == 0:
        shapes.leave_out(layer, uneven.FFN)
    elif choice.ffn != own.ffn:
        shapes.keep_ffn(layer, torch.arange(choice.ffn))
    blocks = []
    if choice.kv_heads == 0:
        shapes.leave_out(layer, uneven.ATTENTION)
    elif choice.kv_heads != own.kv_heads:
        shapes.keep_heads(layer, choice.kv_heads)
    elif choice.latent is not None:
        latents.put(layer, choice.latent)
    else:
        blocks.append((choice.attention_weights, layer.qkv_modules))
    if choice.ffn:
        feed_forward = layer.feed_forward
        blocks.append((choice.ffn_weights, [*feed_forward.inputs, feed_forward.output]))
    for form, modules in blocks:
        for module in modules if structured(form) else ():
            new = forms.empty(
                form, module, module.out_features, module.in_features, module.weight.device
            )
            forms.put(layer.block, module, new)
