"""Model cards: what the hub reads of them, what people read, and texts of others in them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import tiny
from huggingface_hub import ModelCard

from effattn import embedded
from effattn.hf import parentage
from effattn.hf.parentage import Parent
from effattn.surgery import card, checkpoint
from effattn.surgery.swapping import swap

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(folder, config=None, parent=None, **how):
    """The card of a folder that has its configuration alone, read back."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "file_bytes", lambda folder: 1024)
        card.write(folder, parent or Parent(), **how)
    return ModelCard.load(folder / "README.md")


def test_save_writes_one_that_the_hub_understands(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    checkpoint.save(model, tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.to_dict()["library_name"] == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["effattn"]
    assert found.data.base_model is None
    assert found.data.license is None
    assert "It needs transformers alone" in found.text
    assert "import effattn" not in found.text


def test_it_says_what_a_swap_needs(tmp_path):
    model = swap(
        tiny("llama", dtype=torch.float32),
        {"0": "sliding(window=8)", "1-": "dense"},
        cache="int8(group=16, residual=16)",
    )
    checkpoint.save(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "import effattn\nfrom transformers import AutoModelForCausalLM" in text
    assert "loads the model as it was before the swap" in text
    assert "| pattern | `sliding(window=8)` in layers 0 |" in text
    assert "| cache | `int8(group=16" in text
    assert not (tmp_path / "out" / "README.md").is_symlink()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "effattn", "effattn": {"model_type": "llama"}}, "It needs effattn (`pip"),
        ({"per_layer_config": {"1": {"skip": ["attention"]}}}, "| layers that differ | 1 |"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}, "effattn": {"cache": {}}},
            'model = effattn.load("PATH")',
        ),
        ({"architectures": ["BertForMaskedLM"]}, "AutoModelForMaskedLM.from_pretrained"),
        ({"architectures": ["BertModel"]}, "import AutoModel\n"),
        ({"architectures": None}, "import AutoModel\n"),
        (
            {"effattn": {"pattern": {str(i): "dense(impl='`|`')" for i in (0, 1, 2, 5, 10)}}},
            "| pattern | `` dense(impl='`\\|`') `` in layers 0-2, 5, 10 |",
        ),
    ],
)
def test_it_reads_the_configuration(tmp_path, config, said):
    assert said in write(tmp_path / "out", config).text


HOSTILE = [
    'x"\n---\nlicense: mit\n---\n# mine',
    "[click](http://evil) <script>alert(1)</script>",
    "a``` b ```` | c",
    "name: {{ 7 * 7 }} # comment",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_others_stay_text(tmp_path, name):
    parent = Parent(name, (), {"license": name, "license_name": name})
    found = write(tmp_path / "out", parent=parent, recipe=name, made=f"effattn x {name}", hub=name)
    assert set(found.data.to_dict()) <= {
        "library_name",
        "license",
        "license_name",
        "pipeline_tag",
        "tags",
    }
    assert found.data.license == name
    assert found.data.tags == ["effattn", name.replace(" ", "-")]
    prose = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", found.text)
    lines = [line for line in prose.splitlines() if line.startswith(("# ", "| made of"))]
    assert len(lines) == 2
    assert all("`" in line for line in lines), "a name is a span of code"
    assert "license: mit" not in prose.replace(lines[0], "").replace(lines[1], "")


def test_a_path_is_shortened_where_it_is_one_alone(tmp_path):
    """In a container paths are short, and parts of other names."""
    parent = Parent("model", ("meta/model-1",))
    made = "see /model, /model/x, /model.txt, /models and meta/model-1."
    found = write(tmp_path / "out", parent=parent, made=made, hub="me/model", paths=["/model"])
    assert found.data.base_model == "meta/model-1"
    assert 'from_pretrained("me/model")' in found.text
    assert "see model, model/x, /model.txt, /models and meta/model-1." in found.text


# ---- of what it was made


def test_a_folder_tells_its_license_and_its_own_parent(tmp_path):
    parent = tmp_path / "some" / "parent"
    parent.mkdir(parents=True)
    (parent / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: owner/name\ntags: [x]\n---\n# text\n"
    )
    found = parentage.of(parent)
    assert found == Parent("parent", ("owner/name",), {"license": "apache-2.0"})
    written = write(tmp_path / "out", parent=found)
    assert (written.data.license, written.data.base_model) == ("apache-2.0", "owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "no metadata",
        "---\nlicense: [a, b]\nbase_model: {a: b}\n---\n",
        "---\nlicense: 'a\n\n  b'\nbase_model: /home/me/model\n---\n",
        "---\n{ : [\n---\n",
        "---\nlicense: !!python/object/apply:os.system [true]\n---\n",
        "---\nlicense: " + "x" * (2 << 20) + "\n---\n",
    ],
)
def test_a_card_that_means_nothing_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert parentage.of(tmp_path) == Parent(tmp_path.name)


def test_bytes_that_are_no_text_say_nothing(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert parentage.of(tmp_path).license == {}


def test_names_that_are_no_folders(monkeypatch, tmp_path):
    assert parentage.of("embedded").base == ()
    assert parentage.of(embedded.directory()).name == "effattn's embedded model"
    assert parentage.of("smollm2").license == {"license": "apache-2.0"}
    assert parentage.of("some/where/model.gguf").name == "model.gguf"
    monkeypatch.chdir(tmp_path)
    card_file = tmp_path / "hub.md"
    card_file.write_text("---\nlicense: mit\n---\n")
    asked = []

    def cached(name, file, revision=None, **how):
        asked.append((name, file, revision))
        return str(card_file)

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    assert parentage.of("owner/name") == Parent("owner/name", ("owner/name",), {"license": "mit"})
    model = tiny("llama")
    model.config._name_or_path = "owner/name"  # as of a folder that is gone: nobody is asked
    assert parentage.of_model(model) == Parent()
    model.config._commit_hash = "abc"
    assert parentage.of_model(model).base == ("owner/name",)
    assert asked == [("owner/name", "README.md", None), ("owner/name", "README.md", "abc")]


def test_a_hub_that_does_not_answer_stops_nothing(monkeypatch):
    def fails(*given, **how):
        raise RuntimeError("no route")

    monkeypatch.setattr("transformers.utils.cached_file", fails)
    assert parentage.of("owner/name") == Parent("owner/name", ("owner/name",))
