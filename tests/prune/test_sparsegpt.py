"""SparseGPT, Wanda and magnitude on one matrix: what the papers' equations say, in fp64, and exact
counts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.calibration.hessian import DAMPING, Hessian, InverseHessian, inverse_factor
from effattn.prune.unstructured.methods.magnitude import magnitude_mask
from effattn.prune.unstructured.methods.sparsegpt import sparsegpt
from effattn.prune.unstructured.methods.wanda import wanda_mask
from effattn.prune.unstructured.nm import (
    Sparsity,
    lowest,
    lowest_first,
    lowest_of_groups,
    lowest_per_row,
)
from effattn.prune.unstructured.reference import sparsegpt_reference


def problem(
    outputs: int = 24, inputs: int = 64, tokens: int = 400, seed: int = 0, dtype=torch.float64
):
    """Weights (outputs, inputs) and correlated inputs (tokens, inputs)."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=dtype)
    mix = torch.randn(
        inputs,
        inputs,
        generator=draw,
        dtype=dtype,
    ) / inputs**0.5 + 0.5 * torch.eye(inputs, dtype=dtype)
    return weight, torch.randn(
        tokens,
        inputs,
        generator=draw,
        dtype=dtype,
    ) @ mix


def output_error(weight, pruned, x) -> float:
    return float(((weight - pruned) @ x.T).square().sum())


# ---- the reference page's invariants, by their numbers
# --------------------------------------------------------------


def test_1_removing_one_weight_equals_least_squares():
    """dw = -(w_q / [H^-1]_qq) H^-1_:q is what least squares over the other weights finds."""
    weight, x = problem(1, 12)
    hessian, w, q = x.T @ x, weight[0], 5
    inverse = hessian.inverse()
    ours = w - w[q] / inverse[q, q] * inverse[:, q]
    keep = torch.arange(12) != q
    best = torch.linalg.lstsq(x[:, keep], x @ w).solution
    torch.testing.assert_close(
        ours[keep],
        best,
        rtol=0,
        atol=1e-10,
    )
    # The method itself: columns before the one that goes are final, those after it make up for it.
    done = sparsegpt(weight, hessian, 1 / 12, damping=0)
    (gone,) = done.mask[0].nonzero().flatten().tolist()
    assert gone < 11
    keep = torch.arange(12) > gone
    best = torch.linalg.lstsq(x[:, keep], x[:, gone:] @ w[gone:]).solution
    torch.testing.assert_close(
        done.weight[0, keep],
        best,
        rtol=0,
        atol=1e-10,
    )


def test_2_the_factor_has_every_later_inverse_on_its_diagonal():
    _, x = problem()
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.0)
    torch.testing.assert_close(
        factor,
        factor.triu(),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(factor.T @ factor, hessian.inverse())
    torch.testing.assert_close(factor, torch.linalg.cholesky(hessian.inverse(), upper=True))
    for i in (0, 1, 30, 62, 63):
        assert factor[i, i] ** 2 == pytest.approx(float(hessian[i:, i:].inverse()[0, 0]), rel=1e-9)
    # several panels
    wide = torch.randn(
        700,
        700,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    wide = wide @ wide.T + 50 * torch.eye(700)
    torch.testing.assert_close(
        inverse_factor(wide, 0.0), torch.linalg.cholesky(wide.inverse(), upper=True)
    )


@pytest.mark.parametrize("sparsity", [0.5, 0.37, "2:4", "3:8", "5:16", "9:32"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_3_the_loss_is_the_output_error(sparsity, damping):
    """The sum of (w - q)^2 / U_ii^2 equals the squared output error, or with damping the damped
    quadratic form.
    """
    weight, x = problem(24, 160)
    hessian = x.T @ x
    done = sparsegpt(weight, hessian, sparsity, damping=damping, block=64)
    difference = weight - done.weight
    damped = hessian + damping * hessian.diagonal().diag()
    expected = float((difference @ damped * difference).sum())
    assert done.loss == pytest.approx(expected, rel=1e-8)
    if damping == 0:
        assert done.loss == pytest.approx(
            output_error(
                weight,
                done.weight,
                x,
            ),
            rel=1e-8,
        )


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "4:8"])
def test_4_the_output_error_is_the_lowest(sparsity):
    """Wanda against magnitude is left open: on random data either may win."""
    weight, x = problem(96, 256, 1024)
    hessian, what = x.T @ x, Sparsity.parse(sparsity)
    ours = output_error(weight, sparsegpt(weight, hessian, sparsity).weight, x)
    for mask in (
        magnitude_mask(weight, what),
        wanda_mask(
            weight,
            hessian.diagonal(),
            what,
        ),
    ):
        assert ours < 0.9 * output_error(
            weight,
            weight.masked_fill(mask, 0),
            x,
        )


def test_5_groups_do_not_depend_on_the_block():
    weight, x = problem(32, 96)
    hessian = x.T @ x
    results = [
        sparsegpt(
            weight,
            hessian,
            "2:4",
            block=block,
        )
        for block in (4, 8, 32, 96, 128)
    ]
    for other in results[1:]:
        assert torch.equal(other.mask, results[0].mask)
        torch.testing.assert_close(
            other.weight,
            results[0].weight,
            rtol=0,
            atol=1e-12,
        )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 50),
    st.floats(0, 1),
    st.integers(1, 60),
    st.booleans(),
)
def test_6_exactly_k_weights_go(outputs, inputs, share, block, repeated):
    """Also at 0 and 1, with ties, and where nothing divides anything."""
    weight, x = problem(outputs, inputs, 2 * inputs)
    if repeated:
        weight = weight.round()
    what, count = Sparsity(share), int(share * outputs * inputs + 0.5)
    done = sparsegpt(weight, x.T @ x, what, block=block)
    masks = [
        done.mask,
        magnitude_mask(weight, what),
        wanda_mask(
            weight,
            x.square().mean(0),
            what,
        ),
    ]
    assert [int(mask.sum()) for mask in masks] == [count] * 3
    rows = masks[2].sum(1)
    assert int(rows.max() - rows.min()) <= 1  # Wanda compares within an output
    assert bool((done.weight[done.mask] == 0).all())
    for stop in range(block, inputs, block):  # and evenly by blocks of columns
        assert int(done.mask[:, :stop].sum()) == int(share * outputs * stop + 0.5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.data(),
)
def test_6_exactly_n_of_every_m_go(m, groups, data):
    n = data.draw(st.integers(0, m))
    m *= data.draw(st.sampled_from([1, 3]))  # past what is ranked by pairs, too
    weight, x = problem(6, m * groups, 200)
    what = Sparsity.parse(f"{n}:{m}")
    masks = [
        sparsegpt(weight, x.T @ x, what).mask,
        magnitude_mask(weight, what),
        wanda_mask(weight, x[0] ** 2, what),
    ]
    for mask in masks:
        assert set(mask.reshape(-1, m).sum(1).tolist()) == {n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_7_zeros_are_positive(dtype):
    weight, x = problem(dtype=torch.float32)
    weight = weight.to(dtype)
    done = sparsegpt(weight, x.T @ x, 0.5)
    zeros = done.weight[done.mask]
    assert done.weight.dtype == dtype
    assert not torch.signbit(zeros).any()
    assert not zeros.any()


def test_8_a_failed_factorisation_names_the_layer_and_the_damping():
    weight, x = problem()
    broken = x.T @ x
    broken[3, 3] = -1.0
    with pytest.raises(
        torch.linalg.LinAlgError,
        match=r"layers\.3\.up: .* fails with damping 0\.01; give more damping",
    ):
        sparsegpt(weight, broken, 0.5, damping=0.01, name="layers.3.up")
    singular = torch.ones(64, 64, dtype=torch.float64)
    singular[0, 1] = singular[1, 0] = 1.05  # slightly indefinite: more damping heals it
    with pytest.raises(torch.linalg.LinAlgError, match="raise_damping=True"):
        sparsegpt(weight, singular, 0.5, damping=0.01)
    healed = sparsegpt(weight, singular, 0.5, damping=0.01, raise_damping=True)
    assert healed.damping == pytest.approx(0.1)
    assert int(healed.mask.sum()) == weight.numel() // 2
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"damping 0\.01 to 1; give more calibration tokens"
    ):
        sparsegpt(weight, -torch.eye(64).double(), 0.5, damping=0.01, raise_damping=True)


# ---- more
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_the_lazy_updates_change_nothing(sparsity):
    weight, x = problem(16, 320)
    hessian = x.T @ x
    ours = sparsegpt(weight, hessian, sparsity, block=64).weight
    torch.testing.assert_close(
        ours,
        sparsegpt_reference(
            weight,
            hessian,
            sparsity,
            block=64,
        ),
        rtol=1e-9,
        atol=1e-10,
    )


def test_an_input_that_is_always_zero_goes_first():
    weight, x = problem(8, 32)
    x[:, [4, 20]] = 0
    done = sparsegpt(100 * weight, x.T @ x, 0.25)
    assert bool(done.mask[:, [4, 20]].all())
    assert int(done.mask.sum()) == 64
    for kept in (
        sparsegpt(weight, x.T @ x, 0.0),
        sparsegpt(
            weight,
            x.T @ x,
            "0:4",
        ),
    ):
        torch.testing.assert_close(
            kept.weight,
            weight,
            rtol=0,
            atol=0,
        )
    assert not sparsegpt(
        weight,
        x.T @ x,
        1.0,
    ).weight.any()


def test_hessians_are_running_means_and_serve_several_layers():
    weight, x = problem(dtype=torch.float32)
    whole, pieces, diagonal = Hessian(), Hessian(), Hessian(diagonal_only=True)
    whole.add(x)
    for piece in x.split((1, 150, 249)):
        pieces.add(piece.view(1, *piece.shape))
        diagonal.add(piece)
    assert whole.mean.dtype == torch.float32
    torch.testing.assert_close(
        whole.mean,
        2 * x.T @ x / len(x),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        pieces.mean,
        whole.mean,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        diagonal.diagonal,
        whole.diagonal,
        rtol=1e-4,
        atol=1e-5,
    )
    before = whole.mean.clone()
    shared = InverseHessian.of(whole.mean, DAMPING, "q")
    for scale in (1, 2):
        once = sparsegpt(scale * weight, shared, 0.5).weight
        assert torch.equal(
            once,
            sparsegpt(
                scale * weight,
                whole.mean,
                0.5,
            ).weight,
        )
    assert torch.equal(whole.mean, before)
    bfloat = Hessian()
    bfloat.add(x.bfloat16())
    assert bfloat.mean.dtype == torch.float32
    x[7, 5] = float("inf")
    pieces.add(x)
    with pytest.raises(
        FloatingPointError, match=r"inputs of layers\.0\.q hold NaN or Inf in 1 of 64 features"
    ):
        pieces.check("layers.0.q")


def test_the_lowest_with_ties_takes_the_first():
    scores = torch.tensor([[1.0, 0, 1, 0, 1, 0], [2, 2, 2, 2, 2, 2]])
    assert lowest(scores, 4).int().tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0]]
    groups = lowest_of_groups(
        torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5]]),
        2,
        4,
    )
    assert groups.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
    draw = torch.Generator().manual_seed(0)
    for m in (1, 2, 7, 16, 17, 40):
        many = torch.randint(
            4,
            (m, 200),
            generator=draw,
        ).float()
        for n in (0, 1, m // 2, m):
            expected = torch.zeros(m, 200, dtype=torch.bool).scatter_(
                0, many.argsort(dim=0, stable=True)[:n], True
            )
            assert torch.equal(lowest_first(many, n), expected)
    uneven = lowest_per_row(torch.rand(4, 5), Sparsity(0.35))  # 7 of 20
    assert uneven.sum(1).tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "wrong", [-0.1, 1.5, float("nan"), "3:2", "2:0", "half", "2:4:8", None, True]
)
def test_sparsities_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="sparsity: got"):
        Sparsity.parse(wrong)


def test_sparsities_are_read_and_said():
    assert Sparsity.parse("2:4") == Sparsity(0.5, 2, 4)
    assert Sparsity.parse("0.7") == Sparsity.parse(0.7) == Sparsity(0.7)
    assert [Sparsity.parse(one).label for one in (0.5, "2:4", 1)] == ["50 %", "2:4", "100 %"]
    assert str(Sparsity.parse(" 4 : 8 ")) == "4:8"
    assert Sparsity(0.29).count(100) == 29  # 0.29 * 100 is less than 29
    with pytest.raises(ValueError, match="groups of 8, up_proj has 12"):
        Sparsity.parse("4:8").check_inputs(12, "up_proj")
