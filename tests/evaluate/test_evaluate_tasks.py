"""Perplexity by position, and the generated tasks beyond passkey and recall: prompts are what they
say, and who can do what they ask gets full marks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import Oracle, tiny

import effattn
from effattn.errors import Unsupported
from effattn.evaluate import (
    by_position,
    line_retrieval,
    listops,
    listops_examples,
    retrieval,
    topic_retrieval,
    variable_tracking,
)
from effattn.evaluate.curve import doubling, token_scores
from effattn.evaluate.harness import TASKS, config_of, harness_documents, harness_tasks
from effattn.evaluate.list_operations import OPERATIONS
from effattn.evaluate.loss import token_losses
from effattn.evaluate.topics import ORDINALS

TOKENIZER = effattn.embedded.tokenizer()


class Solver(Oracle):
    """A model that is given what to say: `solve(text)` is the continuation of everything it has
    read.
    """

    def __init__(self, solve):
        super().__init__(len(TOKENIZER))
        self.solve, self.lengths, self.last = solve, set(), ""

    def answers(self, whole):
        self.lengths.add(whole.shape[1])
        return [self._next(ids) for ids in whole.tolist()]

    def _next(self, ids: list[int]) -> int:
        self.last = TOKENIZER.decode(ids)
        answer = self.solve(self.last)
        known = TOKENIZER(self.last, add_special_tokens=False)["input_ids"]
        both = TOKENIZER(self.last + answer, add_special_tokens=False)["input_ids"]
        return both[len(known)] if answer and len(both) > len(known) else 0


def register(text: str) -> str:
    """What is missing of the last line, which repeats the start of an earlier one."""
    start = text[text.rindex("line ") :]
    for line in text[: -len(start)].splitlines():
        if line.startswith(start):
            return line[len(start) :]
    return ""


def discussed(text: str) -> str:
    """The name of the topic asked for, as far as it is not said yet."""
    record, asked, question = text.rpartition("USER: What is the ")
    names = [part.partition(".\n")[0] for part in record.split("I would like to discuss ")[1:]]
    said = question.partition("topic was")
    if not asked or not said[1]:
        return ""
    whole = f" {names[ORDINALS.index(question.split()[0])]}"
    return whole[len(said[2]) :] if whole.startswith(said[2]) else ""


def tracked(text: str) -> str:
    """The names of the variables of the value asked for, as far as they are not said yet."""
    context, _, question = text.partition("\nFind all")
    if not question:
        return ""
    value = question.partition("value ")[2].partition(".")[0]
    names, holds = [], {value}
    for line in context.splitlines():
        words = line.split()
        if words[:1] == ["VAR"] and words[-1] in holds:
            names.append(words[1])
            holds.add(words[1])
    whole, said = "".join(f" {name}" for name in names), question.partition("are:")[2]
    return whole[len(said) :] if whole.startswith(said) else ""


def value_of(text: str) -> int:
    """An expression's value, by a stack."""
    stack: list[list] = [[]]
    for word in text.split():
        if word.startswith("["):
            stack.append([word[1:]])
        elif word == "]":
            name, *values = stack.pop()
            stack[-1].append(OPERATIONS[name](values))
        else:
            stack[-1].append(int(word))
    return stack[0][0]


def calculated(text: str) -> str:
    line = text.rstrip(" ").rpartition("\n")[2]
    return (
        f" {value_of(line.removesuffix('='))}"
        if line.endswith("=") and line.startswith("[")
        else ""
    )


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.setattr(retrieval, "new_cache", lambda model: [])


# ---- by position
# -------------------------------------------------------------------------------------------------


def test_scores_are_those_of_one_forward_pass(tokens, monkeypatch):
    monkeypatch.setattr("effattn.evaluate.logits.BYTES", 7 * 4 * 96)
    model, sequences = tiny("llama"), tokens[:123].view(3, 41)
    nats, right = token_scores(model, sequences, batch=2)
    assert nats.shape == right.shape == (3, 40)
    torch.testing.assert_close(
        nats.flatten(), torch.cat([token_losses(model, row, 40) for row in sequences])
    )
    assert torch.equal(right, model(sequences[:, :-1]).logits.argmax(-1) == sequences[:, 1:])


def test_rows_are_means_of_their_positions(tokens):
    model, sequences = tiny("gemma2"), tokens[:82].view(2, 41)
    found = by_position(model, sequences, [0, 10, 40])
    nats, right = token_scores(model, sequences)
    assert [(row["first"], row["last"]) for row in found["rows"]] == [(0, 10), (10, 40)]
    assert found["rows"][0]["cross_entropy"] == pytest.approx(nats[:, :10].mean().item(), rel=1e-5)
    assert found["rows"][1]["accuracy"] == pytest.approx(right[:, 10:].float().mean().item())
    assert found["cross_entropy"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert (
        [row["last"] for row in by_position(model, sequences)["rows"]]
        == [16, 32, 40]
        == doubling(40)[1:]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [0, 20]}, r"edges: got \[0, 20\], valid are ascending positions from 0 to 40"),
        ({"edges": [0, 20, 20, 40]}, "edges: got"),
        ({"sequences": torch.zeros(41, dtype=torch.int64)}, r"sequences: got torch.int64 \(41,\)"),
        ({"sequences": torch.full((1, 41), 96)}, "sequences: ids run to 96"),
        ({"batch": 0}, "batch: got 0"),
    ],
)
def test_by_position_refuses_what_means_nothing(tokens, change, message):
    given = {"sequences": tokens[:41].view(1, 41)} | change
    with pytest.raises(ValueError, match=message):
        by_position(tiny("llama"), **given)


def test_encoders_have_no_next_tokens(tokens):
    from transformers import BertConfig, BertModel

    small = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=96,
    )
    with pytest.raises(Unsupported, match="it is not causal"):
        by_position(BertModel(small), tokens[:41].view(1, 41))


# ---- tasks
# -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize(
    ("task", "solve", "options"),
    [
        (line_retrieval, register, {}),
        (topic_retrieval, discussed, {"topics": 3}),
        (variable_tracking, tracked, {"hops": 1, "chains": 2, "letters": 3}),
        (listops, calculated, {"depths": (1, 2)}),
    ],
)
def test_who_solves_it_gets_full_marks_and_who_guesses_does_not(task, solve, options):
    model = Solver(solve)
    given = {"length": 200, "depths": (0.0, 1.0), "trials": 2, **options}
    found = task(model, TOKENIZER, **given)
    assert [row["exact"] for row in found["rows"]] == [1.0, 1.0], model.last
    assert all(row["learned"] for row in found["rows"])
    assert found["score"] == 1.0
    assert max(model.lengths) == 200, "length counts all of it"
    texts = model.last
    task(model, TOKENIZER, **given)
    assert model.last == texts, "the same seed gives the same prompts"
    assert task(Solver(lambda text: " 0"), TOKENIZER, **given)["score"] < 0.6


@pytest.mark.usefixtures("lists")
def test_a_line_is_asked_for_at_its_depth():
    seen = Solver(register)
    for depth, place in ((0.0, 0), (1.0, -1)):
        line_retrieval(seen, TOKENIZER, 300, (depth,), trials=1)
        *lines, asked = [line for line in seen.last.split("\n") if line.startswith("line ")]
        assert len(lines) > 8
        start = asked[: asked.index("<")]
        places = [at for at, line in enumerate(lines) if line.startswith(start)]
        assert places == [len(lines) - 1 if place else pytest.approx(0, abs=2)]


@pytest.mark.usefixtures("lists")
def test_a_topic_is_asked_for_by_its_place():
    seen = Solver(discussed)
    for depth, ordinal in ((0.0, "first"), (0.5, "third"), (1.0, "fifth")):
        topic_retrieval(seen, TOKENIZER, 300, (depth,), trials=1)
        assert f"What is the {ordinal} topic" in seen.last
        assert seen.last.startswith("A record of a conversation"), "nothing is cut off"
        assert seen.last.count("I would like to discuss") == 5


def test_expressions_are_what_they_say():
    found = listops_examples(40, depth=4, arguments=3, seed=3)
    assert found == listops_examples(40, depth=4, arguments=3, seed=3)
    for text, value in found:
        assert value_of(text) == value
        level = deepest = 0
        for word in text.split():
            level += word.startswith("[") - (word == "]")
            deepest = max(deepest, level)
        assert deepest == 4
        assert 0 <= value <= 9
    assert {value for _, value in found} > {0, 9}
    assert OPERATIONS["MED"]([1, 2, 4, 9]) == 3
    assert OPERATIONS["SM"]([7, 8]) == 5
    sized = listops_examples(2, depth=10, arguments=10, least=500, most=2000)
    assert all(500 <= len(text.split()) <= 2000 for text, _ in sized)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: line_retrieval(None, TOKENIZER, 30),
            "length: got 30, valid is a whole number of at least 64",
        ),
        (lambda: topic_retrieval(None, TOKENIZER, topics=1), "topics: got 1, valid is a whole"),
        (lambda: topic_retrieval(None, TOKENIZER, topics=17), "topics: got 17, valid is at most"),
        (lambda: topic_retrieval(None, TOKENIZER, 99), "the topics and the question alone take"),
        (lambda: line_retrieval(None, TOKENIZER, style="texts"), "did you mean 'text'"),
        (lambda: line_retrieval(None, TOKENIZER, depths=(2,)), "depths: got"),
        (
            lambda: variable_tracking(None, TOKENIZER, 60, hops=9, letters=9),
            "the chains and the question alone take",
        ),
        (
            lambda: listops(None, TOKENIZER, depths=(0.5,)),
            r"depths: got \[0.5\], valid are whole numbers",
        ),
        (
            lambda: listops(None, TOKENIZER, 16, depths=(5,)),
            "length: got 16, an expression of depth 5 takes",
        ),
        (lambda: listops_examples(1, depth=1, least=400), "hardly ever have so many symbols"),
    ],
)
def test_settings_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- lm-evaluation-harness
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_text_with_an_answer(name):
    found = harness_documents(name, TOKENIZER, length=260, depths=(0.5,), trials=2)
    assert len(found) == (6 if name == "listops" else 2)
    for one in found:
        assert one["answer"].strip()
        assert not one["prompt"].endswith(one["answer"])
        assert 240 < len(TOKENIZER(one["prompt"] + one["answer"])["input_ids"]) <= 261
        assert (one["choices"] == []) == (one["label"] == -1)
        if one["choices"]:
            assert one["choices"][one["label"]] == one["answer"]
            assert len(set(one["choices"])) in (8, 10)
    if name == "listops":
        line = found[-1]["prompt"].rpartition("\n")[2]
        assert found[-1]["answer"] == f" {value_of(line.removesuffix('='))}"


def test_without_lm_eval_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(ValueError, match="did you mean 'passkey'"):
        harness_tasks(TOKENIZER, ["paskey"])
    with pytest.raises(Unsupported, match="lm_eval is not installed; pip install lm_eval"):
        harness_tasks(TOKENIZER, ["passkey"])


def test_tasks_are_made_as_lm_eval_wants_them(monkeypatch):
    made = []
    module = SimpleNamespace(ConfigurableTask=lambda config: made.append(config) or config)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(api=SimpleNamespace(task=module)))
    monkeypatch.setitem(sys.modules, "lm_eval.api", SimpleNamespace(task=module))
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", module)
    found = harness_tasks(
        TOKENIZER, ["line_retrieval", "associative_recall"], length=260, depths=(0.5,), trials=2
    )
    assert list(found) == ["effattn_line_retrieval", "effattn_associative_recall"]
    assert [config["output_type"] for config in made] == ["loglikelihood", "multiple_choice"]
    rows = made[1]["custom_dataset"](version=1)["test"]
    assert rows[0]["choices"][rows[0]["label"]] == rows[0]["answer"]
    assert config_of("x", dict, choices=False)["doc_to_target"] == "answer"
