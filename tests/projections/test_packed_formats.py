"""Every packed format, by one table: what is packed computes the same, takes the bytes it says, and
survives files, in a model whose weights fit it.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import effattn
from effattn.profiling.cost import model_cost
from effattn.projections.packed import FORMATS, BitmaskLinear, PackedLinear
from effattn.prune import pack


def two_of_four(weight):
    groups = weight.unflatten(1, (-1, 4))
    lowest = groups.abs().argsort(dim=2).argsort(dim=2) < 2
    return groups.masked_fill(lowest, 0.0).flatten(1)


def anywhere(weight):
    """Two thirds gone; rows of all lengths, one of them whole."""
    order = (
        weight.abs()
        * torch.linspace(
            0.1,
            3,
            len(weight),
        )[:, None]
    )
    return weight.masked_fill(
        order < order.quantile(2 / 3),
        0.0,
    )


# format -> what makes a weight fit it, and bytes of a packed one in fp32: (weight) -> int
ROWS = {
    "2:4": (two_of_four, lambda w: w.numel() * 4 * 17 // 32),
    "bitmask": (
        anywhere,
        lambda w: (
            int(w.count_nonzero()) * 4 + w.numel() // 8 + w.shape[0] * 4 * -(-w.shape[1] // 512)
        ),
    ),
}


def linears_of(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def pruned(name, kind="llama", **sizes):
    """A tiny model whose layers' linears have zeros as the format wants them."""
    model = tiny(kind, dtype=torch.float32, **sizes)
    with torch.no_grad():
        for module in linears_of(model).values():
            module.weight.copy_(ROWS[name][0](module.weight))
    return model


def test_every_format_has_a_row():
    assert set(FORMATS.members()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_layer_computes_the_same(name):
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for bias in (True, False):
            linear = nn.Linear(40, 24, bias).to(dtype)
            linear.weight.data = ROWS[name][0](linear.weight.data.float()).to(dtype)
            layer = FORMATS.find(name).from_linear(linear)
            assert torch.equal(layer.dense(), linear.weight)
            assert torch.equal(layer.to_linear().weight, linear.weight)
            x = (
                torch.randn(
                    3,
                    2,
                    40,
                )
                .to(dtype)
                .requires_grad_()
            )
            g = torch.randn(3, 2, 24).to(dtype)
            budget = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                layer(x),
                linear(x),
                rtol=budget,
                atol=budget,
            )
            ours, true = (
                torch.autograd.grad(
                    one(x),
                    x,
                    g,
                )[0]
                for one in (layer, linear)
            )
            torch.testing.assert_close(
                ours,
                true,
                rtol=budget,
                atol=4 * budget,
            )
            assert not layer.values.requires_grad
            assert name in repr(layer)


@pytest.mark.parametrize("name", ROWS)
def test_bytes_and_costs_are_those_of_the_parts(name):
    linear = nn.Linear(1032, 16, bias=False)
    linear.weight.data = ROWS[name][0](linear.weight.data)
    layer = FORMATS.find(name).from_linear(linear)
    held = sum(one.nbytes for one in (*layer.parameters(), *layer.buffers()))
    assert layer.nbytes == held == ROWS[name][1](linear.weight)
    cost = layer.cost(3)
    assert cost.flops == 2 * 3 * layer.values.numel()
    assert cost.read_bytes == held + 3 * 1032 * 4
    assert cost.write_bytes == 3 * 16 * 4
    assert (
        layer.cost(
            3,
            backward=True,
        ).read_bytes
        == held + cost.write_bytes
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_model_is_packed_saved_and_loaded(name, tmp_path, tokens):
    model, ids = (
        pruned(
            name,
            num_key_value_heads=2,
        ),
        tokens[:40][None],
    )
    before, dense = (
        model(ids).logits,
        model_cost(
            model,
            1,
            1,
        ),
    )
    expected = sum(ROWS[name][1](one.weight) for one in linears_of(model).values())
    report = pack(model, format=name)
    assert len(report.packed) == 14
    assert not report.dense
    assert report.bytes_after == expected < report.bytes_before
    torch.testing.assert_close(model(ids).logits, before)
    assert pack(model, format=name).packed == ()  # again changes nothing
    cost = model_cost(model, 1, 1)
    saved = report.bytes_before - report.bytes_after
    assert dense.weight_bytes - cost.weight_bytes == saved
    assert dense.step_bytes - cost.step_bytes == saved
    assert cost.total.flops < dense.total.flops
    assert cost.activation_bytes == dense.activation_bytes
    assert effattn.describe(model).layers[0]["projections"] == name

    effattn.save(model, tmp_path / "packed")
    again = effattn.load(tmp_path / "packed")
    assert torch.equal(
        again(ids).logits,
        model(ids).logits,
    )
    assert again.config.effattn == model.config.effattn
    half = effattn.load(tmp_path / "packed", dtype=torch.bfloat16)
    assert next(iter(half.model.layers[0].mlp.up_proj.parameters())).dtype == torch.bfloat16
    half(ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(
        effattn.load(tmp_path / "theirs")(ids).logits,
        model(ids).logits,
    )

    effattn.swap(again, projections={"0": "dense"})
    assert isinstance(
        again.model.layers[0].self_attn.q_proj,
        nn.Linear,
    )
    torch.testing.assert_close(again(ids).logits, before)


FRESH = """
import sys, torch, effattn
from safetensors.torch import save_file
model = effattn.load(sys.argv[1])
ids = torch.arange(24)[None]
save_file({"logits": model(ids).logits.detach().contiguous()}, sys.argv[2])
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    """Both formats in one model."""
    model = pruned("2:4")
    pack(model)
    twin = pruned("bitmask")
    pack(twin, format="bitmask")
    model.model.layers[1] = twin.model.layers[1]
    effattn.save(model, tmp_path / "packed")
    answer = tmp_path / "logits.safetensors"
    subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "packed", answer],
        check=True,
    )
    ids = torch.arange(24)[None]
    assert torch.equal(
        load_file(answer)["logits"],
        model(ids).logits,
    )
    kinds = [type(layer.mlp.up_proj) for layer in effattn.load(tmp_path / "packed").model.layers]
    assert kinds == [PackedLinear, BitmaskLinear]


def test_a_save_from_before_there_were_formats_loads(tmp_path, tokens):
    model = pruned("2:4")
    pack(model)
    effattn.save(model, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    config["effattn"]["packed"] = list(config["effattn"]["packed"])
    file.write_text(json.dumps(config))
    ids = tokens[:24][None]
    assert torch.equal(
        effattn.load(tmp_path / "old")(ids).logits,
        model(ids).logits,
    )


ENTRIES = [
    (
        {"format": "bitmap", "nonzeros": 9},
        "did you mean 'bitmask'",
    ),
    (
        {"format": "bitmask"},
        "valid is format, nonzeros",
    ),
    (
        {"format": "bitmask", "nonzeros": 2.5},
        "valid is format, nonzeros",
    ),
    (
        {"format": "bitmask", "nonzeros": 10**15},
        "valid for 64 x 64 weights is 1 to 4,096",
    ),
    (
        {"format": "bitmask", "nonzeros": 5},
        "values",
    ),
    (
        {"format": "2:4", "nonzeros": 5},
        "valid is format",
    ),
    (
        "bitmask",
        "an object with a format",
    ),
]


@pytest.mark.parametrize(
    ("entry", "said"),
    ENTRIES,
    ids=[said for _, said in ENTRIES],
)
def test_records_are_checked(entry, said, tmp_path):
    model = pruned("bitmask")
    pack(model, format="bitmask")
    effattn.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["effattn"]["packed"]["model.layers.0.self_attn.q_proj"] = entry
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        effattn.load(tmp_path / "saved")


def test_starts_that_lie_are_refused(tmp_path):
    """Kernels read where they say."""
    model = pruned("bitmask")
    pack(model, format="bitmask")
    effattn.save(model, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.starts"] += 10**6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"weights: {name}: starts"):
        effattn.load(tmp_path / "saved")


def test_what_does_not_fit_stays_and_is_named():
    model = pruned("bitmask")
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    report = pack(model, format="bitmask")
    (name,) = report.dense
    assert name == "model.layers.1.mlp.up_proj"
    assert "0.0% of it are zeros, above" in report.dense[name]
    assert type(model.lm_head) is nn.Linear
    assert pack(pruned("2:4"), format="bitmask").bytes_after  # half of the weights, too


def test_bad_input():
    with pytest.raises(ValueError, match=r"format: got 'bitmasks' \(did you mean 'bitmask'\?\)"):
        pack(pruned("2:4"), format="bitmasks")
    with pytest.raises(ValueError, match="none of its 14 linear layers is smaller with a bitmask"):
        pack(tiny("llama"), format="bitmask")
    with pytest.raises(ValueError, match="large: got 'semi_structured', valid are 'unpack'"):
        pack(pruned("bitmask"), format="bitmask", large="semi_structured")
    with pytest.raises(ValueError, match="multiple of 8"):
        BitmaskLinear(12, 4)
    with pytest.raises(ValueError, match=r"nonzeros: got 33, valid for 4 x 8 weights is 1 to 32"):
        BitmaskLinear(8, 4, nonzeros=33)


def test_autocast_and_casts():
    linear = nn.Linear(64, 16)
    linear.weight.data = anywhere(linear.weight.data)
    layer = BitmaskLinear.from_linear(copy.deepcopy(linear)).to(torch.bfloat16)
    assert layer.masks.dtype == torch.uint8
    assert layer.starts.dtype == torch.int32
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(),
        linear(x),
        rtol=0.05,
        atol=0.05,
    )


def test_torch_compiles_a_layer_in_one_graph():
    linear = nn.Linear(64, 16)
    linear.weight.data = anywhere(linear.weight.data)
    layer = BitmaskLinear.from_linear(linear)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64)
    torch.testing.assert_close(compiled(x), linear(x))
