"""Passkey retrieval and associative recall: prompts are what they say, and who finds what is there
gets full marks.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Oracle

import effattn
from effattn.evaluate import associative_recall, passkey, retrieval

TOKENIZER = effattn.embedded.tokenizer()
VOCABULARY = len(TOKENIZER)


class Copier(Oracle):
    """Says what followed the longest earlier match of the last tokens, of the last `window` that it
    has seen.
    """

    def __init__(self, window: int = 10**9):
        super().__init__(VOCABULARY)
        self.window, self.seen = window, []

    def answers(self, whole):
        self.seen.append(whole)
        return [self._next(ids) for ids in whole[:, -self.window :].tolist()]

    def _next(self, ids: list[int]) -> int:
        for size in range(12, 0, -1):
            for at in range(len(ids) - size - 1, -1, -1):
                if ids[at : at + size] == ids[-size:]:
                    return ids[at + size]
        return 0


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.setattr(retrieval, "new_cache", lambda model: [])


def ask(task, model, **given):
    style = given.pop("style", "code")
    more = {"style": style} if task is passkey else {}
    return task(
        model, TOKENIZER, **{"length": 160, "depths": (0.0, 0.5, 1.0), "trials": 3, **more, **given}
    )


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize(
    ("task", "style"),
    [
        (passkey, "code"),
        (passkey, "text"),
        (associative_recall, "code"),
    ],
)
def test_who_copies_gets_full_marks_and_who_forgets_does_not(task, style):
    model = Copier()
    found = ask(task, model, style=style)
    assert found["score"] == 1.0
    assert all(
        row["learned"] and row["exact"] == 1.0 and row["nats"] < 1e-3 for row in found["rows"]
    )
    assert {whole.shape[1] for whole in model.seen if whole.shape[1] > 150} <= set(range(150, 161))
    assert max(whole.shape[1] for whole in model.seen) == 160, "length counts all of it"
    short = ask(task, Copier(window=100), style=style)["rows"]
    assert short[0]["exact"] == 0.0
    assert not short[0]["learned"]
    assert short[-1]["exact"] == 1.0


@pytest.mark.usefixtures("lists")
def test_prompts_are_text_with_the_key_at_its_depth():
    model = Copier()
    ask(passkey, model, depths=(0.5,), trials=2)
    text = TOKENIZER.decode(max(model.seen, key=lambda whole: whole.shape[1])[0].tolist())
    lines = [line.strip() for line in text.splitlines() if "PASSKEY" in line]
    assert len(lines) == 4, "three in the haystack, one asked for"
    assert len(set(lines)) == 1
    assert lines[0].removeprefix("PASSKEY = ").isdigit()
    assert 0.3 < text.index("PASSKEY") / len(text) < 0.6
    other = Copier()
    ask(passkey, other, depths=(0.5,), trials=2)
    assert all(torch.equal(a, b) for a, b in zip(model.seen, other.seen, strict=True)), (
        "the seed decides"
    )
    ask(passkey, other, depths=(0.5,), trials=2, seed=1)
    assert not torch.equal(model.seen[0], other.seen[-len(model.seen)])


@pytest.mark.usefixtures("lists")
def test_each_key_is_asked_once_in_another_order():
    model = Copier()
    ask(
        associative_recall,
        model,
        depths=(0.2,),
        trials=1,
        pairs=6,
        queries=4,
    )
    lines = TOKENIZER.decode(model.seen[-1][0].tolist()).splitlines()
    questions = lines[-4:]
    assert len(set(questions)) == 4
    assert all(lines.count(line) == 2 for line in questions), "once told, once asked"
    places = [lines.index(line) for line in questions]
    assert max(places) - min(places) < 6
    assert places != sorted(places)


@pytest.mark.usefixtures("lists")
def test_guessing_is_chance():
    class Guesser(Copier):
        def _next(self, ids):
            return hash(tuple(ids[-40:])) % VOCABULARY

    found = ask(associative_recall, Guesser(), trials=8, pairs=4, depths=(0.5,))
    assert found["chance"] == 0.25
    assert found["rows"][0]["choice"] < 0.7
    assert not found["rows"][0]["learned"]


def test_the_embedded_model_recalls_and_pieces_do_not_matter():
    model, _ = effattn.embedded.load()
    found = effattn.evaluate.associative_recall(model, TOKENIZER, 128, (0.5,), trials=4)
    row = found["rows"][0]
    assert row["learned"]
    assert row["choice"] > 0.7
    context = effattn.embedded.tokens("validation", 200)[None]
    prompts = retrieval.Prompts(
        context[:, :150],
        context[:, 150:160],
        torch.arange(10) % 2 == 0,
    )
    one, many = retrieval.answer(model, prompts), retrieval.answer(model, prompts, chunk=37)
    torch.testing.assert_close(one.nats, many.nats, rtol=1e-4, atol=1e-4)
    assert one.chosen is None
    with torch.no_grad():
        logits = model(context[:, :160]).logits[0, 149:159:2]
    torch.testing.assert_close(
        one.nats[0],
        torch.nn.functional.cross_entropy(logits, context[0, 150:160:2], reduction="none"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("task", "given", "error"),
    [
        (passkey, {"style": "cod"}, "did you mean 'code'"),
        (passkey, {"length": 10}, "the key and the question alone take"),
        (passkey, {"depths": (0.5, 1.5)}, "depths: got"),
        (passkey, {"trials": 0}, "trials: got 0"),
        (passkey, {"filler": torch.zeros(50, dtype=torch.long)}, "filler: got"),
        (associative_recall, {"length": 20}, "the pairs and the questions alone take"),
        (associative_recall, {"queries": 9}, "queries: got 9, valid is at most pairs"),
        (
            associative_recall,
            {"pairs": 3000, "length": 10**6},
            "the vocabulary has words of one token",
        ),
    ],
)
def test_bad_settings_are_refused(task, given, error):
    with pytest.raises(ValueError, match=error):
        ask(task, Copier(), **given)
