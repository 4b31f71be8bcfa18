"""Weights in formats that are no plain numbers: patterns run on them, whatever reads weights
refuses them by name.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.hf.weights import is_packed, is_plain, packing
from effattn.prune.unstructured.from_files import prune_files


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
        self.register_buffer(
            "qweight", (old.weight.detach() / self.scales[:, None]).round().to(torch.int8)
        )
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
        return nn.functional.linear(
            x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias
        )


class Unpacking(torch.Tensor):
    """A tensor class that unpacks itself in every operation, as torchao's and quanto's do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, requires_grad=False
        )

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
        kind: (is_plain(make(linear)), is_packed(make(linear)), packing(make(linear)))
        for kind, make in KINDS.items()
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
    # sees everything: the same function
    effattn.swap(model, "longformer(window=49, global_tokens=2)")
    torch.testing.assert_close(logits(model, ids), own, rtol=1e-4, atol=1e-4)
    effattn.swap(model, "sliding(window=4)", positions="ntk(factor=2, variant='fixed')")
    assert not torch.allclose(logits(model, ids), own, atol=1e-2)
    assert torch.equal(logits(effattn.restore(model), ids), own)


READS = {
    "convert_gqa": lambda model, tokens: effattn.convert_gqa(model, kv_heads=2, calibration=tokens),
    "projections": lambda model, tokens: effattn.swap(
        model, "dense", projections="monarch(blocks=8)"
    ),
    "ffn": lambda model, tokens: effattn.swap(model, projections="monarch(blocks=8, ffn=True)"),
    "oneshot": lambda model, tokens: effattn.prune.oneshot(model, tokens, sparsity=0.5),
    "structured": lambda model, tokens: effattn.prune.structured(model, tokens, heads=4),
    "quantize_weights": lambda model, tokens: effattn.quant.quantize_weights(model),
    "fold_values": lambda model, tokens: effattn.quant.fold_values(model),
    "approximation": lambda model, tokens: effattn.measure_approximation(
        model, tokens, methods=["monarch"], length=64
    ),
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


BLOCK = 32


def stored(model, folder, kind: str = "fp8"):
    """A checkpoint whose projections are 8-bit floats with a scale for each block of 32 x 32, and
    says so as `kind`.
    """
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj.weight" not in name:
            continue
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).view(weight.shape)
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": kind,
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "bits": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def names_and_dtypes(folder) -> dict:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("loader", ["effattn", "transformers"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_the_loader_unpacks_is_saved_as_plain_numbers(
    family, loader, tokens, tmp_path, monkeypatch
):
    # transformers unpacks where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, ids = tiny(family, dtype=torch.float32), tokens[None, :24]
    model.save_pretrained(tmp_path / "plain")
    folder = stored(model, tmp_path / "fp8")
    model = (
        effattn.load(folder)
        if loader == "effattn"
        else AutoModelForCausalLM.from_pretrained(folder).eval()
    )
    expected = logits(model, ids)
    effattn.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    effattn.save(effattn.swap(model, "sliding(window=6)"), tmp_path / "swapped")
    effattn.restore(model)
    for name in ("saved", "theirs"):
        assert names_and_dtypes(tmp_path / name) == names_and_dtypes(tmp_path / "plain")
        assert "quantization_config" not in json.loads(
            (tmp_path / name / "config.json").read_text()
        )
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / name).eval(), ids), expected
        )
    again = effattn.restore(effattn.load(tmp_path / "swapped"))
    assert torch.equal(logits(again, ids), expected)


def test_what_was_unpacked_is_converted_and_saved(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = effattn.load(stored(tiny("llama", dtype=torch.float32), tmp_path / "fp8"))
    effattn.convert_gqa(model, kv_heads=2, method="mean", refit=False)
    effattn.save(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(again, tokens[None, :24]), logits(model, tokens[None, :24]))
    assert set(names_and_dtypes(tmp_path / "saved").values()) == {torch.float32}


def test_formats_that_nobody_knows_are_refused(tmp_path):
    folder = stored(tiny("llama", dtype=torch.float32), tmp_path / "odd", kind="fp9")
    with pytest.raises(
        Unsupported, match=r"quant_method: got 'fp9' \(did you mean 'fp8'\?\), valid are .*gptq"
    ):
        effattn.load(folder)


@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "fp9"])
def test_files_that_hold_codes_are_not_pruned(kind, tokens, tmp_path):
    folder = stored(tiny("llama", dtype=torch.float32), tmp_path / "packed", kind=kind)
    said = f"its weights are stored as '{kind}', and working from file to file reads plain"
    with pytest.raises(Unsupported, match=said):
        prune_files(folder, tmp_path / "out", tokens, sparsity=0.5, length=64)
    assert not (tmp_path / "out").exists()
