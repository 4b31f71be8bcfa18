"""The search for longrope's factors: where it starts, what it may try, that it finds, what it is
judged by, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from conftest import tiny

import effattn
from effattn.evaluate.retrieval import Prompts, answer
from effattn.extending import longrope, planner
from effattn.extending.report import SEARCH, ExtendReport
from effattn.positions.base import Trained
from effattn.recipes import extend
from effattn.recipes.extend import Settings
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active

EMBEDDED = Trained(512, 8, 32, 32)


def distance(wanted: tuple[float, ...]):
    """A judge who knows the answer."""
    return lambda factors: math.dist(factors, wanted)


def test_starts_are_the_rules_as_factors():
    found = longrope.starts(EMBEDDED, 4096)
    assert found["pi"] == (8.0,) * 16
    assert (found["ntk"][0], found["ntk"][-1]) == (1.0, 8.0)
    assert found["ntk"][5] == round(8 ** (10 / 30), 2)
    assert (found["yarn"][:2], found["yarn"][-1]) == ((1.0, 1.0), 8.0)
    # 16 of 32 dimensions turn within 512 tokens: the theory's critical frequency is the 8th
    assert {name for name in found if "critical" in name} == {f"critical-{n}" for n in (6, 7, 8)}
    assert found["critical-8"][4] == round(8**0.5, 2)
    assert found["critical-8"][8:] == (8.0,) * 8
    for factors in found.values():
        assert len(factors) == 16
        assert list(factors) == sorted(factors)


def test_a_search_comes_closer_and_stays_within_its_bounds():
    wanted = tuple(1.0 + 0.9 * place for place in range(16))  # up to 14.5, not among the starts
    seen: list[tuple[float, ...]] = []

    def judge(factors):
        seen.append(factors)
        return distance(wanted)(factors)

    starts, steps = longrope.starts(EMBEDDED, 4096), []
    found = longrope.search(
        starts,
        judge,
        candidates=120,
        least=1.0,
        most=16.0,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert found["candidates"] == len(seen) == len(set(seen)) == 120
    assert steps == [(one, 120) for one in range(1, 121)]
    assert all(list(one) == sorted(one) and 1 <= one[0] <= one[-1] <= 16 for one in seen)
    assert all(one == tuple(round(factor, 2) for factor in one) for one in seen)
    assert found["generations"] == sorted(found["generations"], reverse=True)
    assert found["starts"] == {name: distance(wanted)(one) for name, one in starts.items()}
    assert found["nats"] == distance(wanted)(found["factors"]) < 0.5 * min(found["starts"].values())
    for bound in ({"least": 1.0, "most": 8.0}, {"least": 2.0, "most": 16.0}):
        tried: list[tuple[float, ...]] = []
        longrope.search(
            starts, lambda one, t=tried: t.append(one) or one[0], candidates=30, **bound
        )
        assert all(bound["least"] <= min(one) and max(one) <= bound["most"] for one in tried[6:])


def test_the_same_seed_tries_the_same_and_another_does_not():
    starts, wanted = longrope.starts(EMBEDDED, 4096), (2.0,) * 16
    given = {"candidates": 30, "least": 1.0, "most": 16.0}
    first, again = (longrope.search(starts, distance(wanted), seed=3, **given) for _ in range(2))
    assert first == again
    other = longrope.search(starts, distance(wanted), seed=4, **given)
    assert other["factors"] != first["factors"]
    one = {"only": (1.0, 2.0)}  # a single parent has only mutants
    assert longrope.search(one, distance((1.0, 1.5)), candidates=9, least=1, most=2)["nats"] < 0.5


def test_an_answer_is_judged_as_retrieval_judges_it():
    model = tiny("llama", vocab_size=96)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (2, 47), generator=generator)
    asked = torch.tensor([False, True, False, False, True, True, False])
    prompts = [
        Prompts(ids[:, :40], ids[:, 40:], asked),
        Prompts(ids[:, :40], ids[:, 40:42], asked[:2]),
    ]
    expected = torch.cat([answer(model, one).nats.flatten() for one in prompts]).double().mean()
    assert longrope.answer_nats(model, prompts) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("longrope(length=4096, search=-1)", "longrope: search: got -1, valid is a whole number"),
        ("longrope(length=4096, search=2.5)", "longrope: search: got 2.5"),
        ("longrope(length=4096, search=8, long_factor=[1.0])", "got long_factor and search"),
        ("longrope(length=4096, search=0)", "longrope: long_factor: got"),
        ("longrope(length=4096, search=30)", "no factors are found yet; `effattn extend --rule"),
    ],
)
def test_a_model_is_given_factors_and_no_search(spec, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        effattn.swap(model, positions=spec)
    assert active(model) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    model = tiny("llama", dtype=torch.float32, vocab_size=3072, head_dim=8)
    effattn.save(model, path, effattn.embedded.tokenizer())
    return path


def job(folder, output, **given) -> Settings:
    rule = "longrope(length=256, search=10)+logn"
    usual = dict(model=str(folder), to=256, rule=rule, output=output, sequences=0)
    return Settings(**usual | given)


def test_extend_searches_goes_on_after_a_stop_and_saves_what_it_found(
    folder, tmp_path, monkeypatch
):
    own, judged = longrope.answer_nats, []

    def stops(model, prompts):
        if len(judged) == 8:
            raise KeyboardInterrupt
        judged.append({row["positions"] for row in describe(model).layers})
        return own(model, prompts)

    monkeypatch.setattr(longrope, "answer_nats", stops)
    settings = job(folder, tmp_path / "far")
    with pytest.raises(KeyboardInterrupt):
        extend.run(settings)
    assert len(json.loads((settings.partial / "search.json").read_text())["parts"]) == 8
    with pytest.raises(ValueError, match=r"an unfinished run with other settings \(seed\)"):
        extend.run(dataclasses.replace(settings, seed=1))
    more: list[int] = []
    monkeypatch.setattr(longrope, "answer_nats", lambda *one: more.append(1) or own(*one))
    report = extend.run(settings)
    assert len(more) == 10 - 8 + 2, "and two rules on other prompts"
    assert not settings.partial.exists()
    found, own_model = report.data["rule"]["search"], effattn.load(folder)
    tokenizer = effattn.embedded.tokenizer()
    assert longrope.find(own_model, tokenizer, settings.rule, 256) == found, "without a stop"
    assert active(own_model) is None
    assert found["candidates"] == 10
    assert found["nats"] == min(found["generations"]) <= min(found["starts"].values())
    model = effattn.load(tmp_path / "far")
    (spec,) = {row["positions"] for row in describe(model).layers}
    assert f"long_factor={found['factors']}" in spec
    assert "search" not in spec
    assert spec.endswith("+logn")
    assert {one for (one,) in judged} == {one for (one,) in judged if "logn" in one}
    again = ExtendReport.load(tmp_path / "far")
    table = next(one for one in again.tables() if one.title == SEARCH)
    assert len(table.rows) == len(found["starts"]) + 2


def test_a_search_needs_room_for_what_it_tries(folder, tmp_path):
    with pytest.raises(ValueError, match="without output, where what it tried is kept"):
        extend.run(job(folder, None))
    with pytest.raises(ValueError, match="search: got 2, valid is a number of candidates"):
        extend.run(job(folder, tmp_path / "out", rule="longrope(length=256, search=2)"))
    tuned = {"tune_tokens": 512, "sampling": "pose"}
    with pytest.raises(ValueError, match=r"sampling: got 'pose', and 'longrope.* by itself"):
        extend.run(job(folder, tmp_path / "out", **tuned))
    assert list(tmp_path.iterdir()) == []
    assert longrope.candidates_of("ntk-mixed") == longrope.candidates_of(None) == 0
    assert planner.make_plan(tiny("llama"), 256).candidate("ntk-mixed")
