"""Launches that the host remembers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from effattn.kernels.launching import Constants, constants

CASES = [
    "any_launch_is_the_binders",
    "options_are_told_apart",
    "the_binder_is_asked_once",
    "what_is_remembered_is_bounded",
]


def test_what_is_remembered_is_what_the_binder_says():
    script = Path(__file__).with_name("remembered_launches.py")
    environ = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, CASES), done.stderr


def test_constants_are_who_they_are():
    first, second = constants(D=16), constants(D=16)
    assert first == first
    assert first != second
    assert dict(first) == dict(second)
    assert {first: 1, second: 2}[second] == 2
    assert Constants.of(first) is first
    assert dict(Constants.of({"D": 3})) == {"D": 3}
