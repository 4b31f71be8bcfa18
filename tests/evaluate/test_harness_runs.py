"""Models in lm-evaluation-harness: offline, on tasks and data of our own. What needs the package is
skipped where it is not installed (`pip install 'effattn[eval]'`); that this is said in a line is
not."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.evaluate.harness_runs import check_harness, harness_scores, prompt_length
from effattn.reports.common import harness_tables
from effattn.surgery.swapping import swap

TOKENIZER = effattn.embedded.tokenizer()
TASK = """
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """The package, where nothing can be fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return pytest.importorskip("lm_eval")


@pytest.fixture
def own(tmp_path) -> str:
    """A task of one's own: a YAML file, and its data beside it."""
    rows = [{"question": "import", "choices": [" os", " sys"], "label": i % 2} for i in range(6)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(TASK.format(data=tmp_path / "own.jsonl"))
    return str(tmp_path / "own.yaml")


def small(**changes):
    how = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
    return tiny("llama", dtype=torch.float32, **how | changes)


def score_of_choices(model) -> float:
    """What the task must say: the answers, by the logits themselves."""
    question, *choices = (TOKENIZER(text)["input_ids"] for text in ("import", " os", " sys"))
    logits = model(torch.tensor([question])).logits[0, -1].log_softmax(-1)
    best = 0 if logits[choices[0][0]] > logits[choices[1][0]] else 1
    return sum(best == i % 2 for i in range(5)) / 5


def test_a_task_of_ones_own_has_the_score_that_the_logits_say(harness, own):
    model, seen = small(), []
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    chance = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    model.train()
    pad = TOKENIZER.pad_token
    found = harness_scores(
        model, TOKENIZER, [own], limit=5, progress=lambda *done: seen.append(done)
    )
    assert model.training
    assert TOKENIZER.pad_token == pad
    model.eval()
    assert list(found) == ["own_choice"]
    told = found["own_choice"]
    assert told["metrics"] == {"acc": pytest.approx(score_of_choices(model))}
    assert told["samples"] == 5
    assert told["higher"] == {"acc": True}
    assert told["errors"]["acc"] > 0
    assert seen[-1] == (10, 10)
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == chance[1:]
    json.dumps(found, allow_nan=False)


def test_our_own_tasks_go_by_name(harness):
    model = small()
    names = ["effattn_topic_retrieval", "effattn_associative_recall"]
    found = harness_scores(small(max_position_embeddings=512), TOKENIZER, names, limit=2)
    assert list(found) == names
    assert all(told["samples"] == 2 for told in found.values())
    assert prompt_length(model) == 240
    assert prompt_length(small(max_position_embeddings=10**6)) == 4080


@pytest.mark.parametrize(
    "change", [pytest.param("nothing", marks=pytest.mark.slow), "swapped", "converted"]
)
def test_longbench_on_swapped_and_converted_models(harness, monkeypatch, change):
    """Its task, its metric and generation, on data of ours: nothing is fetched."""
    import datasets

    for needed in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(needed)
    asked = []
    row = {"context": "def f(x):\n" * 40, "question": "what is f?", "answers": ["a function"]}

    def load(path, name=None, **how):
        asked.append((path, name))
        return {"test": datasets.Dataset.from_list([row] * 3)}

    monkeypatch.setattr("datasets.load_dataset", load)
    model = small(num_key_value_heads=4, num_attention_heads=4)
    if change == "swapped":
        swap(model, "sliding(window=32, sinks=2)", cache="int8(group=16, residual=16)")
    elif change == "converted":
        tokens = torch.randint(len(TOKENIZER), (2000,))
        effattn.convert_gqa(model, 2, tokens, length=64)
    lengths = []
    forward = model.forward

    def told(*given, **how):
        lengths.append(how["input_ids"].shape[1])
        return forward(*given, **how)

    model.forward = told
    task = Path(harness.__file__).parent / "tasks" / "longbench" / "hotpotqa.yaml"
    found = harness_scores(model, TOKENIZER, [str(task)], limit=1)
    told = found["longbench_hotpotqa"]
    assert 0 <= told["metrics"]["score"] <= 1
    assert told["samples"] == 1
    assert asked[0] == ("Xnhyacinth/LongBench", "hotpotqa")
    assert lengths[0] == 256 - 32, "the prompt is cut to leave room for the answer"
    assert set(lengths[1:]) == {1}, "and decoded token by token, from the cache"


# ---- refusals


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Unsupported, match=r"not installed; pip install 'effattn\[eval\]'"):
        check_harness(["arc_easy"])


def test_names_that_are_none(harness, tmp_path, own):
    with pytest.raises(ValueError, match="tasks: got none"):
        harness_scores(None, TOKENIZER, [])
    with pytest.raises(ValueError, match="did you mean 'effattn_passkey'"):
        check_harness(["effattn_paskey"])
    with pytest.raises(ValueError, match="there is no such file"):
        check_harness([str(tmp_path / "none.yaml")])
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lm_eval: '.*own.yaml' cannot be prepared: "):
        check_harness([own])
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"lm_eval: '.*bad.yaml' cannot be prepared: "):
        check_harness([str(tmp_path / "bad.yaml")])


@pytest.mark.slow
def test_the_harness_has_so_many_names(harness):
    """Reading them takes ten seconds."""
    with pytest.raises(ValueError, match="got 'arc_eazy', did you mean 'arc_easy'"):
        check_harness(["arc_eazy"])
    with pytest.raises(ValueError, match="lm_eval: 'longbench_hotpotqa' cannot be prepared"):
        check_harness(["longbench_hotpotqa"])


# ---- in a report


def test_before_and_after_stand_side_by_side():
    assert harness_tables({}) == harness_tables({"lm_eval": None}) == []
    told = {"higher": {"acc": True, "ppl": False}, "samples": 1200}
    before = {"a": told | {"metrics": {"acc": 0.5, "ppl": 12.0}, "errors": {"acc": 0.01}}}
    after = {"a": told | {"metrics": {"acc": 0.25}, "errors": {}}}
    found = {"before": before, "after": after, "limit": None, "version": "1", "tasks": ["a"]}
    (table,) = harness_tables({"lm_eval": found})
    assert table.rows == [
        ["a", "acc", "1,200", "0.5000 ± 0.0100", "0.2500", "-0.2500"],
        ["a", "ppl", "1,200", "12.0000", "not measured", "not measured"],
    ]
    assert "every example" in table.note
    (table,) = harness_tables({"lm_eval": found | {"limit": 1000}})
    assert "the first 1,000 examples" in table.note
