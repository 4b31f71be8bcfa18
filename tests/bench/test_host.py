"""What the host does in a step (`bench.host`): its table, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

REFUSED = {
    "nonsense": "error: backend: got 'nonsense' (did you mean 'dense'?), valid are",
    "sliding(window=": "error: spec 'sliding(window=': cannot be parsed; valid is",
    "int8(group=5)": "error: int8: group: got 5 (nearest: 16), valid are 16, 32",
    "linformer": "error: linformer: it cannot decode",
}


def run(*specs: str) -> subprocess.CompletedProcess:
    environ = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.host", *specs]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.launch
def test_a_table_of_what_is_asked_for():
    done = run("dense", "int8")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert [row[0].strip() for row in rows] == ["step", "---", "`dense`", "`int8`"]
    assert all(int(cell) > 0 for row in rows[2:] for cell in row[1:])


def test_what_is_no_spec_is_refused_in_one_line(monkeypatch, capsys):
    from bench import host

    monkeypatch.setattr(host, "without_launches", lambda: pytest.fail("began to measure"))
    for spec, message in REFUSED.items():
        with pytest.raises(SystemExit) as refused:
            host.main(["dense", spec])
        assert str(refused.value).startswith(message)
        assert "\n" not in str(refused.value)
        assert capsys.readouterr().out == ""
