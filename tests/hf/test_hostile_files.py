"""A config.json from outside: one clear line for whatever it holds, before anything is built, run
or asked.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import SMALL
from transformers import LlamaConfig, LlamaForCausalLM

import effattn
from effattn.surgery import checkpoint

SPEC = "sliding(window=4)"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A swapped checkpoint: its folder, and its config.json as an object."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    torch.manual_seed(0)
    effattn.save(effattn.swap(LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), SPEC), folder)
    return folder, json.loads((folder / "config.json").read_text())


def refused(folder, text: str | bytes) -> str:
    """The one line with which config.json is refused."""
    file = folder / "config.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r".") as caught:
        effattn.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600, message
    return message


def nested(depth: int, leaf=1):
    for _ in range(depth):
        leaf = {"a": leaf}
    return leaf


LOW_RANK = {"rank": 8, "spec": "lowrank(rank=8)", "error": 0.1, "output_error": None}
MONARCH = {"blocks": 8, "rank": 2, "spec": "monarch(blocks=8)", "error": 0.1, "output_error": None}

RECORDS = [
    ([], "effattn: got []"),
    ({}, "effattn: got {}"),
    ("pattern", "effattn: got 'pattern'"),
    (None, "effattn: got None"),
    (3, "effattn: got 3"),
    ({"patern": {"0": SPEC}}, "did you mean 'pattern'"),
    ({"_attn_implementation": "eager"}, "effattn: got '_attn_implementation'"),
    ({"pattern": SPEC}, "pattern: got 'sliding"),
    ({"pattern": {}}, "pattern: got no layers"),
    ({"pattern": {"2": SPEC}}, "got layer '2', valid are those of the model, '0' to '1'"),
    ({"pattern": {"-1": SPEC}}, "got layer '-1'"),
    ({"pattern": {"0-1": SPEC}}, "got layer '0-1'"),
    ({"pattern": {"9" * 5000: SPEC}}, "got layer"),
    ({"pattern": {"0": 3}}, "0: got 3, valid is a spec"),
    ({"pattern": {"0": [SPEC]}}, "valid is a spec"),
    ({"pattern": {"0": nested(20)}}, "valid is a spec"),
    ({"pattern": {"0": "slidign(window=4)"}}, "did you mean 'sliding'"),
    ({"pattern": {"0": "sliding(windows=4)"}}, "did you mean 'window'"),
    ({"pattern": {"0": "sliding(window=__import__('os'))"}}, "is not a literal value"),
    ({"pattern": {"0": "(" * 9000 + ")" * 9000}}, "valid is a spec"),
    (
        {"pattern": {"0": "linformer(k=1000000000, max_length=1000000000)"}},
        "k: got 1000000000, valid here is up to",
    ),
    ({"pattern": {"0": "linformer(k=1000000, max_length=1000000)"}}, "too large together"),
    (
        {"pattern": {"0": "longformer(window=4, global_tokens=[0, 99999999999])"}},
        "global_tokens: got 99999999999",
    ),
    ({"pattern": {"0": "performer(features=1" + "0" * 400 + ")"}}, "features: got"),
    ({"pattern": {"0": "sliding(window=-4)"}}, "window"),
    ({"positions": {"0": "yarn(factor=nan)"}}, "positions: 0"),
    ({"positions": {"0": "yarn(factor=1e999)"}}, "positions: 0"),
    ({"positions": {"0": "yarm(factor=4)"}}, "did you mean 'yarn'"),
    ({"positions": ["rerope(window=4)"]}, "positions: got"),
    ({"cache": {"0": "int5"}}, "did you mean 'int"),
    ({"cache": {"0": None}}, "valid is a spec"),
    ({"trained": [1]}, "trained: got [1]"),
    ({"trained": {"_attn_implementation": "eager"}}, "trained: got '_attn_implementation'"),
    ({"trained": {"save_pretrained": 1}}, "trained: got 'save_pretrained'"),
    ({"trained": {"hidden_size": 7}}, "trained: got 'hidden_size'"),
    ({"trained": {"max_position_embeddings": "8"}}, "valid is a number of tokens"),
    ({"trained": {"max_position_embeddings": -8}}, "valid is a number of tokens"),
    ({"trained": {"rope_parameters": "yarn"}}, "rope_parameters: got 'yarn'"),
    ({"trained": {"rope_parameters": {"rope_theta": float("nan")}}}, "rope_theta: got nan"),
    ({"trained": {"rope_parameters": nested(40)}}, "nested too deeply"),
    ({"projections": ["x"]}, "projections: got ['x']"),
    (
        {"projections": {"model.layers.0.mlp.up_proj": MONARCH | {"blocks": 10**15}}},
        "blocks: got 1000000000000000",
    ),
    ({"projections": {"model.layers.0.mlp.up_proj": MONARCH | {"blocks": "8"}}}, "blocks: got '8'"),
    (
        {"projections": {"model.layers.0.mlp.up_proj": LOW_RANK | {"rank": 10**15}}},
        "rank: got 1000000000000000",
    ),
    ({"projections": {"model.layers.0.mlp.up_proj": LOW_RANK | {"rank": None}}}, "rank: got None"),
    (
        {"projections": {"model.layers.0.mlp.up_proj": MONARCH | {"error": float("inf")}}},
        "error: got inf",
    ),
    (
        {"projections": {"model.layers.0.mlp.up_proj": MONARCH | {"more": 1}}},
        "does not fit the model",
    ),
    ({"projections": {"model.layers.0.mlp": MONARCH}}, "'model.layers.0.mlp': "),
    ({"projections": {"__class__.x": MONARCH}}, "'__class__.x': "),
    ({"packed": "model.layers.0.mlp.up_proj"}, "packed: got 'model"),
    ({"packed": [3]}, "packed: got [3]"),
    ({"packed": ["../x"]}, "no linear layer '../x'"),
    ({"model_type": "llama", "pattern": {"0": SPEC}}, "model_type: it belongs to a config.json"),
]


@pytest.mark.parametrize(("record", "message"), RECORDS, ids=[message for _, message in RECORDS])
def test_what_was_swapped_is_checked(record, message, saved):
    folder, config = saved
    assert message in refused(folder, json.dumps(config | {"effattn": record}))


FIELDS = [
    ({"model_type": "lama"}, "did you mean 'llama'"),
    ({"model_type": None}, "model_type: got None"),
    ({"model_type": ["llama"]}, "model_type: got ['llama']"),
    ({"model_type": "effattn"}, "model_type"),
    ({"model_type": "goat", "auto_map": {"AutoConfig": "code.Config"}}, "model_type: got 'goat'"),
    ({"attn_implementation": "kernels-community/flash-attn"}, "code from the hub is never run"),
    (
        {"_attn_implementation": "kernels-community/flash-attn:run"},
        "code from the hub is never run",
    ),
    ({"_attn_implementation": {"": "owner/name"}}, "code from the hub is never run"),
    ({"attn_implementation": 3}, "attn_implementation: got 3"),
    ({"experts_implementation": "owner/name"}, "code from the hub is never run"),
    ({"save_pretrained": "x"}, "'save_pretrained' is no setting of a model"),
    ({"get_text_config": {}}, "is no setting of a model"),
    ({"_auto_class": "x"}, "is no setting of a model"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers: got 1000000000000"),
    ({"num_hidden_layers": 1e30}, "num_hidden_layers: got 1e+30"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    ({"num_labels": 10**10}, "num_labels: got 10000000000"),
    ({"hidden_size": -64}, "negative dimension"),
    ({"hidden_size": 10**30}, "config.json"),
    ({"num_attention_heads": 0}, ""),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
    ({"rope_parameters": {"rope_theta": float("-inf")}}, "rope_parameters: rope_theta: got -inf"),
    ({"rope_parameters": 3}, "rope_parameters"),
    ({"dtype": "evil"}, "dtype: got 'evil'"),
    ({"torch_dtype": 3}, "torch_dtype: got 3"),
    ({"quantization_config": "nf4"}, "quantization_config: got 'nf4'"),
    ({"id2label": 3}, "id2label: got 3"),
    ({"hidden_act": "zz"}, "zz"),
    ({"pad_token_id": 1000}, "adding_idx"),
    ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
    ({"anything": nested(200)}, "nested too deeply"),
]


@pytest.mark.parametrize(
    ("fields", "message"), FIELDS, ids=[f"{next(iter(f))}={m}" for f, m in FIELDS]
)
def test_entries_of_a_config_are_checked(fields, message, saved):
    folder, config = saved
    plain = {k: v for k, v in config.items() if k not in ("effattn", "quantization_config")}
    assert message in refused(folder, json.dumps(plain | fields))


TEXTS = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"null", "it holds NoneType"),
    (b"[1, 2]", "it holds list"),
    (b'"llama"', "it holds str"),
    (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
    (b'{"model_type": "ll\xe4ma"}', "is not UTF-8"),
    (b'\xef\xbb\xbf{"model_type": "llama"}', "BOM"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' * 50_000, "nested too deeply"),
    (b'{"num_hidden_layers": 1' + b"0" * 9000 + b"}", "is not JSON"),
    (b"\x00" * 100, "is not JSON"),
    (b"PK\x03\x04", "is not JSON"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=[f"{text[:12]!r}" for text, _ in TEXTS])
def test_files_that_are_no_configuration(text, message, saved):
    assert message in refused(saved[0], text)


def test_things_that_are_no_file(tmp_path):
    for name, make in (
        ("folder", lambda file: file.mkdir()),
        ("loop", lambda file: file.symlink_to("config.json")),
        ("dangling", lambda file: file.symlink_to("nowhere")),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "config.json")
        with pytest.raises(ValueError, match=r"has no config.json, it is not a checkpoint"):
            effattn.load(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "generation_config.json cannot be read: it is not JSON"),
        ("[]", "generation_config.json cannot be read: it holds list"),
        ('{"max_new_tokens": -3}', "max_new_tokens"),
        ('{"cache_implementation": "goat"}', "cache_implementation"),
    ],
)
def test_generation_settings_are_read_or_refused(text, message, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        effattn.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_valid_passes(saved):
    folder, config = saved
    harmless = {
        "auto_map": {"AutoConfig": "code.Config"},
        "_attn_implementation": "eager",
        "_name_or_path": "somewhere",
        "anything": {"else": [1, 2, {"x": None}]},
    }
    (folder / "config.json").write_text(json.dumps(config | harmless))
    loaded = effattn.load(folder)
    assert effattn.describe(loaded).layers[0]["pattern"] == SPEC


VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**18,
    1.5,
    float("nan"),
    "",
    "x",
    "a" * 1000,
    "effattn",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
]


def test_no_change_of_an_entry_ends_in_a_traceback(saved):
    folder, whole = saved
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw, messages = random.Random(seed), []
    for _ in range(40):
        config = json.loads(json.dumps(whole))
        inside = draw.choice(
            [
                config,
                config,
                config["effattn"],
                config["effattn"]["pattern"],
                config["rope_parameters"],
            ]
        )
        inside[draw.choice([*inside, "attn_implementation", "trained", "dtype"])] = draw.choice(
            VALUES
        )
        (folder / "config.json").write_text(json.dumps(config))
        try:
            effattn.load(folder)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all("\n" not in message and len(message) < 700 for message in messages)


def test_the_command_line_says_it_in_one_line(saved, tmp_path):
    folder, config = saved
    (folder / "config.json").write_text(
        json.dumps(config | {"effattn": {"trained": {"_attn_implementation": "eager"}}})
    )
    command = [
        sys.executable,
        "-m",
        "effattn.recipes.cli",
        "convert-gqa",
        "--model",
        folder,
        "--kv-heads",
        "1",
    ]
    command += ["--output", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: config.json: effattn: trained: got '_attn_impl")
    )
    assert not (tmp_path / "out").exists()


def test_code_of_a_checkpoint_is_never_run_or_asked_about(monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    (tmp_path / "tokenizer.json").write_text(
        (effattn.embedded.directory() / "tokenizer.json").read_text()
    )
    mapped = {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}, "tokenizer_class": "Goat"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(mapped))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            config | {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        )
    )
    with pytest.raises(ValueError, match=r"tokenizer: .* cannot be read: .*custom code"):
        checkpoint.load_model(tmp_path)
    assert type(effattn.load(tmp_path)) is LlamaForCausalLM
