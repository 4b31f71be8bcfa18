"""What every one-shot method must do, a row each: a new one is a file in
`prune/unstructured/methods/` and a line in `ROWS`."""

from __future__ import annotations

import pytest
import torch

from effattn.calibration.hessian import DAMPING, Hessian
from effattn.errors import check_choice
from effattn.prune.unstructured.methods import methods
from effattn.prune.unstructured.methods.base import Masking, Needs, Options, register
from effattn.prune.unstructured.nm import Sparsity
from effattn.prune.unstructured.plan import METHODS

ROWS = {  # name: (what it needs, whether it changes weights that stay)
    "sparsegpt": (Needs.MOMENTS, True),
    "wanda": (Needs.NORMS, False),
    "magnitude": (Needs.NOTHING, False),
}
OPTIONS = Options(DAMPING, raise_damping=False, block=16)


def pruned(name: str, weight: torch.Tensor, x: torch.Tensor, sparsity: str):
    """The weight as the method prunes it for inputs x, and what it tells."""
    method = methods()[name]
    seen = Hessian(diagonal_only=method.needs is Needs.NORMS)
    seen.add(x)
    statistics = method.prepare(seen, "w", OPTIONS) if method.needs else None
    return method.prune(weight, statistics, Sparsity.parse(sparsity), "w", OPTIONS)


@pytest.mark.quick
def test_every_method_has_a_row_and_the_choices_are_the_registry():
    assert tuple(methods()) == METHODS == tuple(ROWS)
    for name, method in methods().items():
        assert method.name == name
        assert (method.needs, method.updates) == ROWS[name]
        assert method.source.startswith("arXiv:")
        assert type(method).__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sparsity", ["0.5", "0.3", "2:4"])
@pytest.mark.parametrize("name", ROWS)
def test_every_method_prunes_as_it_says(name, sparsity, dtype):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 64, generator=draw).to(dtype)
    x = torch.randn(300, 64, generator=draw, dtype=torch.float64)
    before, gone = weight.clone(), Sparsity.parse(sparsity).count(weight.numel())
    new, facts = pruned(name, weight, x if dtype == torch.float64 else x.float(), sparsity)
    zero = new == 0
    assert torch.equal(weight, before)
    assert (new.dtype, new.shape) == (dtype, weight.shape)
    assert int(zero.sum()) == gone
    assert not torch.signbit(new[zero]).any()
    if sparsity == "2:4":
        assert (zero.reshape(-1, 4).sum(1) == 2).all()
    assert torch.equal(new[~zero], weight[~zero]) != methods()[name].updates
    assert all(isinstance(value, int | float | str) for value in facts.values())


@pytest.mark.quick
def test_a_name_is_taken_once_and_a_wrong_one_names_all():
    class Second(Masking):
        name, needs, source = "wanda", Needs.NOTHING, "arXiv:0000.00000"

        def mask(self, weight, statistics, sparsity):
            return weight > 0

    with pytest.raises(ValueError, match="'wanda' is registered already"):
        register(Second)
    with pytest.raises(ValueError, match="valid are 'sparsegpt', 'wanda', 'magnitude'"):
        check_choice("method", "gpt", METHODS)
