"""OpenVINO models: that they compute the same with their cache, in every situation; refusals."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL

import effattn
from effattn import embedded
from effattn.errors import Unsupported
from effattn.exporting import openvino_cpu, openvino_model
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3100,
    "max_position_embeddings": 1024,
}
IDS = torch.randint(3, 3000, (2, 24), generator=torch.Generator().manual_seed(0))


def tiny(kind: str = "Llama", **settings):
    """A random model that the embedded tokenizer fits, with distributions that are not flat."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | SHAPE | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def uneven(*heads: int):
    """Layers with so many groups of heads, 0 for a layer without attention; the first FFN is
    narrower."""
    widths = [48, *[64] * (len(heads) - 1)]
    keep = Keep(
        heads=[torch.arange(count) for count in heads],
        ffn=[torch.arange(width) for width in widths],
    )
    return slice_model(tiny(num_hidden_layers=len(heads)), keep, uniform=False)


def exported(model, tmp_path, **options):
    effattn.save(model, tmp_path / "model", embedded.tokenizer())
    return effattn.export(
        tmp_path / "model", to="openvino", output=tmp_path / "out", format="f32", **options
    )


@pytest.fixture
def engine(monkeypatch):
    # not imported: the package tells its makers of that, where `runtime` does not keep it from it
    if importlib.util.find_spec(openvino_cpu.PACKAGE) is None:
        pytest.skip("OpenVINO is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Reader:
    """The exported model, asked as a server would."""

    def __init__(self, folder):
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        with openvino_cpu.runtime() as openvino:
            file = str(folder / openvino_cpu.FILE)
            compiled = openvino.Core().compile_model(file, "CPU", exact)
        self.request = compiled.create_infer_request()

    def __call__(self, ids, mask, places, beams=None):
        beams = range(len(ids)) if beams is None else beams
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": places.numpy(),
            "beam_idx": np.array(list(beams), dtype=np.int32),
        }
        return torch.from_numpy(self.request.infer(given)["logits"].copy())


@torch.no_grad()
def same_everywhere(model, folder) -> None:
    """Chunks, steps, padding on the left, other batches and beams, against the whole."""
    reader, mask = Reader(folder), torch.ones_like(IDS)
    expected = model(IDS).logits
    places = torch.arange(IDS.shape[1]).expand_as(IDS)
    cuts = [0, 10, 11, 12, 24]
    found = [reader(IDS[:, a:b], mask[:, :b], places[:, a:b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-4, rtol=1e-4)
    # the beams change places, then go on
    last = model(IDS[[1, 0, 0]][:, :24]).logits[:, -4:]
    reader.request.reset_state()
    reader(IDS[:, :20], mask[:, :20], places[:, :20])
    again = reader(
        IDS[[1, 0, 0]][:, 20:], mask[:1].expand(3, -1), places[:1, 20:].expand(3, -1), (1, 0, 0)
    )
    torch.testing.assert_close(again, last, atol=2e-4, rtol=1e-4)
    # one of two is shorter, and padded
    reader.request.reset_state()
    padded = mask.clone()
    padded[1, :7] = 0
    own = (padded.cumsum(1) - 1).clamp(min=0)
    found = reader(IDS, padded, own)
    torch.testing.assert_close(found[1, 7:], model(IDS[1:, 7:]).logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_layers_that_differ_compute_the_same_there(engine, tmp_path):
    model = uneven(2, 1)
    report = exported(model, tmp_path, check=True)
    check = report.data["check"]
    assert check["equal_tokens"] == check["tokens"] == 320
    assert check["kl"] < 1e-8
    assert check["numbers"] == "f32, cache f32"
    assert [row["context"] for row in report.data["speeds"]] == [512]
    assert report.data["speeds"][0]["after"] > 0
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json"} <= set(
        report.data["files"]
    )
    same_everywhere(model, tmp_path / "out")
    assert not (tmp_path / "out" / ".before").exists()


@pytest.mark.slow
def test_a_layer_without_attention_is_left_out(engine, tmp_path):
    model = uneven(2, 0, 1)
    exported(model, tmp_path)
    same_everywhere(model, tmp_path / "out")


FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Phi3": {"pad_token_id": 0},
    "GPTNeoX": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_compute_the_same_there(kind, engine, tmp_path):
    model = tiny(kind, **FAMILIES[kind])
    exported(model, tmp_path)
    same_everywhere(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_windows_are_in_the_mask(kind, engine, tmp_path):
    model = effattn.swap(tiny(kind, head_dim=16), {"1": "sliding(window=6)"})
    report = exported(model, tmp_path)
    assert "the cache keeps all tokens" in report.data["notes"][-1]
    same_everywhere(model, tmp_path / "out")


@pytest.mark.slow
def test_zeros_16_bits_and_the_parents_speed(engine, tmp_path):
    model = tiny()
    effattn.prune.oneshot(model, torch.arange(3000), method="magnitude", sparsity="2:4")
    effattn.prune.pack(model, format="2:4")
    effattn.save(model.bfloat16(), tmp_path / "model", embedded.tokenizer())
    report = effattn.export(
        tmp_path / "model",
        to="openvino",
        output=tmp_path / "out",
        check=True,
        before=tmp_path / "model",
    )
    assert "packed matrices are dense" in report.data["notes"][0]
    assert report.data["check"]["kl"] < 1e-4
    assert report.data["speeds"][0]["before"] > 0
    matrices = sum(p.numel() for p in effattn.load(tmp_path / "model").parameters())
    assert report.data["files"]["openvino_model.bin"] < 2.2 * max(matrices, 3100 * 64)


@pytest.mark.slow
def test_another_model_does_not_pass(engine, tmp_path, monkeypatch):
    write = openvino_model.write

    def other(model, folder, format):
        changed = tiny()
        changed.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
        write(changed, folder, format)

    monkeypatch.setattr(openvino_model, "write", other)
    with pytest.raises(RuntimeError, match="OpenVINO"):
        exported(tiny(), tmp_path, check=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_text_are_refused(rule, tmp_path):
    said = {"rope_type": rule, "rope_theta": 1e4, "factor": 2.0}
    if rule == "longrope":
        said |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        said |= {"original_max_position_embeddings": 32}
    from effattn.hf import anatomy

    with pytest.raises(Unsupported, match=f"scaled by '{rule}'.*valid there are linear"):
        openvino_model.check(anatomy.of(tiny(rope_parameters=said)))


def test_what_it_has_not_is_named(engine, tmp_path):
    model = effattn.swap(tiny(), "sliding(window=4, sinks=1)", cache="int8(group=16)")
    with pytest.raises(Unsupported, match=r"OpenVINO cannot express.*sinks.*a packed cache"):
        exported(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_traced_is_one_line(engine, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no such operation\nand more")

    monkeypatch.setattr(openvino_model, "_example", fails)
    with pytest.raises(Unsupported, match=r"cannot export LlamaForCausalLM: .*no such operation$"):
        exported(tiny(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_a_missing_engine_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_cpu, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install 'effattn\[openvino\]'"):
        effattn.export("embedded", to="openvino", output=tmp_path / "out")


def test_a_format_of_another_target_is_named(engine, tmp_path):
    with pytest.raises(ValueError, match=r"'q8_0'.*f16.*f32"):
        effattn.export("embedded", to="openvino", output=tmp_path / "out", format="q8_0")


def test_a_broken_file_is_one_line(engine, tmp_path):
    (tmp_path / openvino_cpu.FILE).write_text("<net")
    with pytest.raises(RuntimeError, match="OpenVINO cannot run") as raised:
        openvino_cpu.ask(tmp_path, {"threads": 1})
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_one_line(engine, tmp_path):
    with openvino_cpu.runtime() as openvino:
        ops = importlib.import_module("openvino.opset14")
        given = ops.parameter([1, 8], np.float32)
        made = openvino.Model([ops.matmul(given, np.eye(8, dtype="f4"), False, False)], [given])
        (tmp_path / "m.bin").mkdir()  # where its weights would be
        with pytest.raises(OSError, match=r"^output: m.xml cannot be written \(.*\)$"):
            openvino_model.save(openvino, made, tmp_path / "m.xml")


def test_nobody_is_told(engine, monkeypatch):
    """The package's own events go nowhere, whoever imported it before."""
    with openvino_cpu.runtime() as openvino:
        tells = sys.modules["openvino.tools.ovc.telemetry_utils"]
        assert tells.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
        assert openvino.__name__ == "openvino"
    assert sys.modules.get(openvino_cpu.TELLS, "absent") is not None
