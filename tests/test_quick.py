"""`pytest -m quick` has a part of every folder of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import QUICK

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parent


def test_the_named_files_are_there():
    named = {f"{folder}/{name}.py" for folder, names in QUICK.items() for name in names}
    assert {file for file in named if not (TESTS / file).is_file()} == set()


def test_every_folder_has_quick_tests():
    files = sorted(TESTS.rglob("test_*.py"))
    folders = {file.parent for file in files}
    marked = {file.parent for file in files if "pytest.mark.quick" in file.read_text("utf-8")}
    assert folders - marked - {TESTS / folder for folder in QUICK} == set()
