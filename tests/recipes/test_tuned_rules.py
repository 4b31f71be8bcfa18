"""Rules after fine-tuning: what is tuned, the points of a curve, how far a base reaches, what is
claimed, and going on after a stop."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import tiny
from transformers import TrainerCallback

import effattn
from effattn.evaluate.curve import token_scores
from effattn.extending import planner, texts, tuned, tuned_report, tuning
from effattn.extending.article_report import ArticleReport
from effattn.positions.extrapolation import extrapolation_limit
from effattn.recipes import extend_context
from effattn.recipes.extend_context import Settings


def small():
    """A random model with the embedded model's vocabulary, made for 32 tokens."""
    return tiny(
        "llama", dtype=torch.float32, vocab_size=3072, max_position_embeddings=32, hidden_size=32
    )


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3072, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    effattn.save(small(), path, effattn.embedded.tokenizer())
    return path


def test_each_rule_is_transformers_own_and_made_for_the_target():
    model, trained = small(), planner.of_model(small())
    found = tuned.to_tune(trained, 128)
    assert tuple(rule.name for rule in found) == tuned.NAMES
    for rule in found:
        with rule.on(model):
            assert effattn.surgery.swapping.active(model) is None, "a plain model"
            rope = dict(model.config.rope_parameters)
        if rule.name in ("pi", "yarn"):
            assert rope["factor"] == 4.0
        if rule.name == "abf":
            law = extrapolation_limit(1e4, trained.dims, 32, rope["rope_theta"], 32)
            assert law >= 128
    (base,) = tuned.bases(trained, (4,))
    assert found[-1].axes["positions"] == f"abf(base={base:.0f}, length=128)"


def test_a_point_is_what_a_tuning_that_ends_there_gives(tmp_path):
    model, sequences = small(), draw(2, 65)
    before = copy.deepcopy(model.state_dict())
    rule = tuned.to_tune(planner.of_model(model), 64)[1]
    ends = {}
    for steps in (3, 6):  # the second has a point at 3 steps, too
        how = tuned.Tuning(draw(1024), steps * 64, lr=1e-2)
        ends[steps] = tuned.tuned(rule, model, how, sequences, (32, 64), 64, tmp_path / str(steps))
    assert [point["tokens"] for point in ends[6]["curve"]] == [0, 64, 128, 192, 256, 320, 384]
    assert ends[3]["curve"] == ends[6]["curve"][:4]
    assert ends[6]["curve"][-1]["lengths"] != ends[6]["curve"][-2]["lengths"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with rule.on(copy.deepcopy(model)) as untuned:  # the first point: the rule alone
        for cell in ends[6]["curve"][0]["lengths"]:
            nats, _ = token_scores(untuned, texts.windows(sequences, cell["length"]))
            assert cell["cross_entropy"] == pytest.approx(nats.double().mean().item(), rel=1e-6)


def test_a_base_holds_until_the_longer_context_does_harm(tmp_path):
    def row(last: int, whole: float, fresh: float) -> dict:
        return {"first": last - 32, "last": last, "cross_entropy": whole, "fresh": fresh}

    rows = [row(32, 3.0, 3.0), row(64, 2.9, 3.0), row(96, 3.1, 3.0), row(128, 2.9, 3.0)]
    assert tuned.held(rows) == 64
    assert tuned.held(rows[:2]) == 64
    assert tuned.held([rows[0], rows[2]]) == 32
    model, sequences = small(), draw(2, 129)
    trained, how = planner.of_model(model), tuned.Tuning(draw(512), 64)
    found = tuned.reach(1e5, trained, model, how, sequences, tmp_path / "x")
    assert found["predicted"] == extrapolation_limit(1e4, trained.dims, 32, 1e5, 32)
    assert [one["last"] for one in found["rows"]] == [32, 64, 96, 128]
    assert found["rows"][0]["cross_entropy"] == pytest.approx(found["rows"][0]["fresh"], abs=1e-5)
    assert found["measured"] == tuned.held(found["rows"])
    assert model.config.rope_parameters["rope_theta"] == 1e4


def made(**ends: tuple[float, ...]) -> list[dict]:
    """Rows of a target of 128 tokens with these losses there."""
    return [
        {
            "name": name,
            "axes": {"positions": name},
            "target": 128,
            "learning_rate": 1e-3,
            "curve": [
                {
                    "tokens": 100 * place,
                    "lengths": [
                        {"length": length, "cross_entropy": loss + length / 1000}
                        for length in (32, 128)
                    ],
                }
                for place, loss in enumerate(losses)
            ],
        }
        for name, losses in ends.items()
    ]


def test_claims_follow_the_curves():
    said = "128 tokens: tuned PI has the lowest loss"
    slower = "128 tokens: NTK converges more slowly than PI"
    beat = "128 tokens: PI and NTK beat tuning without a rule"
    rows = made(none=(5.0, 4.0, 3.0), pi=(4.0, 2.2, 2.0), ntk=(3.0, 2.9, 2.4))
    held = {claim.text: claim.holds for claim in tuned_report.claims(rows)}
    assert held == {said: True, slower: True, beat: True}
    rows = made(none=(5.0, 2.0, 1.9), pi=(4.0, 3.8, 2.0), ntk=(3.0, 2.3, 2.2))
    held = {claim.text: claim.holds for claim in tuned_report.claims(rows)}
    assert held == {said: False, slower: False, beat: False}
    rows = made(pi=(4.0, 3.8, 2.0), ntk=(3.0, 3.0, 2.995))
    held = {claim.text: claim.holds for claim in tuned_report.claims(rows)}
    assert held == {said: True, slower: None, beat: None}
    assert [claim.holds for claim in tuned_report.claims(rows[:1])] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune_rules": ("yarm",)}, "tune_rules: .*did you mean 'yarn'"),
        ({"json": None}, "tune_tokens: given without output; valid is with --output or --json"),
        ({"tune_text": ()}, "tune_text: got none beside text of your own"),
        ({"tune_text": ("missing.txt",)}, "missing.txt"),
        ({"tune_tokens": 10**9}, "tune_tokens: got 1,000,000,000, the text has"),
        ({"reach": (1,)}, "reach: got 1, valid is"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything(folder, text, tmp_path, change, message):
    given = job(folder, text, tmp_path)
    given["json"] = tmp_path / "new" / "x.json"
    given["json"].parent.mkdir()
    with pytest.raises(ValueError, match=message):
        extend_context.run(Settings(**given | change))
    assert list(given["json"].parent.iterdir()) == []


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"x{number % 97} = {number * number}" for number in range(900)))
    return path


def job(folder, text, tmp_path) -> dict:
    return dict(
        model=str(folder),
        text=(text,),
        tune_text=(text,),
        rules=("baseline",),
        logn=False,
        retrieval="none",
        sequences=1,
        lengths=(32, 64),
        tune_tokens=6 * 64,
        tune_rules=("none", "abf"),
        reach=(2,),
        json=tmp_path / "x.json",
    )


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_the_whole_job_goes_on_with_the_same_numbers(folder, text, tmp_path, monkeypatch):
    def told(report) -> dict:
        found = copy.deepcopy(report.data["tuned"])
        for row in found["rules"]:
            del row["seconds"], row["speed"]
        return found

    (tmp_path / "whole").mkdir()
    whole = extend_context.run(Settings(**job(folder, text, tmp_path / "whole")))
    settings, started = Settings(**job(folder, text, tmp_path)), []
    with monkeypatch.context() as patch:
        own = tuning.NextTokenTrainer

        def stopping(**given):
            started.append(given["args"].output_dir)
            if len(started) == 2:  # in the second rule, after a checkpoint
                given["callbacks"] = [*given["callbacks"], Stop()]
            return own(**given)

        patch.setattr(tuning, "NextTokenTrainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            extend_context.run(settings)
    assert started[1].endswith("tuned-64-abf")
    assert sorted(one.name for one in settings.training.iterdir()) == [
        "settings.json",
        "tuned-64-abf",
    ]
    # the finished parts' file may be gone; the checkpoints of other settings stay unused
    kept = settings.partial.read_text()
    settings.partial.unlink()
    with pytest.raises(ValueError, match=r"an unfinished run with other settings \(tune_lr\)"):
        extend_context.run(dataclasses.replace(settings, tune_lr=1e-3))
    settings.partial.write_text(kept)
    report = extend_context.run(settings)
    assert told(report) == told(whole)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["whole", "x.json"]
    again = ArticleReport.load(tmp_path / "x.json")
    titles = [table.title for table in again.tables()]
    assert {tuned_report.TUNED, tuned_report.HELD, tuned_report.LAW} <= {*titles}
    assert len(again.plots()[tuned_report.CURVES]) == 2
    law = next(one for one in again.tables() if one.title == tuned_report.LAW)
    assert len(law.rows[0]) == len(law.header) == 3 + 3
