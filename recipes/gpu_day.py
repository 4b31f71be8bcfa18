"""What is worth knowing of a GPU that one has for minutes, in nine of them: versions, ceilings,
every kernel against fp64, the headline ratios, other warps and stages, the profiler's word on the
worst, the kernels' tests. From a checkout, without an install.

    python recipes/gpu_day.py                                # to results/<device>/gpu_day/
    python recipes/gpu_day.py --seconds 300 --output day     # less time, another folder
    python recipes/gpu_day.py --cache runs/gpu-cache.zip     # kernels that were compiled elsewhere
    python recipes/gpu_day.py --steps headlines,tuning       # some of it
    python recipes/gpu_day.py --device cpu --tiny            # to see that everything runs

    # before that, where there is no GPU, with the Python and Triton of where there is one
    python recipes/gpu_day.py --build-cache runs/gpu-cache.zip

Each step is a JSON file, written anew after every result; the same command goes on where it was
ended. The exit code is 0 whatever was found: the tables say it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "day" / "site")]

import sitecustomize  # noqa: E402  finds effattn.kernels and the others in the checkout

from bench.day import steps  # noqa: E402
from bench.day.settings import Day  # noqa: E402


def options() -> argparse.ArgumentParser:
    """The command's options. argparse: what the others use may be missing on such a machine."""
    names = [step.name for step in steps.STEPS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--output", type=Path, help="folder; default: results/<device>/gpu_day")
    add("--seconds", type=float, default=steps.TOTAL, help="for all of it (%(default)g)")
    add("--steps", default="", help=f"by comma, of {', '.join(names)}; default: all")
    add("--cache", type=Path, help="kernels compiled ahead of time, from --build-cache")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="sizes that say nothing, to see that it runs")
    add("--build-cache", type=Path, metavar="FILE", help="compile the kernels to FILE, and stop")
    add("--arch", default="sm_90", help="of --build-cache (%(default)s)")
    add("--job", nargs=2, metavar=("STEP", "NAME"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given = options().parse_args()
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    day = Day(given.device, given.tiny, given.output or ROOT / "results")
    if given.job:
        steps.do(*given.job, day)
        return
    only = tuple(filter(None, given.steps.split(",")))
    known = [step.name for step in steps.STEPS]
    if unknown := [name for name in only if name not in known]:
        options().error(f"--steps: got {unknown[0]!r}, valid are {', '.join(known)}")
    if given.build_cache:
        from bench.day import carried

        print(carried.build(given.build_cache, given.arch, only, given.tiny))
        return
    run(given, day, only)


def run(given: argparse.Namespace, day: Day, only: tuple[str, ...]) -> None:
    """The day, and its tables."""
    from bench.day import carried, summary

    with tempfile.TemporaryDirectory(prefix="effattn-day-cache-") as folder:
        cache = Path(folder)
        if given.cache:
            print(carried.unpack(given.cache, cache / "triton"), flush=True)
        if given.output is None:
            day = Day(day.device, day.tiny, ROOT / "results" / _slug(day) / "gpu_day")
        found = steps.go(day, given.seconds, cache, only, lambda line: print(line, flush=True))
    print(summary.text(found))
    print(f"results  {day.output}")


def _slug(day: Day) -> str:
    """The folder of this device's results."""
    try:
        from bench.results import slug
        from effattn.profiling.device import check_device

        return slug(check_device(day.device))
    except Exception as error:  # of any kind: a day is not lost for a name
        print(f"the device has no name: {type(error).__name__}: {error}")
        return "unknown"


if __name__ == "__main__":
    assert sitecustomize
    main()
