"""Position rules side by side: the sequences, the table, what is claimed, the whole job and its
report.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from conftest import tiny
from typer.testing import CliRunner

import effattn
from effattn.errors import Unsupported
from effattn.evaluate.curve import token_scores
from effattn.extending import copying, rule_losses, texts
from effattn.extending.article_report import ArticleReport
from effattn.extending.claims import claims
from effattn.extending.rule_losses import measured
from effattn.extending.rules import WINDOW, Rule, chosen, of_own, rules, trained_with
from effattn.recipes import extend_context
from effattn.recipes.extend_context import Settings
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active

NAMES = [
    "baseline",
    "pi",
    "ntk-old",
    "ntk-fixed",
    "ntk-mixed",
    "dynamic-ntk",
    "dynamic-pi",
    "dynamic-yarn",
    "yarn",
    "rerope-64",
    "rerope-128",
    "rerope-192",
    "rerope-256",
    "rerope-384",
    "rerope-512",
    "leaky-8",
    "leaky-16",
    "leaky-32",
    "leaky-64",
    "leaky-256-8",
    "leaky-256-16",
    "leaky-256-32",
    "leaky-256-64",
    "sliding-256",
    "sliding-512",
]


def small(**given):
    return tiny(
        "llama",
        dtype=torch.float32,
        vocab_size=3072,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **given,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    effattn.save(small(), path, effattn.embedded.tokenizer())
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    words = torch.randint(1000, 9999, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(f"x{word} = {word}" for word in words))
    return path


def cell(length: int, loss: float, accuracy: float = 0.5) -> dict:
    return {"length": length, "cross_entropy": loss, "perplexity": 2.0, "accuracy": accuracy}


def row(
    name: str,
    kind: str,
    losses: tuple,
    copied: float,
    found: float | None = None,
    logn: bool = False,
) -> dict:
    curve = [
        {
            "first": at,
            "last": at + 64,
            "cross_entropy": losses[1],
            "perplexity": 2.0,
            "accuracy": 0.4,
        }
        for at in range(0, 4096, 64)
    ]
    copies = {"cross_entropy": 1.0, "perplexity": 2.0, "accuracy": copied}
    depths = [
        {
            "depth": depth,
            "trials": 4,
            "exact": 0.0,
            "token_accuracy": 0.1,
            "choice": found,
            "nats": 5.0,
            "learned": True,
        }
        for depth in (0.1, 0.5, 0.9)
    ]
    task = {
        "task": "associative recall",
        "chance": 0.25,
        "score": found,
        "length": 2048,
        "rows": depths,
    }
    return {
        "name": name,
        "axes": {} if name == "baseline" else {"positions": name},
        "kind": kind,
        "logn": logn,
        "seconds": 1.0,
        "natural": [cell(512, losses[0]), cell(4096, losses[1])],
        "repeated": [cell(512, losses[0]) | {"copies": None}, cell(4096, 1.5) | {"copies": copies}],
        "curves": {"natural": curve, "repeated": copy.deepcopy(curve)},
        "retrieval": None if found is None else task,
    }


def data() -> dict:
    """A report's data, made up: what the articles say."""
    found = [
        row("baseline", "frequencies", (2.9, 5.0), 0.1, 0.2),
        row("baseline + log-n", "frequencies", (2.9, 4.9), 0.1, logn=True),
        row("pi", "frequencies", (4.0, 4.5), 0.2, 0.3),
        row("ntk-old", "frequencies", (3.0, 3.5), 0.4, 0.4),
        row("ntk-fixed", "frequencies", (3.0, 3.4), 0.4, 0.4),
        row("ntk-mixed", "frequencies", (3.0, 3.3), 0.4, 0.4),
        row("dynamic-ntk", "frequencies", (2.9, 3.4), 0.4, 0.4),
        row("yarn", "frequencies", (2.9, 3.1), 0.5, 0.4),
        row("rerope-128", "clipped", (2.9, 2.8), 0.7, 0.8),
        row("rerope-128 + log-n", "clipped", (2.9, 2.7), 0.7, logn=True),
        row("rerope-512", "clipped", (2.9, 4.8), 0.1, 0.2),
        row("leaky-16", "clipped", (2.9, 2.79), 0.7, 0.7),
        row("sliding-256", WINDOW, (2.9, 2.81), 0.3, 0.3),
    ]
    return {
        "kind": "extend_context",
        "rules": found,
        "task": "recall",
        "task_learned": True,
        "settings": {
            "model": "some-model",
            "lengths": [512, 4096],
            "sequences": 4,
            "period": 768,
            "source": "text",
            "retrieval_length": 2048,
            "retrieval_trials": 4,
        },
        "model": {"class": "Llama", "trained_length": 512, "parameters": 4_000_000},
        "copy": {"period": 128, "first": 0.4, "later": 0.8},
        "within": {"recall": found[0]["retrieval"] | {"length": 384}},
        "environment": {"torch": "2.99"},
    }


# ---- the rules
# -------------------------------------------------------------------------------------------------


def test_the_table_is_the_articles():
    found = rules(512, 4096)
    assert [rule.name for rule in found] == NAMES
    specs = {rule.name: rule.axes.get("positions", rule.axes.get("pattern")) for rule in found}
    assert specs["baseline"] is None
    assert specs["ntk-mixed"] == "ntk(factor=8.0, variant='mixed')"
    assert specs["leaky-16"] == "leaky_rerope(window=128, k=16)"
    assert specs["sliding-256"] == "sliding(window=256, sinks=4)"
    assert [rule.name for rule in found if rule.varies] == [
        "dynamic-ntk",
        "dynamic-pi",
        "dynamic-yarn",
    ]
    both = chosen(found, ["rerope", "pi"], logn=True)
    assert [rule.name for rule in both][:5] == [
        "baseline",
        "baseline + log-n",
        "pi",
        "pi + log-n",
        "rerope-64",
    ]
    assert both[1].axes == {"positions": "logn"}
    assert both[5].axes == {"positions": "rerope(window=64)+logn"}
    assert [rule.name for rule in chosen(found, ["sliding"], logn=True)][2:] == [
        "sliding-256",
        "sliding-512",
    ]
    with pytest.raises(ValueError, match="did you mean 'rerope'"):
        chosen(found, ["reropes"], logn=False)


def test_a_rule_is_on_while_it_is_measured_and_off_afterwards(recwarn):
    model = small()
    with Rule("x", {"positions": "rerope(window=32)"}).on(model):
        assert active(model) is not None
        assert describe(model).layers[0]["positions"] == "rerope(window=32)"
    assert active(model) is None
    assert not [one for one in recwarn if "not below" in str(one.message)]
    with pytest.raises(KeyError), Rule("x", {"positions": "logn"}).on(model):
        raise KeyError
    assert active(model) is None


@torch.no_grad()
@pytest.mark.parametrize(
    "axes",
    [
        {"positions": "yarn(factor=4)"},  # a plain model, by its config
        {"positions": "ntk(factor=2)", "cache": "int8"},
        {"pattern": {"0": "sliding(window=8)"}, "cache": {"1": "paged(page=4)"}},
    ],
)
def test_a_model_that_was_swapped_is_so_again(axes):
    model = effattn.swap(small(), **axes)
    ids, before = torch.arange(100)[None], describe(model).layers
    logits = model(ids).logits
    with Rule("x", {"positions": "rerope(window=32)"}).on(model):
        assert describe(model).layers[0]["positions"] == "rerope(window=32)"
    assert describe(model).layers == before
    assert torch.equal(model(ids).logits, logits)
    learned = effattn.swap(small(), "sliding(window=8, sink_logits=True)")
    with pytest.raises(Unsupported, match="weights of its own"), Rule("x", axes).on(learned):
        pass


LOGN = "logn(trained=True)"


def test_a_model_trained_with_logn_keeps_it_under_every_rule():
    model = effattn.swap(small(), positions=LOGN)
    ids = torch.arange(100)[None]
    before = model(ids).logits
    own = trained_with(model, "x")
    assert own == {"positions": {"0": LOGN, "1": LOGN}}
    found = of_own(rules(32, 64), ["pi", "sliding"], own, layers=2)
    assert [rule.name for rule in found] == ["baseline", "pi", "sliding-16", "sliding-32"]
    assert [rule.axes.get("positions") for rule in found] == [
        None,
        f"pi(factor=2.0)+{LOGN}",
        LOGN,
        LOGN,
    ]
    for rule in found:
        with rule.on(model):
            held = {row["positions"] for row in describe(model).layers}
            assert held == {rule.axes.get("positions", LOGN)}
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(KeyError), found[1].on(model):
        raise KeyError
    with pytest.raises(ValueError, match="codes"), Rule("x", {"pattern": "vq(codes=0)"}).on(model):
        pass
    assert torch.equal(model(ids).logits, before), "whatever happened"


def test_layers_that_were_trained_with_unlike_attention_are_a_row_by_themselves():
    model = effattn.swap(small(), {"0": "sliding(window=8)"}, positions={"1": f"nope+{LOGN}"})
    own, every = trained_with(model, "x"), rules(32, 64)
    assert [rule.axes for rule in of_own(every, (), own, layers=2)] == [{}]
    assert of_own(every, ["baseline"], own, layers=2) == every[:1]
    with pytest.raises(ValueError, match=r"rules: got 'pi', .* \(0: sliding\(window=8\), 1: nope"):
        of_own(every, ["pi"], own, layers=2)
    with pytest.raises(ValueError, match="did you mean 'pi'"):
        of_own(every, ["pii"], own, layers=2)
    some = effattn.swap(small(), positions={"0": LOGN})  # the same in some layers only
    assert of_own(every, (), trained_with(some, "x"), layers=2) == every[:1]


def test_what_was_swapped_after_training_is_refused():
    for axes in ({"pattern": "sliding(window=8)"}, {"positions": "logn"}, {"cache": "int8"}):
        with pytest.raises(Unsupported, match="model: x is swapped already; valid is"):
            trained_with(effattn.swap(small(), **axes), "x")
    plain = effattn.swap(small(), positions="pi(factor=2)")  # in transformers' own terms
    assert trained_with(plain, "x") == trained_with(small(), "x") == {}


# ---- the sequences
# -------------------------------------------------------------------------------------------------


def test_stretches_are_long_and_within_one_document():
    tokenizer = effattn.embedded.tokenizer()
    bodies = ["a b c", "x = 1\n" * 40, "y = 2\n" * 90]
    ids = [tokenizer(body)["input_ids"] for body in bodies]
    found = texts.long_sequences(bodies, tokenizer, 3, 60)
    assert found.shape == (3, 61)
    assert found.tolist() == [ids[1][:61], ids[2][:61], ids[1][60:121]]
    with pytest.raises(
        ValueError, match="sequences: got 99 of 60 tokens, the text has documents for"
    ):
        texts.long_sequences(bodies, tokenizer, 99, 60)


def test_windows_predict_each_token_once_and_repeats_repeat():
    rows = torch.arange(26).view(2, 13)
    cut = texts.windows(rows, 4)
    assert cut.shape == (6, 5)
    assert torch.equal(cut[:, 1:].reshape(2, 12), rows[:, 1:])
    assert texts.repeated(rows, 5)[1].tolist() == [*range(13, 18), *range(13, 18), 13, 14, 15]


def test_copying_is_checked_on_copies(monkeypatch):
    seen = []

    def scored(model, sequences, progress):
        seen.append(sequences)
        right = torch.zeros(len(sequences), sequences.shape[1] - 1, dtype=torch.bool)
        right[:, 15:] = True  # from the second copy on
        return right.float(), right

    monkeypatch.setattr(copying, "token_scores", scored)
    found = copying.copy_check(None, torch.arange(80)[None], 64)
    assert seen[0].shape == (1, 65)
    assert torch.equal(seen[0][0, :16], seen[0][0, 16:32])
    assert found == {"period": 16, "first": 0.0, "later": 1.0}
    assert copying.errors_gone(found) == 1.0
    assert copying.errors_gone({"first": 0.4, "later": 0.55}) == pytest.approx(0.25)


def test_a_row_is_what_the_rule_scores():
    model, longest = small(), 128
    sequences = torch.randint(0, 3072, (2, longest + 1), generator=torch.Generator().manual_seed(0))
    rule = next(one for one in rules(32, longest) if one.name == "rerope-16")
    found = measured(rule, model, sequences, [32, longest], 48, 32)
    vary = measured(dataclasses.replace(rule, varies=True), model, sequences, [32, longest], 48, 32)
    for ours, theirs in zip(found["repeated"], vary["repeated"], strict=True):
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5), (
            "a prefix is a short sequence"
        )
    with rule.on(model):
        whole, _ = token_scores(model, sequences)
        again, _ = token_scores(model, texts.repeated(sequences, 48))
        fresh, _ = token_scores(model, texts.windows(sequences, 32))
    natural = {one["length"]: one["cross_entropy"] for one in found["natural"]}
    assert natural == {
        32: pytest.approx(fresh.mean().item()),
        128: pytest.approx(whole.mean().item()),
    }
    assert found["repeated"][0]["copies"] is None
    assert found["repeated"][1]["copies"]["cross_entropy"] == pytest.approx(
        again[:, 48:].mean().item()
    )
    curve = found["curves"]["natural"]
    assert [(one["first"], one["last"]) for one in curve[:2]] == [(0, 4), (4, 8)]
    assert curve[-1]["last"] == longest
    assert curve[3]["cross_entropy"] == pytest.approx(whole[:, 12:16].mean().item())


# ---- what is claimed
# -------------------------------------------------------------------------------------------------


def test_claims_hold_where_the_numbers_do():
    found = {claim.text: claim for claim in claims(ArticleReport(data()))}
    assert len(found) == 13
    assert all(claim.holds for claim in found.values()), [c for c in found.values() if not c.holds]
    other = data()
    for one in other["rules"]:
        if one["name"] == "rerope-128":
            one["natural"][-1]["cross_entropy"] = 4.9
            one["repeated"][-1]["copies"]["accuracy"] = 0.2
            one["retrieval"]["score"] = 0.3
    held = {claim.text: claim.holds for claim in claims(ArticleReport(other))}
    assert not held["ReRoPE is better than every rule of angles"]
    assert not held["What was read far back is copied by ReRoPE, and not by a sliding window"]
    assert not any(
        value for text, value in held.items() if text.startswith("ReRoPE: longer context")
    )
    few = data() | {"rules": data()["rules"][:3], "task_learned": False}
    assert {claim.holds for claim in claims(ArticleReport(few))} == {True, None}


def test_a_report_says_what_was_not_learned():
    made = data() | {"task_learned": False, "copy": {"period": 128, "first": 0.4, "later": 0.45}}
    text = ArticleReport(made).to_markdown()
    assert "the model has NOT learned to copy" in text
    assert "has not learned this task within its trained length: compare the nats only" in text
    assert "not measured" in text
    assert "rerope-128 + log-n 2.700, the lowest" in ArticleReport(data()).headline


# ---- the job
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lengths": (32, 100)},
            r"lengths: got 32, valid is 16 or more tokens, and what divides the longest \(100\)",
        ),
        ({"lengths": (64, 128)}, r"lengths: got \[64, 128\], valid are the trained length \(32\)"),
        ({"period": 256}, "period: got 256, valid is less than the longest"),
        ({"rules": ("yarm",)}, "did you mean 'yarn'"),
        ({"retrieval": "passky"}, "did you mean 'passkey'"),
        ({"sequences": 0}, "sequences: got 0"),
        ({"sequences": 10**4}, "sequences: got 10000 of 256 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything(folder, story, tmp_path, change, message):
    job = Settings(model=str(folder), text=(story,), json=tmp_path / "x.json", retrieval="none")
    with pytest.raises(ValueError, match=message):
        extend_context.run(dataclasses.replace(job, **change))
    assert list(tmp_path.iterdir()) == []


def test_models_without_rotary_positions_are_refused():
    with pytest.raises(Unsupported, match="has no rotary positions to change"):
        extend_context.trained_length(tiny("opt"))


def test_the_whole_job_and_going_on_after_a_stop(folder, story, tmp_path, monkeypatch):
    job = Settings(
        model=str(folder),
        text=(story,),
        output=tmp_path / "out",
        json=tmp_path / "result.json",
        sequences=1,
        rules=("rerope-8", "sliding-32"),
        lengths=(32, 512),
        retrieval="recall",
        retrieval_length=600,
        retrieval_trials=1,
        retrieval_depths=(0.5,),
    )
    monkeypatch.setattr(copying, "ask", asked := _Asked())
    once, calls = rule_losses.measured, []

    def stops(rule, *rest, **shown):
        calls.append(rule.name)
        if rule.name.startswith("sliding"):
            raise KeyboardInterrupt
        return once(rule, *rest, **shown)

    monkeypatch.setattr(rule_losses, "measured", stops)
    with pytest.raises(KeyboardInterrupt):
        extend_context.run(job)
    assert job.partial.exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"finished parts of a run with other settings \(period\)"):
        extend_context.run(dataclasses.replace(job, period=100))
    monkeypatch.setattr(
        rule_losses,
        "measured",
        lambda rule, *rest, **shown: calls.append(rule.name) or once(rule, *rest, **shown),
    )
    report = extend_context.run(job)
    assert calls == [
        "baseline",
        "baseline + log-n",
        "rerope-8",
        "rerope-8 + log-n",
        "sliding-32",
        "sliding-32",
    ]
    assert [row["name"] for row in report.rules] == calls[:5]
    assert len(asked.lengths) == 4, "log-n rows are not asked, and nothing twice"
    assert [row["retrieval"] is None for row in report.rules] == [False, True, False, True, False]
    assert not job.partial.exists()
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
    }
    again = ArticleReport.load(tmp_path / "result.json")
    assert again.data == json.loads(report.to_json())
    baseline, logn = report.rules[:2]
    assert report.loss(baseline, 32) == pytest.approx(report.loss(logn, 32), rel=1e-6), (
        "no effect within"
    )
    assert report.loss(baseline) != report.loss(logn)
    with pytest.raises(ValueError, match="holds a finished report"):
        extend_context.run(job)


def test_a_trained_variant_is_measured_as_what_it_is(story, tmp_path):
    model = effattn.swap(small(), positions=LOGN)
    effattn.save(model, tmp_path / "logn", effattn.embedded.tokenizer())
    job = Settings(
        model=str(tmp_path / "logn"),
        text=(story,),
        json=tmp_path / "result.json",
        sequences=1,
        rules=("rerope-8",),
        lengths=(32, 64),
        retrieval="none",
    )
    with pytest.raises(ValueError, match=r"tune_tokens: got 64, .* which a tuned rule would take"):
        extend_context.run(dataclasses.replace(job, tune_tokens=64, tune_text=(story,)))
    report = extend_context.run(job)
    assert [row["name"] for row in report.rules] == ["baseline", "rerope-8"]
    assert report.own == {"positions": {"0": LOGN, "1": LOGN}}
    sequences = texts.long_sequences([story.read_text()], effattn.embedded.tokenizer(), 1, 64)
    nats, _ = token_scores(model, sequences)
    assert report.loss(report.rules[0]) == pytest.approx(nats.double().mean().item(), rel=1e-5)
    said = report.to_markdown()
    assert f"trained with {LOGN} in layers 0, 1, which every rule keeps" in said
    assert "The model as it was trained fails beyond" in said


class _Asked:
    def __init__(self):
        self.lengths = []

    def __call__(self, task, model, tokenizer, length, depths, **rest):
        self.lengths.append(length)
        return data()["rules"][0]["retrieval"] | {"length": length}


def test_the_command_line(folder):
    import typer

    app = typer.Typer()
    app.command()(extend_context.command)
    done = CliRunner().invoke(app, ["--model", str(folder), "--rules", "rerop"])
    assert done.exit_code == 2
    assert "did you mean 'rerope'" in done.output
