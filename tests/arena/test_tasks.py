"""The arena's tasks: labels found again by another way, examples from seeds."""

from __future__ import annotations

import pytest
import torch

from effattn.arena import pathfinder
from effattn.arena.pathfinder import APART, EMPTY, END
from effattn.arena.tasks import FILLER, IDS, KEYS, PAD, TASKS, VALUES
from effattn.evaluate.list_operations import OPERATIONS


def connected(image: torch.Tensor) -> bool:
    """Whether one gets from one end to the other over pixels that are nearer than other paths."""
    lit = {tuple(place) for place in (image != EMPTY).nonzero().tolist()}
    first, last = (tuple(place) for place in (image == END).nonzero().tolist())
    reached, edge = {first}, [first]
    while edge:
        y, x = edge.pop()
        near = {
            (a, b)
            for a, b in lit - reached
            if max(
                abs(a - y),
                abs(b - x),
            )
            < APART
        }
        reached |= near
        edge += near
    return last in reached


@pytest.mark.parametrize(
    "side",
    [
        12,
        16,
        24,
    ],
)
def test_who_follows_the_path_is_right(side):
    images, labels = pathfinder.draw(
        24,
        side=side,
        seed=side,
    )
    assert images.shape == (24, side, side)
    assert [connected(image) for image in images] == labels.bool().tolist()
    assert 4 < labels.sum() < 20
    assert ((images == END).sum((1, 2)) == 2).all()
    # what is lit does not give it away: as much for both labels
    lit = (images != EMPTY).sum((1, 2)).double()
    assert abs(lit[labels == 1].mean() - lit[labels == 0].mean()) < 0.2 * lit.mean()


def test_images_come_from_seeds():
    first, again, other = (
        pathfinder.draw(
            4,
            side=16,
            seed=seed,
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(
        first[0],
        again[0],
    )
    assert not torch.equal(
        first[0],
        other[0],
    )
    with pytest.raises(
        ValueError,
        match="side: got 11, valid is a whole number of at least 12",
    ):
        pathfinder.draw(
            1,
            side=11,
        )


def test_expressions_have_the_value_that_their_label_says():
    symbols = {number: symbol for symbol, number in IDS.items()}
    found = TASKS["listops"].make(
        40,
        64,
        3,
    )
    assert found.tokens.shape == found.real.shape == (40, 64)
    assert torch.equal(
        found.real,
        found.tokens != PAD,
    )
    for row, label in zip(
        found.tokens.tolist(),
        found.labels.tolist(),
        strict=True,
    ):
        stack: list[list] = [[]]
        for symbol in (symbols[number] for number in row if number != PAD):
            if symbol.startswith("["):
                stack.append([symbol[1:]])
            elif symbol == "]":
                name, *values = stack.pop()
                stack[-1].append(OPERATIONS[name](values))
            else:
                stack[-1].append(int(symbol))
        assert stack == [[label]]


def test_what_is_recalled_is_far_away_and_nothing_else_tells():
    found = TASKS["recall"].make(200, 48, 3)
    pairs = FILLER + 1 + KEYS  # the first of their tokens
    for row, label in zip(found.tokens.tolist(), found.labels.tolist(), strict=True):
        asked, empty, told = row[0] - FILLER - 1, row[1:24], row[24:]
        assert 0 <= asked < KEYS
        assert set(empty) == {FILLER}
        said = [divmod(token - pairs, VALUES) for token in told]
        assert {value for key, value in said if key == asked} == {label}
        # as often as any other, so that no value is likelier without the question
        assert [sum(value == one for _, value in said) for one in range(VALUES)] == [6] * VALUES
    assert found.labels.bincount(minlength=VALUES).min() > 30


@pytest.mark.parametrize(
    "name",
    TASKS,
)
def test_tokens_and_labels_are_within_what_a_task_says(name):
    task = TASKS[name]
    found = task.make(
        16,
        max(
            task.least,
            64,
        ),
        0,
    )
    assert found.tokens.max() < task.vocabulary
    assert 0 <= found.labels.min() <= found.labels.max() < task.classes
    again = task.make.__wrapped__(
        16,
        max(
            task.least,
            64,
        ),
        0,
    )
    assert torch.equal(
        found.tokens,
        again.tokens,
    )
    assert not torch.equal(
        found.tokens,
        task.make(
            16,
            max(
                task.least,
                64,
            ),
            1,
        ).tokens,
    )
