"""Weights in formats that are no plain numbers: patterns run on them, whatever reads weights refuses them by name."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from torch import nn

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.profiling.weights import is_packed, is_plain, packing


class Scaled(nn.Linear):
    """8-bit floats with a scale beside them, as transformers' FP8Linear keeps them."""

    def __init__(self, old: nn.Linear):
        super().__init__(old.in_features, old.out_features, old.bias is not None)
        self.scale = nn.Parameter(old.weight.detach().abs().amax() / 448, requires_grad=False)
        codes = (old.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), old.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Codes(nn.Module):
    """No weight at all, as GPTQ and AWQ keep them: codes and scales in buffers."""

    def __init__(self, old: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("scales", old.weight.detach().abs().amax(1) / 127)
        self.register_buffer("qweight", (old.weight.detach() / self.scales[:, None]).round().to(torch.int8))
        self.bias = old.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales[:, None], self.bias)


class Rounding(nn.Linear):
    """A float weight that is not all the module computes with, as BitLinear has it."""

    def __init__(self, old: nn.Linear):
        super().__init__(old.in_features, old.out_features, old.bias is not None)
        self.weight, self.bias = nn.Parameter(old.weight.detach().clone()), old.bias

    def forward(self, x):
        scale = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Unpacking(torch.Tensor):
    """A tensor class that unpacks itself in every operation, as torchao's and quanto's do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].codes), func(args[0].scale))
        plain = [one.codes * one.scale if isinstance(one, cls) else one for one in args]
        return func(*plain, **(kwargs or {}))

    def __deepcopy__(self, memo):
        return nn.Parameter(Unpacking(self.codes.clone(), self.scale.clone()), requires_grad=False)


def unpacking(old: nn.Linear) -> nn.Linear:
    scale = old.weight.detach().abs().amax() / 127
    codes = (old.weight.detach() / scale).round().to(torch.int8)
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None)
    new.weight, new.bias = nn.Parameter(Unpacking(codes, scale), requires_grad=False), old.bias
    return new


KINDS = {"fp8": Scaled, "codes": Codes, "rounding": Rounding, "tensor class": unpacking}


def packed(kind: str, family: str = "llama"):
    model = tiny(family, dtype=torch.float32)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, KINDS[kind](module))
    return model


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_which_modules_are_plain():
    linear = nn.Linear(16, 16)
    assert is_plain(linear)
    assert not is_packed(linear)
    told = {
        kind: (is_plain(make(linear)), is_packed(make(linear)), packing(make(linear))) for kind, make in KINDS.items()
    }
    assert told == {
        "fp8": (False, True, "fp8"),
        "codes": (False, False, None),
        "rounding": (False, False, None),
        "tensor class": (False, True, "Unpacking"),
    }
    assert is_plain(nn.Linear(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_patterns_and_second_projections(kind, family, tokens):
    model, ids = packed(kind, family), tokens[None, :24]
    own = logits(model, ids)
    assert anatomy.of(model).layers[0].dtype == torch.float32
    torch.testing.assert_close(logits(effattn.swap(model, "dense"), ids), own, rtol=1e-4, atol=1e-4)
    effattn.swap(model, "longformer(window=49, global_tokens=2)")  # sees everything: the same function
    torch.testing.assert_close(logits(model, ids), own, rtol=1e-4, atol=1e-4)
    effattn.swap(model, "sliding(window=4)", positions="ntk(factor=2, variant='fixed')")
    assert not torch.allclose(logits(model, ids), own, atol=1e-2)
    assert torch.equal(logits(effattn.restore(model), ids), own)


READS = {
    "convert_gqa": lambda model, tokens: effattn.convert_gqa(model, kv_heads=2, calibration=tokens),
    "projections": lambda model, tokens: effattn.swap(model, "dense", projections="monarch(blocks=8)"),
    "ffn": lambda model, tokens: effattn.swap(model, projections="monarch(blocks=8, ffn=True)"),
    "oneshot": lambda model, tokens: effattn.prune.oneshot(model, tokens, sparsity=0.5),
    "structured": lambda model, tokens: effattn.prune.structured(model, tokens, heads=4),
    "quantize_weights": lambda model, tokens: effattn.quant.quantize_weights(model),
    "fold_values": lambda model, tokens: effattn.quant.fold_values(model),
    "weight": lambda model, tokens: anatomy.of(model).layers[0].o.weight,
}


@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_reads_weights_refuses_them_before_anything_changes(kind, what, tokens):
    if what == "quantize_weights":
        pytest.importorskip("bitsandbytes")
    model = packed(kind)
    before = logits(model, tokens[None, :20])
    with pytest.raises(Unsupported):
        READS[what](model, tokens)
    assert torch.equal(logits(model, tokens[None, :20]), before)
    assert not hasattr(model, "_effattn")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_linears_of_an_ffn_are_refused_too(kind, tokens):
    model = tiny("llama", dtype=torch.float32)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = KINDS[kind](mlp.down_proj)
    for what in ("ffn", "oneshot", "structured", "quantize_weights"):
        if what == "quantize_weights":
            pytest.importorskip("bitsandbytes")
        with pytest.raises(Unsupported):
            READS[what](model, tokens)
    assert not is_plain(mlp.down_proj)
    assert type(mlp.up_proj) is nn.Linear
