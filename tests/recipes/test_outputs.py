"""Where results go: what cannot be written is said first, one run at a time, and nothing is left
behind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flows import COMMANDS
from typer.testing import CliRunner

from effattn import outputs
from effattn.outputs import OWNER, STAGING, atomic_folder, check_file, check_new_folder, claim
from effattn.recipes.cli import app
from effattn.reports.files import TEMPORARY, write_text_atomic


def test_what_cannot_be_a_folder_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        tmp_path / "file": "exists and is not an empty folder",
        tmp_path / "full": "exists and is not an empty folder",
        tmp_path / "file" / "out": "file is not a folder",
        tmp_path / "file" / "a" / "b": "file is not a folder",
        tmp_path / "dangling": "is a link to .*nowhere', which does not exist",
        tmp_path / "dangling" / "out": "is a link to nothing",
        tmp_path / ("n" * 250): "has 250 bytes, valid is at most 241",
        tmp_path / "new" / ("ä" * 125) / "out": "has 250 bytes, valid is at most 241",
        tmp_path / ("n" * 300): "cannot be written .File name too long.",
        "~/out": "only the shell expands '~' .unquoted.; valid is '/",
        "~someone/out": "only the shell expands '~'",
        "a\0b": "zero bytes",
    }
    for path, said in cases.items():
        for check in (check_new_folder, lambda name, path: atomic_folder(path).__enter__()):
            with pytest.raises((ValueError, OSError), match=said) as caught:
                check("output", path)
            assert "\n" not in str(caught.value)
    for path in (
        tmp_path / "full",
        tmp_path / "file" / "x.json",
        "~/x.json",
        tmp_path / "dangling",
    ):
        with pytest.raises((ValueError, OSError), match=r"^json: "):
            check_file("json", path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="no permission in"):
        check_new_folder("output", tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


# ENOENT although the folder above is there: what /proc answers
@pytest.mark.parametrize("code", ["EROFS", "ENOSPC", "EACCES", "ENOENT"])
def test_what_the_disk_refuses_is_said_when_a_run_begins(tmp_path, monkeypatch, code):
    import errno

    def refuse(*_, **__):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        OSError, match=r"^output: .*new cannot be written \(.*\); nothing was done$"
    ):
        claim("output", tmp_path / "new").__enter__()
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match=r"cannot be written"):
        claim("output", tmp_path / "deep" / "new").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "x").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 2


def test_mount_points_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ValueError, match="is a mount point, valid is a new folder in it"):
        check_new_folder("output", tmp_path)


HOLD = """
import sys, time
from effattn.outputs import claim, atomic_folder
with claim("output", sys.argv[1]):
    if sys.argv[2] == "save":
        folder = atomic_folder(sys.argv[1]).__enter__()
        (folder / "half").write_text("x" * 1000)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("stage", ["work", "save"])
def test_a_second_run_names_the_first_and_a_dead_one_blocks_nobody(tmp_path, stage):
    out, other = tmp_path / "new" / "out", tmp_path / "new" / ".out.mine.tmp"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, out, stage], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        who = f"process {process.pid}" if stage == "work" else "another process"
        with pytest.raises(
            OSError,
            match=rf"^output: {out} is being written by {who}; wait for it, or name another$",
        ):
            claim("output", out).__enter__()
        with claim("output", out.parent / "out2"):  # another output beside is nobody's business
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    staging = out.parent / f".out{STAGING}"
    assert sorted(one.name for one in staging.iterdir()) == (
        [OWNER] if stage == "work" else ["half"]
    )
    other.write_text("not ours")
    with claim("output", out):
        assert [one.name for one in staging.iterdir()] == [OWNER]
        with atomic_folder(out) as folder:
            (folder / "whole").write_text("y")
    assert sorted(one.name for one in out.parent.iterdir()) == [".out.mine.tmp", "out"]
    assert [one.name for one in out.iterdir()] == ["whole"]


def test_claims_nest_in_a_thread_and_exclude_other_threads(tmp_path):
    said = []

    def second():
        try:
            claim("output", tmp_path / "out").__enter__()
        except OSError as error:
            said.append(str(error))

    with claim("output", tmp_path / "out"):
        with claim("output", tmp_path / "out"):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_lost_its_name_removes_nothing_of_the_next(tmp_path):
    with claim("output", tmp_path / "out"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
        folder.mkdir()  # what another run would make now
        (folder / "theirs").write_text("2")
    assert (folder / "theirs").exists()
    assert not outputs._claims


def test_a_sweep_takes_what_is_dead_and_nothing_else(tmp_path):
    staging = tmp_path / f".out{STAGING}"
    staging.mkdir()
    (staging / "half.safetensors").write_text("of a run that was killed")
    outputs.sweep(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with claim("output", tmp_path / "out"):
        outputs.sweep(tmp_path / "out")
        assert (staging / OWNER).is_file()
    outputs.sweep(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["os.mkdir", "os.rmdir"])
def test_a_signal_while_a_claim_is_made_or_given_back_leaves_nothing(tmp_path, monkeypatch, moment):
    """Just after the staging folder was made, or while it is being removed."""
    own, left = getattr(os, moment.removeprefix("os.")), [1]

    def interrupted(path, *args, **kwargs):
        result = own(path, *args, **kwargs) if moment == "os.mkdir" else None
        if str(path).endswith(STAGING) and left.pop() if left else False:
            raise KeyboardInterrupt
        return result if moment == "os.mkdir" else own(path, *args, **kwargs)

    monkeypatch.setattr(moment, interrupted)
    with pytest.raises(KeyboardInterrupt), claim("output", tmp_path / "new" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_folder_within_another_is_that_one(tmp_path):
    def failing():
        with atomic_folder(tmp_path / "out") as folder, atomic_folder(folder) as same:
            assert same == folder
            (same / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as folder:
        with atomic_folder(folder) as same:
            (same / "x").write_text("1")
        (folder / "y").write_text("2")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["x", "y"]
    assert not outputs._filling


def test_a_failed_fill_can_be_repeated_in_the_same_claim(tmp_path):
    with claim("output", tmp_path / "out"):
        with contextlib.suppress(RuntimeError), atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "whole").write_text("x")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["whole"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


WRITE = """
import os, signal, sys
from effattn.reports.files import write_text_atomic
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_text_atomic(sys.argv[1], "half a text that is longer than the whole one")
"""


def test_a_killed_write_of_a_file_leaves_nothing_after_the_next(tmp_path):
    file = tmp_path / "x.json"
    assert subprocess.run([sys.executable, "-c", WRITE, file]).returncode == -9
    assert [one.name for one in tmp_path.iterdir()] == [f".x.json{TEMPORARY}"]
    write_text_atomic(file, "whole")
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]
    assert file.read_text() == "whole"


def test_writers_of_one_file_take_turns(tmp_path):
    texts = [str(number) * 10_000 for number in range(8)]
    threads = [
        threading.Thread(target=write_text_atomic, args=(tmp_path / "x", text)) for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_text() in texts
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_first_what_cannot_be_written(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for output in ("file/out", "dangling", "~/out", "n" * 300, "dangling/out", "a/" + "n" * 260):
        done = CliRunner().invoke(app, [*command.split(), *COMMANDS[command], "--output", output])
        lines = [line for line in done.output.splitlines() if line.strip()]
        assert done.exit_code == 2, done.output
        assert len(lines) == 1, done.output
        assert lines[0].startswith("error: output: ")
        if command != "measure":  # which makes the folder above to find out
            assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_said_first(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 60, 40))
    outputs.check_room("output", tmp_path / "new" / "out", 40)
    with pytest.raises(
        OSError, match=r"^output: .*out needs 1,000 bytes, the disk has 40 free; nothing was done$"
    ):
        outputs.check_room("output", tmp_path / "new" / "out", 1000)
