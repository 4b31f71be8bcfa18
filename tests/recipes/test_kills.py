"""Every flow, killed or stopped at any moment: the same command finishes with the same bytes, and
nothing is left.

Timings differ between any two runs and are left out of what is compared, by name: `TIMES`, and the
pages of a report."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flows import FLOWS, KILLED, save_small

ROOT = Path(__file__).parents[2]
TIMES = {"seconds", "environment", "decode", "speed", "ms", "rows", "output", "peaks"}
TRAINING = [name for name in KILLED if "overrides" in FLOWS[name].small]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Server:
    """Runs flows in children of one process that has imported everything."""

    def __init__(self, root: Path):
        self.root, self.wholes = root, {}
        save_small(root)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "EFFATTN_DEBUG": ""}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "killing.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )

    def run(self, flow: str, out: Path, at: int = 0, **more) -> tuple[int, int, str]:
        """(exit code, or minus the signal; how often it changed the disk below out's folder; what
        it printed).
        """
        log = self.root / "log"
        request = {
            "flow": flow,
            "model": str(self.root / "model"),
            "text": str(self.root / "text.txt"),
            "out": str(out),
            "root": str(out.parent),
            "log": str(log),
            "at": at,
            **more,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["moments"], log.read_text()

    def whole(self, flow: str) -> tuple[dict, int]:
        """What an undisturbed run writes, and at how many moments it changes the disk."""
        if flow not in self.wholes:
            folder = self.root / f"whole-{flow}"
            folder.mkdir()
            code, moments, said = self.run(flow, folder / "out")
            assert code == 0, said
            assert [one.name for one in folder.iterdir()] == ["out"]
            self.wholes[flow] = snapshot(folder / "out"), moments
        return self.wholes[flow]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("kills"))
    yield made
    made.process.stdin.close()
    made.process.wait(30)
    made.process.stdout.close()


def snapshot(folder: Path) -> dict[str, object]:
    """Every file's bytes by name; of a report its numbers, without `TIMES`."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.name == "report.json":
            found[file.name] = timeless(json.loads(file.read_text()))
        elif file.name == "README.md":
            found[file.name] = True  # it shows the report's numbers
        elif file.is_file() and not file.name.startswith("report."):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def timeless(data: object) -> object:
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if key not in TIMES}
    return [timeless(one) for one in data] if isinstance(data, list) else data


def finish(server: Server, flow: str, out: Path) -> None:
    """The same command again: it ends as an undisturbed run does."""
    expected, _ = server.whole(flow)
    complete = (out / "report.json").exists()
    code, _, said = server.run(flow, out)
    refused = "exists and is not an empty folder" in said or "holds a finished report" in said
    assert code == 0 or (complete and code == 2 and refused), said
    assert [one.name for one in out.parent.iterdir()] == ["out"]
    assert snapshot(out) == expected


def killed(server: Server, flow: str, out: Path, at: int, **how) -> None:
    code, _, said = server.run(flow, out, at, **how)
    assert code < 0, f"moment {at}: exit code {code}: {said}"
    finish(server, flow, out)


def moments_of(server: Server, flow: str, count: int, seed: int = 0) -> list[int]:
    """Moments to die at: spread over the run at random, the last four of them, in which it ends,
    among them.
    """
    total = server.whole(flow)[1]
    print(f"{flow}: {total} moments, seed {seed}")
    chosen = random.Random(f"{flow} {seed}").sample(range(1, total + 1), min(count, total))
    return sorted({*chosen, *range(max(1, total - 3), total + 1)})


def test_a_oneshot_job_is_killed_at_its_end(server, tmp_path):
    """The stage that puts what was pruned in its place: killed at three moments of it."""
    total = server.whole("prune_oneshot")[1]
    for at in range(total - 13, total + 1, 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        killed(server, "prune_oneshot", folder / "out", at)


@pytest.mark.parametrize(("cut", "at"), [("torch", 1), ("torch", 5), ("safetensors", 2)])
def test_half_a_trainer_checkpoint_is_not_gone_on_from(server, tmp_path, cut, at):
    """Optimizer of the first checkpoint, scheduler of the second, weights of the second."""
    killed(server, "convert_gqa", tmp_path / "out", at, cut=cut)


def test_a_kill_in_one_go(server, tmp_path):
    total = server.whole("swap_backend")[1]
    for at in (total // 3, total - 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        killed(server, "swap_backend", tmp_path / "out", at)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_cleans_up(server, tmp_path, number, code):
    flow = "prune_oneshot" if number == signal.SIGTERM else "swap_backend"
    total = server.whole(flow)[1]
    got, _, said = server.run(flow, tmp_path / "out", total - 7, signal=int(number))
    assert got == code, said
    assert "stopped; run the same command again" in said
    assert "Traceback" not in said
    assert {one.name for one in tmp_path.iterdir()} <= {".out.partial", ".out.partial.json"}
    finish(server, flow, tmp_path / "out")


def refused(flow: str, code: int, said: str, folder: Path) -> None:
    """Nothing was delivered, and one line says why; what a run goes on from may stay."""
    assert not (folder / "out" / "report.json").exists()
    assert code == 2, said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    assert "Traceback" not in said
    left = {one.name for one in folder.iterdir()} - ({"out"} if not FLOWS[flow].saves else set())
    assert left <= {".out.partial", ".out.partial.json"}


@pytest.mark.parametrize("flow", KILLED)
def test_a_disk_without_room_for_the_report(server, tmp_path, flow):
    """It is written last: then there is no output, and what was said is one line."""
    code, _, said = server.run(flow, tmp_path / "out", full=True)
    refused(flow, code, said, tmp_path)
    assert "No space left on device" in said


@pytest.mark.parametrize("flow", [name for name in KILLED if FLOWS[name].saves])
def test_what_is_tampered_with_is_not_delivered(server, tmp_path, flow):
    """Each flow's own proof finds weights that are not the model's any more."""
    code, _, said = server.run(flow, tmp_path / "out", tampered=True)
    refused(flow, code, said, tmp_path)
    assert "the saved checkpoint gives other" in said


@pytest.mark.slow
@pytest.mark.parametrize("flow", KILLED)
def test_any_moment(server, tmp_path, flow):
    for at in moments_of(server, flow, 12):
        folder = tmp_path / str(at)
        folder.mkdir()
        killed(server, flow, folder / "out", at)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("flow", TRAINING)
@pytest.mark.parametrize("cut", ["torch", "safetensors"])
def test_any_half_file(server, tmp_path, flow, cut):
    for at in range(1, 6):
        folder = tmp_path / str(at)
        folder.mkdir()
        code, _, _ = server.run(flow, folder / "out", at, cut=cut)
        assert code in (0, -9)  # 0: it writes fewer
        if code:
            finish(server, flow, folder / "out")
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("flow", KILLED)
def test_stopped_at_any_moment(server, tmp_path, flow, number):
    for at in moments_of(server, flow, 4, seed=int(number)):
        folder = tmp_path / str(at)
        folder.mkdir()
        code, _, said = server.run(flow, folder / "out", at, signal=int(number))
        assert code in (0, 128 + number), said  # 0: the run had ended
        left = {one.name for one in folder.iterdir()} - {"out"}
        assert left <= {".out.partial", ".out.partial.json"}
        finish(server, flow, folder / "out")
        shutil.rmtree(folder)
