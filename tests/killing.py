"""Runs flows in processes that are killed, for `test_kills.py`: `python killing.py FOLDER` answers
lines of JSON.

The server imports everything once and forks a child for each run. A child counts what it does to
the disk under FOLDER (audit events: opening to write, renaming, removing, making folders, linking),
and at the n-th such moment sends itself a signal; or the n-th file of tensors that it writes is cut
in half, and then it dies; or the disk has no room for a report; or what was saved is tampered with
before its proof."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from flows import run_small

import effattn.hf.verify

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


VERIFY_PLAIN = effattn.hf.verify.verify_plain  # which `quick_parts` takes away


def quick_parts() -> None:
    """Without what has nothing to do with files and takes long: the proof in a fresh process, and
    timing.
    """
    import effattn.hf.verify
    import effattn.linearizing.approximation
    import effattn.measuring.measurement
    import effattn.prune.shearing.measures
    from effattn.profiling.device import Peaks

    effattn.hf.verify.verify_plain = lambda *args: {"fresh_process": True}
    effattn.prune.shearing.measures.speeds = lambda *args: []
    effattn.measuring.measurement.peaks = lambda *args: Peaks(
        "none", "cpu", 1, "", {}, None, None, None, {}, None
    )
    effattn.linearizing.approximation.measure_approximation = lambda *args, **kwargs: type(
        "None", (), {"data": None}
    )


class Moments:
    """Counts what is done to the disk below `root`, and at the moment `at` sends the signal
    `number`.
    """

    def __init__(self, root: str, at: int, number: int, counted: mmap.mmap):
        self.root, self.at, self.number, self.counted, self.done = root, at, number, counted, 0

    def __call__(self, event: str, args: tuple) -> None:
        if event not in EVENTS or not str(args[0]).startswith(self.root):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.done += 1
        self.counted[:8] = struct.pack("q", self.done)
        if self.done == self.at:
            os.kill(os.getpid(), self.number)


def cut_in_half(kind: str, at: int) -> None:
    """The `at`-th file that torch ("torch"), or safetensors ("safetensors"), writes is half a file,
    and the last.
    """
    import safetensors.torch
    import torch

    seen = 0

    def cut(write: Callable, where: Callable) -> Callable:
        def written(*args, **kwargs):
            nonlocal seen
            seen += 1
            found = write(*args, **kwargs)
            if seen == at:
                file = where(args, kwargs)
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), 9)
            return found

        return written

    if kind == "torch":
        torch.save = cut(torch.save, lambda args, kwargs: args[1])
    else:
        safetensors.torch.serialize_file = cut(
            safetensors.torch.serialize_file, lambda args, kwargs: args[1]
        )


def full_disk(root: str) -> None:
    """The disk has no room for the files of a report below `root`, which are written last."""

    def refuse(event: str, args: tuple) -> None:
        if event == "open" and str(args[0]).startswith(root) and "report." in str(args[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(refuse)


def tampered() -> None:
    """What was saved is another model's by the time that its proof reads it."""
    import effattn.hf.verify
    import effattn.prune.unstructured.from_files
    import effattn.quant.sensitivity.verify
    import effattn.surgery.checkpoint

    def first(prove: Callable, folder_of: Callable) -> Callable:
        def proven(one, *rest):
            damage(folder_of(one))
            return prove(one, *rest)

        return proven

    verify, checkpoint = effattn.hf.verify, effattn.surgery.checkpoint
    cache, files = effattn.quant.sensitivity.verify, effattn.prune.unstructured.from_files
    verify.verify_plain = first(VERIFY_PLAIN, Path)
    checkpoint.load_again = first(checkpoint.load_again, Path)
    cache.verify = first(cache.verify, Path)
    files._Run.verify = first(files._Run.verify, lambda run: run.out)


def damage(folder: Path) -> None:
    """The largest weight of the checkpoint in `folder`, 5 % larger."""
    from safetensors.torch import load_file, save_file

    found = {file: load_file(file) for file in folder.glob("*.safetensors")}
    assert found, folder
    sizes = {file: max(x.numel() for x in tensors.values()) for file, tensors in found.items()}
    file = max(sizes, key=lambda one: sizes[one])
    name = max(found[file], key=lambda one: found[file][one].numel())
    found[file][name] = found[file][name] * 1.05
    save_file(found[file], file, {"format": "pt"})


def child(request: dict, counted: mmap.mmap) -> int:
    """One run; its exit code."""
    import typer

    from effattn.recipes.console import one_line_errors

    where = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(where, 1)
    os.dup2(where, 2)
    if request.get("cut"):
        cut_in_half(request["cut"], request["at"])
        request["at"] = 0
    if request.get("full"):
        full_disk(request["root"])
    if request.get("tampered"):
        tampered()
    sys.addaudithook(Moments(request["root"], request["at"], request.get("signal", 9), counted))
    flow, files = request["flow"], [Path(request[name]) for name in ("text", "out")]
    command = one_line_errors(lambda: run_small(flow, request["model"], *files))
    try:
        command()
    except typer.Exit as end:
        return end.exit_code
    return 0


def serve() -> None:
    import effattn.quant.sensitivity.rows
    import effattn.swapping.measure  # noqa: F401  before the first fork
    from effattn.recipes.console import quiet_libraries

    quiet_libraries()
    quick_parts()
    for line in sys.stdin:
        request, counted = json.loads(line), mmap.mmap(-1, 8)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request, counted)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(pid, 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps({"code": code, "moments": struct.unpack("q", counted[:8])[0]}), flush=True)


if __name__ == "__main__":
    serve()
