"""GGUF files: what is in them, that they are the model, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import SMALL

import effattn
from effattn import embedded
from effattn.errors import Unsupported
from effattn.exporting import capabilities, gguf_file, gguf_tokenizer, llama_cpp
from effattn.hf import anatomy
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

gguf = pytest.importorskip("gguf")
IDS = torch.arange(3, 35).view(
    2,
    16,
)
SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "max_position_embeddings": 1024,
}
KINDS = {
    "llama": ("Llama", {}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "biased": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),  # what transformers' reader takes it for
    "tied": ("Llama", {"tie_word_embeddings": True}),
}


def tiny(kind: str, **settings):
    """A random model that the embedded tokenizer fits."""
    import transformers

    name, own = KINDS[kind]
    config = getattr(transformers, f"{name}Config")
    fields = SMALL | SHAPE | {"vocab_size": 3100, "pad_token_id": 0} | own | settings
    torch.manual_seed(0)
    model = getattr(
        transformers,
        f"{name}ForCausalLM",
    )(config(**fields)).eval()
    with torch.no_grad():  # biases and norms begin as zeros and ones
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(
                    torch.randn_like(parameter),
                    alpha=0.1,
                )
    return model


def saved(model, folder):
    effattn.save(
        model,
        folder,
        embedded.tokenizer(),
    )
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind not in ("llama3", "biased")],
)
def test_a_file_is_the_model_to_the_bit(kind, tmp_path, monkeypatch):
    """By transformers' own reader of these files."""
    monkeypatch.setenv(
        "EFFATTN_CACHE",
        str(tmp_path / "cache"),
    )
    model = tiny(kind)
    report = effattn.export(
        saved(
            model,
            tmp_path / "model",
        ),
        to="gguf",
        output=tmp_path / "out",
        format="f32",
    )
    again = effattn.load(
        tmp_path / "out" / "model.gguf",
        dtype=torch.float32,
    )
    assert torch.equal(
        logits(again),
        logits(model),
    )
    assert set(report.data["files"]) == {"model.gguf"}
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"model.gguf", "report.json"}


def read(file) -> tuple[dict, dict]:
    """Fields and tensors of a file, dequantized."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        one.name: torch.from_numpy(
            gguf.quants.dequantize(
                one.data,
                one.tensor_type,
            ).copy()
        )
        for one in reader.tensors
    }
    return fields, tensors


def uneven(model):
    """Two query heads for each K/V head, no attention in layer 2, no FFN in layer 3."""
    heads = [torch.arange(count) for count in (2, 1, 0, 2)]
    widths = [torch.arange(width) for width in (96, 32, 64, 0)]
    return slice_model(
        model,
        Keep(heads=heads, ffn=widths),
        uniform=False,
    )


def test_layers_that_differ_are_deci(tmp_path):
    model = uneven(
        tiny(
            "llama",
            num_hidden_layers=4,
        )
    )
    folder = saved(model, tmp_path / "model")
    effattn.export(
        folder,
        to="gguf",
        output=tmp_path / "m.gguf",
        format="f32",
    )
    assert {file.name for file in tmp_path.iterdir()} == {"model", "m.gguf"}
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2, 0, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 1, 0, 2]
    assert fields["deci.feed_forward_length"] == [96, 32, 64, 32]
    assert not [name for name in tensors if name.startswith("blk.2.attn")]
    for name in ("gate", "up", "down"):  # llama.cpp leaves out all of a layer without an FFN
        assert not tensors[f"blk.3.ffn_{name}.weight"].any()
    assert torch.equal(
        tensors["blk.1.ffn_down.weight"],
        model.model.layers[1].mlp.down_proj.weight,
    )


def test_rows_of_queries_and_keys_are_in_pairs_side_by_side(tmp_path):
    model = tiny("llama")
    file = tmp_path / "m.gguf"
    effattn.export(
        saved(model, tmp_path / "model"),
        to="gguf",
        output=file,
        format="f32",
    )
    _, tensors = read(file)
    layer = anatomy.of(model).layers[1]
    for name, heads, weight in (
        ("q", 4, layer.q.module.weight),
        ("k", 2, layer.k.module.weight),
    ):
        theirs, ours = (
            tensors[f"blk.1.attn_{name}.weight"].view(
                heads,
                32,
                -1,
            ),
            weight,
        )
        ours = ours.view(
            heads,
            32,
            -1,
        )
        assert torch.equal(
            theirs[:, 0::2],
            ours[:, :16],
        )
        assert torch.equal(
            theirs[:, 1::2],
            ours[:, 16:],
        )
    assert torch.equal(
        tensors["blk.1.attn_v.weight"],
        layer.v.module.weight,
    )


@pytest.mark.parametrize(
    ("kind", "size"),
    [("f16", 2), ("bf16", 2), ("q8_0", 34 / 32)],
)
def test_formats_round_and_no_more(kind, size, tmp_path):
    model = tiny("llama")
    folder = saved(model, tmp_path / "model")
    effattn.export(
        folder,
        to="gguf",
        output=tmp_path / "m.gguf",
        format=kind,
    )
    _, tensors = read(tmp_path / "m.gguf")
    weight = model.model.layers[0].mlp.up_proj.weight
    found = tensors["blk.0.ffn_up.weight"]
    steps = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[kind]
    assert (found - weight).abs().max() <= steps * weight.abs().max()
    assert torch.equal(
        tensors["output_norm.weight"],
        model.model.norm.weight,
    )
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert (tmp_path / "m.gguf").stat().st_size < size * matrices + 300_000


def test_the_tokenizer_is_in_the_file(tmp_path):
    model, tokenizer = tiny("llama"), embedded.tokenizer()
    effattn.export(
        saved(model, tmp_path / "model"),
        to="gguf",
        output=tmp_path / "m.gguf",
    )
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 3100
    assert tokens[:3072] == tokenizer.convert_ids_to_tokens(list(range(3072)))
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[0] == gguf_tokenizer.CONTROL
    assert set(kinds[3072:]) == {gguf_tokenizer.UNUSED}
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def split(*steps) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA3 = next(iter(gguf_tokenizer.SPLITS))


@pytest.mark.quick
def test_rules_that_split_text_have_llama_cpps_names():
    regex = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    assert (
        gguf_tokenizer.rule_of(
            split(
                regex,
                BYTES,
            )
        )
        == "llama-bpe"
    )
    assert (
        gguf_tokenizer.rule_of(
            split(
                digits,
                BYTES | {"use_regex": True},
            )
        )
        == "smollm"
    )
    qwen = copy.deepcopy(regex)
    qwen["pattern"]["Regex"] = LLAMA3.replace(
        "{1,3}",
        "",
    )
    assert (
        gguf_tokenizer.rule_of(
            split(
                qwen,
                BYTES,
            )
        )
        == "qwen2"
    )
    qwen["pattern"]["Regex"] = r"\w+"
    for other in (
        split(
            qwen,
            BYTES,
        ),
        None,
        {"type": "Whitespace"},
    ):
        with pytest.raises(
            Unsupported,
            match=r"no name of llama\.cpp's",
        ):
            gguf_tokenizer.rule_of(other)


def test_zeros_are_dense(tmp_path):
    model = tiny("llama")
    effattn.prune.oneshot(
        model,
        torch.arange(3000),
        method="magnitude",
        sparsity="2:4",
    )
    expected = model.model.layers[0].mlp.up_proj.weight.clone()
    effattn.prune.pack(
        model,
        format="2:4",
    )
    folder = saved(model, tmp_path / "model")
    report = effattn.export(
        folder,
        to="gguf",
        output=tmp_path / "m.gguf",
        format="f32",
    )
    _, tensors = read(tmp_path / "m.gguf")
    assert torch.equal(
        tensors["blk.0.ffn_up.weight"],
        expected,
    )
    assert "packed matrices are dense" in report.data["notes"][0]


LOST = {
    "pattern": (
        {"pattern": "sliding(window=4, sinks=1)"},
        r"sliding\(window=4, sinks=1\) in layers 0, 1",
    ),
    "cache": ({"cache": "int8(group=16)"}, "its own formats, by its flags"),
    "positions": ({"positions": "rerope(window=4)"}, "rules that transformers has not"),
    "projections": ({"projections": "monarch(blocks=8, rank=4)"}, "multiplies them out"),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize(
    "to",
    ["gguf", "vllm", "transformers"],
)
def test_parts_that_the_engine_has_not_are_named(name, to, tmp_path):
    swap, message = LOST[name]
    folder = saved(
        effattn.swap(tiny("llama"), **swap),
        tmp_path / "model",
    )
    with pytest.raises(
        Unsupported,
        match=message if to == "gguf" else capabilities.ENGINES[to],
    ):
        effattn.export(
            folder,
            to=to,
            output=tmp_path / "out",
        )
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "guff"}, "did you mean 'gguf'"),
        ({"to": "gguf", "format": "q8"}, "did you mean 'q8_0'"),
        ({"to": "vllm", "format": "f16"}, "it is of GGUF files"),
        ({"to": "vllm", "check": True}, "vLLM is not run"),
        ({"to": "gguf", "before": "x"}, "with to='gguf' and check=True"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(arguments, message, tmp_path):
    with pytest.raises(
        ValueError,
        match=message,
    ):
        effattn.export(
            "no/such/model",
            output=tmp_path / "out",
            **arguments,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "'yarn' with truncate=False",
        ),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
    ],
)
def test_settings_that_llama_cpp_has_not(settings, message, tmp_path):
    rope = settings.get("rope_parameters")
    settings = settings | ({"rope_parameters": {"rope_theta": 1e4} | rope} if rope else {})
    folder = saved(
        tiny("llama", **settings),
        tmp_path / "model",
    )
    with pytest.raises(
        Unsupported,
        match=message,
    ):
        effattn.export(
            folder,
            to="gguf",
            output=tmp_path / "out",
        )


def test_another_family_and_a_window_are_refused_by_name(tmp_path):
    import transformers

    model = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SMALL | SHAPE | {"vocab_size": 3100})
    )
    with pytest.raises(
        Unsupported,
        match=r"GemmaForCausalLM .*valid are causal models of llama",
    ):
        effattn.export(
            saved(model, tmp_path / "gemma"),
            to="gguf",
            output=tmp_path / "out",
        )
    windowed = tiny(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
    )
    with pytest.raises(
        Unsupported,
        match="layers with a window",
    ):
        effattn.export(
            saved(windowed, tmp_path / "qwen"),
            to="gguf",
            output=tmp_path / "out",
        )


def test_numbers_beyond_float16_name_the_weight(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    folder = saved(model, tmp_path / "model")
    with pytest.raises(
        ValueError,
        match=r"ffn_down.weight has numbers beyond 65,504.*bf16",
    ):
        effattn.export(
            folder,
            to="gguf",
            output=tmp_path / "m.gguf",
        )
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_a_missing_engine_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    with pytest.raises(
        ValueError,
        match=r"pip install 'effattn\[llama-cpp\]'",
    ):
        effattn.export(
            "embedded",
            to="gguf",
            output=tmp_path / "out",
            check=True,
        )


def test_an_output_that_exists_is_left_alone(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_text("mine")
    with pytest.raises(
        ValueError,
        match="exists; nothing was written",
    ):
        effattn.export(
            "embedded",
            to="gguf",
            output=file,
        )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["~/m.gguf", "file/m.gguf", "link.gguf", "m.gguf"])
def test_a_file_that_cannot_be_is_refused_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link.gguf").symlink_to("nowhere")
    (tmp_path / "m.gguf.parts").mkdir()
    (tmp_path / "m.gguf.parts" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^output: "):
        effattn.export("no/such/model", to="gguf", output=name)
    assert sorted(tmp_path.rglob("*")) == before


# ---- in llama.cpp
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    pytest.importorskip(llama_cpp.PACKAGE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def converted():
    model, _ = embedded.load()
    ids = embedded.tokens("train", 4096)
    effattn.convert_gqa(
        model,
        kv_heads=2,
        calibration=ids,
    )
    return model


def cut():
    model, _ = embedded.load()
    ids = embedded.tokens("train", 8192)
    small, _ = effattn.prune.structured(
        model, ids, heads=4, ffn=0.25, uniform=False, criterion="flap", compensate=False
    )
    return small


@pytest.mark.parametrize(
    "make",
    [converted, cut],
)
def test_llama_cpp_computes_the_same(make, engine, tmp_path):
    folder = saved(
        make(),
        tmp_path / "model",
    )
    report = effattn.export(
        folder,
        to="gguf",
        output=tmp_path / "out",
        check=True,
    )
    check = report.data["check"]
    assert check["equal_tokens"] == check["tokens"] > 200
    assert 0 <= check["kl"] < 1e-4
    assert report.data["speeds"][0]["after"] > 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["check"] == check


@pytest.mark.parametrize("widths", [(96, 0, 64), (96, 96, 0)])
@pytest.mark.parametrize("heads", [(2, 1, 2), (2, 1, 0)])
def test_layers_without_an_ffn_keep_their_attention_there(heads, widths, engine, tmp_path):
    keep = Keep(heads=[*map(torch.arange, heads)], ffn=[*map(torch.arange, widths)])
    folder = saved(
        slice_model(tiny("llama", num_hidden_layers=3), keep, uniform=False), tmp_path / "model"
    )
    report = effattn.export(folder, to="gguf", output=tmp_path / "out", format="f32", check=True)
    assert report.data["check"]["kl"] < 1e-6
    assert "1 layers without an FFN have one of zeros" in report.data["notes"]


@pytest.mark.parametrize(
    "kind",
    ["llama3", "biased", "qwen2", "qwen3"],
)
def test_llama_cpp_knows_every_family(kind, engine, tmp_path):
    """Random models: what counts is how far their distributions are."""
    folder = saved(
        tiny(kind),
        tmp_path / "model",
    )
    report = effattn.export(
        folder,
        to="gguf",
        output=tmp_path / "out",
        check=True,
    )
    assert report.data["check"]["kl"] < 1e-5


def test_a_file_of_another_model_does_not_pass(engine, tmp_path, monkeypatch):
    """Rows of queries and keys that stay where they were: it loads, and computes something else."""
    monkeypatch.setattr(gguf_file, "INTERLEAVED", ())
    with pytest.raises(
        RuntimeError,
        match=r"llama\.cpp",
    ):
        effattn.export(
            "embedded",
            to="gguf",
            output=tmp_path / "out",
            check=True,
        )
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_one_line(engine, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    question = {"prompts": [[1]], "new": 1, "full": 0, "vocabulary": 1, "threads": 1}
    with pytest.raises(
        RuntimeError,
        match=r"llama\.cpp cannot run",
    ) as raised:
        llama_cpp.ask(tmp_path / "m.gguf", question)
    assert "\n" not in str(raised.value)


def test_a_parent_that_is_not_there_is_said_before_any_work(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(gguf_file, "write", None)
    with pytest.raises(ValueError, match=r"^before: got '\./nowhere'"):
        effattn.export(
            "embedded", to="gguf", output=tmp_path / "out", check=True, before="./nowhere"
        )
    assert not list(tmp_path.iterdir())
