"""How fast attention is here, against what you would use instead: SDPA, flex_attention and the
known packages.

    # this CPU, to results/<device>/bench.json
    python recipes/bench.py
    # a GPU: the kernels' tests first, then a third
    python recipes/bench.py --device cuda --part 2/3
    # some rows, short, to see that they run
    python recipes/bench.py --only decode --quick --output x.json

Answers are checked before anything is timed. After a kill, the same command goes on. Ends with one
line of JSON; exit code 1 when an answer of ours is wrong or something grows faster than declared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from effattn.recipes.console import console, errors, one_line_errors

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "kernels"


@one_line_errors
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: results/<device>/bench.json")
    ] = None,
    only: Annotated[str | None, typer.Option(help="cases whose name contains this")] = None,
    part: Annotated[str, typer.Option(help="i/n: every n-th case, from the i-th")] = "1/1",
    seconds: Annotated[
        float | None, typer.Option(help="of timing a case; default: 2.5, quick 0.3")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="the shortest lengths only, to see that it runs")
    ] = False,
    fresh: Annotated[bool, typer.Option(help="forget what the output file holds")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's")] = None,
    plan: Annotated[
        bool, typer.Option(help="say what would run and how long it takes, and stop")
    ] = False,
) -> None:
    import torch
    from rich.console import Console

    from bench import report, results, run
    from bench.page import html
    from effattn.bounds import Bounds
    from effattn.outputs import check_file, check_writable, claim
    from effattn.profiling.device import Peaks, check_device, peaks

    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, valid is 1 or more")
    if seconds is not None:
        Bounds(whole=False, least=0).check("seconds", seconds)
    torch.set_num_threads(threads or torch.get_num_threads())
    where = check_device(device)
    wide = console if console.is_terminal else Console(width=160)  # a log's lines may be long
    seconds = seconds if seconds is not None else 0.3 if quick else 2.5
    cases = run.choose(run.all_cases(where.type, quick), only, run.parse_part(part))
    output = output or results.default_path(where)
    check_file("output", output)
    wanted = results.settings(where, quick, seconds)
    found = results.new(wanted) if fresh else results.resume(output, wanted)
    check_writable("output", output.parent)

    if found.get("peaks"):
        limits = Peaks.from_dict(found["peaks"])
    else:  # a plan may use older ones
        limits = peaks(where, not plan, lambda name: errors.print(f"measuring the device: {name}"))
    planned = run.plan(cases, found, limits, seconds)
    errors.print(run.say(planned, len(cases) - len(planned)), highlight=False)
    if plan:
        for name, expected in planned.items():
            console.print(f"{expected:6.1f} s  {name}", highlight=False)
        return
    if where.type == "cuda" and not found.get("tests_passed"):
        errors.print("the kernels' tests on this device ...")
        run.run_tests(sorted(TESTS.glob("test_*.py")))
        found["tests_passed"] = True

    def done(name: str, found: dict) -> None:
        results.save(output, run.judge(found))
        wide.print(report.case_table(name, found).rich())

    with claim("output", output):
        run.run(cases, where, found, seconds, limits, done)
        results.save(output, run.judge(found), html(found))
    tables = (report.growth_table, report.targets_table, report.peers_table)
    wide.print(*(table(found).rich() for table in tables), sep="\n")
    console.print(report.finding(found), soft_wrap=True, highlight=False)
    console.print(
        f"results  {output}\npage     {output.with_suffix('.html')}",
        soft_wrap=True,
        highlight=False,
    )
    print(report.summary(found))
    for fault in (faults := run.faults(found)):
        errors.print(f"fails: {fault}", soft_wrap=True, highlight=False)
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    # the benchmark lies beside this folder, in which `bench` is this file
    sys.path.insert(0, str(ROOT))
    typer.run(main)
