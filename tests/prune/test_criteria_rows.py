"""What every criterion says of itself, a row each: a new one is a file in
`prune/structural/criteria/` and a line in `ROWS`."""

from __future__ import annotations

import pytest
import typer
from conftest import tiny

from effattn.calibration.layerwise import windows
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.prune.structural import criteria
from effattn.prune.structural.criteria.base import TARGETS, criterion
from effattn.recipes.cli import app

INSIDE = ("heads", "ffn")
# name: (what it ranks, whether it takes gradients), in the order in which errors name them
ROWS = {
    "taylor": (TARGETS, True),
    "obs": (INSIDE, False),
    "michel": (INSIDE, True),
    "activation": (INSIDE, False),
    "flap": (INSIDE, False),
    "wanda_sum": (INSIDE, False),
    "block_influence": (("layers",), False),
    "random": (TARGETS, False),
}


@pytest.mark.quick
def test_every_criterion_has_a_row_and_the_choices_are_the_registry():
    found = criteria.criteria()
    assert tuple(found) == criteria.CRITERIA == tuple(ROWS)
    for name, one in found.items():
        assert (one.name, one.targets, one.needs_loss) == (name, *ROWS[name])
    with pytest.raises(ValueError, match="criterion 'obs' is registered already"):
        criterion("obs", INSIDE)(lambda *_: None)


@pytest.mark.quick
def test_the_command_line_names_them_all():
    prune = typer.main.get_command(app).commands["prune"].commands
    said = next(one.help for one in prune["structured"].params if "--criterion" in one.opts)
    places = [said.index(name) for name in ROWS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ROWS)
def test_every_criterion_ranks_what_it_says_and_refuses_the_rest(name, tokens):
    parts = hf.of(tiny("llama", num_key_value_heads=4))
    batches, (known, _) = windows(tokens[:128], 32, 2), ROWS[name]
    shapes = {
        "heads": (2, 4),
        "ffn": (2, 96),
        "layers": (2,),
    }
    found = criteria.measure(name, parts, batches, known)
    for target in TARGETS:
        scores = getattr(found, target)
        if target in known:
            assert tuple(scores.shape) == shapes[target]
            continue
        assert scores is None
        with pytest.raises(Unsupported, match=f"{name!r} does not rank {target}; 'taylor'"):
            criteria.measure(name, parts, batches, [target])
