"""A results file is only gone on with by the code that began it."""

from pathlib import Path

import pytest

from bench import results
from effattn import kernels, prune, quant
from effattn.hf import live


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        (live, True),
        (kernels, True),
        (prune, True),
        (quant, True),
        (results, True),
        ("rows/decode.py", False),
    ],
)
def test_other_code_has_another_digest(module, counts, monkeypatch):
    """Whatever file of the package changes; which cases there are may change."""
    changed = (
        Path(results.__file__).parent / module if isinstance(module, str) else Path(module.__file__)
    )
    before, read = results.sources(), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda file: read(file) + b"#" * (file.resolve() == changed.resolve())
    )
    assert (results.sources() != before) is counts
