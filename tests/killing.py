"""Runs flows in processes that are killed, for `test_kills.py`: `python killing.py FOLDER` answers
lines of JSON.

The server imports everything once and forks a child for each run. A child counts what it does to
the disk under FOLDER (audit events: opening to write, renaming, removing, making folders, linking),
and at the n-th such moment sends itself a signal; or the n-th file of tensors that it writes is cut
in half, and then it dies."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
CPU = {"use_cpu": True, "bf16": False}  # the same arithmetic everywhere
TRAINED = dict(length=32, evaluation_tokens=128, overrides=CPU, seed=1)


def convert(model, text, out):
    from effattn.recipes.convert_gqa import Settings, run

    return run(
        Settings(
            2,
            out,
            model,
            text=(text,),
            calibration_tokens=640,
            uptrain_tokens=4 * 64,
            batch=2,
            decode_contexts=(),
            **TRAINED,
        )
    )


def linearize(model, text, out):
    from effattn.recipes.linearize import Settings, run

    return run(
        Settings(
            "performer(features=8)",
            model=model,
            output=out,
            text=(text,),
            transfer_tokens=3 * 32,
            distil_tokens=3 * 32,
            **TRAINED,
        )
    )


def extend(model, text, out):
    from effattn.recipes.extend import Settings, run

    return run(
        Settings(
            256,
            model,
            "yarn(length=256)",
            out,
            tune_tokens=3 * 32,
            window=32,
            sequences=0,
            text=(text,),
            seed=1,
            overrides=CPU,
        )
    )


def shear(model, text, out):
    from effattn.recipes.shear import Settings, run

    return run(
        Settings(
            model,
            out,
            heads=4,
            ffn=48,
            domains=(text,),
            mask_tokens=3 * 64,
            recover_tokens=3 * 64,
            batch=2,
            decode_contexts=(),
            warm_start=None,
            **TRAINED,
        )
    )


def oneshot(model, text, out):
    from effattn.recipes.prune_oneshot import Settings, run

    return run(
        Settings(
            out,
            model,
            methods=("wanda",),
            text=(text,),
            calibration_tokens=256,
            evaluation_tokens=128,
            length=32,
            measure="no",
        )
    )


def structured(model, text, out):
    from effattn.recipes.prune_structured import Settings, run

    return run(
        Settings(
            out,
            model,
            ffn=48,
            criteria=("random",),
            compensate=False,
            text=(text,),
            calibration_tokens=256,
            evaluation_tokens=128,
            length=32,
            decode_contexts=(),
        )
    )


def swap(model, text, out):
    from effattn.recipes.swap_backend import Settings, run

    return run(
        Settings(
            model=model,
            patterns=("linear(feature_map='hedgehog')",),
            output=out,
            text=(text,),
            contexts=(16,),
            evaluation_tokens=16,
            stream_tokens=64,
            dense_stream_tokens=32,
            prompt_tokens=8,
            generate_tokens=0,
        )
    )


def quantize(model, text, out):
    from effattn.recipes.quantize_kv import Settings, run

    return run(
        Settings(
            model=model,
            formats=("int8(group=16, residual=16)",),
            output=out,
            text=(text,),
            evaluation_tokens=400,
            sensitivity_tokens=32,
            length=32,
            retrieval_trials=0,
            decode_contexts=(),
        )
    )


def measure(model, text, out):
    from effattn.recipes.measure import Settings, run

    return run(Settings(model, contexts=(16, 24), steps=1, seconds=0.01, output=out))


FLOWS: dict[str, Callable] = {
    each.__name__: each
    for each in (convert, linearize, extend, shear, oneshot, structured, swap, quantize, measure)
}


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
    sys.addaudithook(Moments(request["root"], request["at"], request.get("signal", 9), counted))
    run = FLOWS[request["flow"]]
    command = one_line_errors(
        lambda: run(request["model"], Path(request["text"]), Path(request["out"]))
    )
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
