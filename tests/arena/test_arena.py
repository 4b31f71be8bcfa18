"""The arena's encoder, a row of it, its report, and the recipe: whole, stopped and gone on."""

from __future__ import annotations

import json

import pytest
import torch

from effattn.arena import training
from effattn.arena.encoder import Encoder
from effattn.arena.report import ArenaReport, pareto
from effattn.arena.tasks import TASKS, Examples, Task
from effattn.arena.training import Budget, train
from effattn.arena.widths import eighths
from effattn.recipes import lra
from effattn.registry import backends
from effattn.specs import parse_spec

SIZES = {
    "length": 32,
    "width": 16,
    "layers": 1,
    "heads": 2,
}
SMALL = Budget(
    **SIZES,
    examples=64,
    tested=32,
    steps=3,
    batch=8,
)


def test_every_bidirectional_pattern_takes_part():
    named = {parse_spec(spec)[0] for spec in eighths(256)}
    assert named == {name for name, cls in backends().items() if cls.traits.bidirectional}


@pytest.mark.parametrize(
    "pattern",
    eighths(32),
)
def test_padding_changes_nothing_and_everything_is_trained(pattern):
    torch.manual_seed(0)
    task = TASKS["listops"]
    encoder = Encoder(
        task,
        pattern,
        **SIZES,
    )
    found = task.make(
        4,
        32,
        0,
    )
    encoder(
        found.tokens,
        found.real,
    )  # codebooks, projections
    encoder.eval()
    first = encoder(
        found.tokens,
        found.real,
    )
    assert first.shape == (4, 10)
    other = torch.where(
        found.real,
        found.tokens,
        1,
    )
    torch.testing.assert_close(
        encoder(
            other,
            found.real,
        ),
        first,
    )
    encoder.train()
    encoder(
        found.tokens,
        found.real,
    ).square().sum().backward()
    encoder.restored(
        found.tokens,
        found.real,
    ).square().sum().backward()
    still = [name for name, one in encoder.named_parameters() if one.grad is None]
    assert not still


def test_an_encoder_learns_what_can_be_learned(monkeypatch):
    """Which of two tokens is the more frequent: a mean tells."""

    def make(count: int, length: int, seed: int) -> Examples:
        chance = torch.Generator().manual_seed(seed)
        share = torch.rand(
            (count, 1),
            generator=chance,
        )
        tokens = (
            1
            + (
                torch.rand(
                    (count, 33),
                    generator=chance,
                )
                < share
            ).long()
        )
        real = torch.ones_like(
            tokens,
            dtype=torch.bool,
        )
        return Examples(
            tokens,
            real,
            (tokens.sum(1) > 33 * 1.5).long(),
        )

    task = Task(
        "more",
        2,
        3,
        32,
        make,
    )
    steps = []
    how = Budget(
        **SIZES,
        examples=256,
        tested=128,
        steps=60,
        pretraining=4,
        batch=16,
        lr=1e-2,
    )
    row = train(
        task,
        "linear",
        how,
        lambda *done: steps.append(done),
    )
    assert row["accuracy"] > 0.9 > row["majority"]
    assert steps == [
        (step, 64)
        for step in range(
            1,
            65,
        )
    ]
    assert row["tokens"] == 33
    assert row["error"] == pytest.approx((row["accuracy"] * (1 - row["accuracy"]) / 128) ** 0.5)
    assert row["peak_bytes"] > 0
    again = train(
        task,
        "linear",
        how,
        lambda *done: None,
    )
    assert {
        **again,
        "seconds": 0,
        "ms": 0,
    } == {
        **row,
        "seconds": 0,
        "ms": 0,
    }


def test_restoring_hides_what_it_asks_for():
    found = TASKS["listops"].make(
        8,
        32,
        0,
    )
    seen = []

    class Told:
        mask = 99

        def restored(self, tokens, real):
            seen.append(tokens)
            return torch.zeros(*tokens.shape, 20)

    chance = torch.Generator().manual_seed(0)
    loss = training._restoring(
        Told(),
        found.tokens,
        found.real,
        found.labels,
        chance,
    )
    hidden = seen[0] == 99
    assert loss.item() == pytest.approx(torch.tensor(20.0).log().item())
    assert 0.15 < (hidden & found.real).sum() / found.real.sum() < 0.45
    assert hidden.any(1).all()
    assert not (hidden & ~found.real).any()


def test_a_loss_that_is_no_number_is_said():
    how = Budget(
        **SIZES,
        examples=8,
        tested=4,
        steps=2,
        batch=4,
        lr=1e30,
    )
    with pytest.raises(
        FloatingPointError,
        match="loss: got nan at step 2",
    ):
        train(
            TASKS["listops"],
            "dense",
            how,
            lambda *done: None,
        )


def test_the_front_is_those_that_nobody_beats():
    rows = [
        {
            "ms": ms,
            "accuracy": accuracy,
        }
        for ms, accuracy in ((3, 0.5), (1, 0.2), (2, 0.5), (2, 0.1), (4, 0.4), (5, 0.9))
    ]
    assert [
        row["ms"]
        for row in pareto(
            rows,
            "ms",
        )
    ] == [
        1,
        2,
        5,
    ]


# ---- the recipe


def settings(out, **more):
    small = {
        "examples": 48,
        "tested": 16,
        "steps": 2,
        "pretrain_steps": 2,
        "batch": 8,
    }
    given = small | {
        "width": 16,
        "heads": 2,
        "layers": 1,
        "length": 144,
        "pretrained": ("linear",),
    }
    return lra.Settings(
        output=out,
        **given | {"patterns": ("dense", "linear")} | more,
    )


def test_the_recipe_goes_on_and_reports(tmp_path, monkeypatch):
    calls, made = [], training.train

    def stopped(task, pattern, budget, progress):
        calls.append((task.name, pattern, budget.pretraining))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(
            task,
            pattern,
            budget,
            progress,
        )

    monkeypatch.setattr(
        training,
        "train",
        stopped,
    )
    with pytest.raises(KeyboardInterrupt):
        lra.run(settings(tmp_path / "out"))
    assert [file.name for file in tmp_path.iterdir()] == [".out.partial.json"]
    assert "2 finished parts are kept" in settings(tmp_path / "out").stopped()
    report = lra.run(settings(tmp_path / "out"))
    tasks, patterns = ("listops", "pathfinder_images"), (("dense", 0), ("linear", 0), ("linear", 2))
    wanted = [(task, *pattern) for task in tasks for pattern in patterns]
    assert calls == [*wanted[:3], *wanted[2:]]
    told = [(row["task"], row["pattern"], row["pretraining"]) for row in report.rows]
    assert told == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    again = ArenaReport.load(tmp_path / "out")
    assert again.data == json.loads(report.to_json())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "best from scratch" in page
    assert "listops, 144 tokens: " in report.headline
    assert "pathfinder_images" in report.to_markdown()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ("list",)}, "did you mean 'listops'"),
        ({"tasks": ()}, "tasks: got none"),
        ({"patterns": ("linformer_blockwise(block=8)",)}, "which is causal only"),
        ({"patterns": ("dnse",)}, "did you mean 'dense'"),
        (
            {
                "patterns": (),
                "pretrained": ("topk",),
            },
            "pretrained: got 'topk'",
        ),
        ({"length": 143}, "length: got 143, pathfinder_images takes at least 144 tokens"),
        ({"heads": 3}, "heads: got 3 for a width of 16"),
        (
            {
                "width": 6,
                "heads": 6,
            },
            "width: got 6",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_any_work(given, message, tmp_path):
    with pytest.raises(
        ValueError,
        match=message,
    ):
        lra.run(
            settings(
                tmp_path / "out",
                **given,
            )
        )
    assert list(tmp_path.iterdir()) == []
