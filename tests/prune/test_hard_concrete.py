"""Hard concrete gates are distributed as the paper says, settle to exactly k, and multipliers
climb.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

from effattn.hf import anatomy as hf
from effattn.prune.shearing import hard_concrete
from effattn.prune.shearing.lagrangian import Lagrangian
from effattn.prune.shearing.masks import Masks
from effattn.prune.shearing.rates import default_mask_lrs

N = 200_000


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 2.0])
def test_open_probability_is_that_of_samples(log_alpha):
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(0))
    z = hard_concrete.sample(torch.full((N,), log_alpha), uniform)
    expected = hard_concrete.open_probability(torch.tensor(log_alpha)).item()
    error = 4 * (expected * (1 - expected) / N) ** 0.5  # four standard errors
    assert (z > 0).float().mean().item() == pytest.approx(expected, abs=error)
    assert 0 <= z.min() <= z.max() <= 1
    # By symmetry z is 1 as often as it is 0 at -log alpha.
    ones = 1 - hard_concrete.open_probability(torch.tensor(-log_alpha)).item()
    assert (z == 1).float().mean().item() == pytest.approx(
        ones, abs=4 * (ones * (1 - ones) / N) ** 0.5
    )


def test_the_ends_of_the_noise_are_finite():
    log_alpha = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    z = hard_concrete.sample(log_alpha, torch.tensor([0.0, 1.0, 0.5]))
    z.sum().backward()
    assert z.tolist()[:2] == [0.0, 1.0]
    assert torch.isfinite(log_alpha.grad).all()


def test_gradients_are_those_of_the_formulas():
    log_alpha = torch.tensor([-1.0, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.6, 0.4, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: hard_concrete.sample(x, uniform), (log_alpha,))
    assert torch.autograd.gradcheck(hard_concrete.open_probability, (log_alpha,))


def test_settled_gates_are_exactly_k_a_row_even_when_all_are_equal():
    torch.manual_seed(0)
    log_alpha = torch.randn(3, 7)
    z = hard_concrete.settled(log_alpha, 4)
    assert (z > 0).sum(-1).tolist() == [4, 4, 4]
    for row, gates in zip(log_alpha, z, strict=True):
        assert set(row.topk(4).indices.tolist()) == set(gates.nonzero().flatten().tolist())
        torch.testing.assert_close(
            gates[gates > 0], torch.sigmoid(0.8 * row[gates > 0] / hard_concrete.BETA)
        )
    assert int((hard_concrete.settled(torch.zeros(10), 3) > 0).sum()) == 3
    expected = hard_concrete.open_probability(log_alpha).sum(-1).round().int().tolist()
    assert (hard_concrete.settled(log_alpha) > 0).sum(-1).tolist() == expected


def test_multipliers_climb_and_masks_fall_until_the_shape_is_met():
    """Nothing but the constraints: gradient descent on everything ends at the target, row by
    row.
    """
    masks = Masks(
        hf.of(tiny("llama")),
        {"heads": 2, "ffn": 24, "hidden": 32},
        start=2.0,
    )
    constraints = Lagrangian(masks, warmup=30)
    assert constraints.targets(15)["heads"] == pytest.approx(0.5 * 0.75)
    optimizer = torch.optim.Adam(
        [{"params": masks.parameters(), "lr": 0.2}, {"params": constraints.parameters(), "lr": 0.2}]
    )
    for step in range(150):
        optimizer.zero_grad()
        constraints(masks.removed(), step).backward()
        optimizer.step()
        masks.clamp()
    for axis, removed in masks.removed().items():
        target = constraints.targets(150)[axis]
        assert removed.tolist() == pytest.approx([target] * len(removed), abs=0.05), axis
    assert all(bool((each != 0).all()) for each in constraints.parameters())


def test_a_ranking_is_kept_while_the_rows_close():
    """Constraints alone close the lowest ranks of every row, sharply: what stays is nearly open,
    the rest shut.
    """
    masks = Masks(hf.of(tiny("llama")), {"ffn": 24})
    importance = torch.rand(2, 96, generator=torch.Generator().manual_seed(0))
    masks.rank("ffn", importance)
    assert masks.removed()["ffn"].max() < 0.02
    constraints, steps = Lagrangian(masks, warmup=60), 100
    _, level_lr, multiplier_lr = default_mask_lrs(steps, ramp=0.6)
    optimizer = torch.optim.Adam(
        [
            {"params": masks.level.parameters(), "lr": level_lr},
            {"params": constraints.parameters(), "lr": multiplier_lr},
        ]
    )
    for step in range(steps):
        optimizer.zero_grad()
        constraints(masks.removed(), step).backward()
        optimizer.step()
        masks.clamp()
    assert masks.removed()["ffn"].tolist() == pytest.approx([0.75, 0.75], abs=0.03)
    z = masks.settled(final=True)["ffn"]
    assert torch.equal(z > 0, importance >= importance.topk(24).values[:, -1:])
    assert z.sum() / 48 > 0.7  # with all log alphas at the border it is about 0.4


def test_multipliers_get_the_opposite_gradient():
    masks = Masks(hf.of(tiny("llama")), {"heads": 2})
    constraints = Lagrangian(masks, warmup=0)
    gap = (masks.removed()["heads"] - 0.75).detach()
    constraints(masks.removed(), 0).backward()
    torch.testing.assert_close(constraints.linear["heads"].grad, -gap)
    torch.testing.assert_close(constraints.square["heads"].grad, -gap.square())
