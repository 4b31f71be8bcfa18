"""How fast exact attention is here, against SDPA, compiled flex_attention and local-attention (where installed).

    python recipes/bench_attention.py --output results/cpu/attention.json                       # about 6 minutes
    python recipes/bench_attention.py --device cuda --output results/gpu/attention.json         # tests first

Answers are checked before anything is timed. Run again to go on after a kill; `--part 2/3` does a third of the cases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effattn.cli import console, one_line_errors

TESTS = [Path(__file__).parents[1] / "tests" / name for name in ("test_flash_triton.py", "test_decode_triton.py")]


@one_line_errors
def main(
    output: Annotated[Path | None, typer.Option(help="JSON file, written after every case")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option(help="the shortest lengths only")] = False,
    seconds: Annotated[float, typer.Option(help="about so long a case, once warm")] = 8.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    part: Annotated[str, typer.Option(help="i/n: every n-th case, from the i-th")] = "1/1",
    fresh: Annotated[bool, typer.Option(help="forget what the output file holds")] = False,
) -> None:
    import torch

    from effattn.profiling import bench_attention as bench
    from effattn.profiling import bench_report as report
    from effattn.profiling.html import write_text_atomic

    torch.set_num_threads(threads or torch.get_num_threads())
    where = torch.device(device)
    index, count = bench.parse_part(part)
    stored = json.loads(output.read_text()) if output and output.is_file() and not fresh else None
    results = bench.resume(stored, bench.settings(where, quick))

    def save() -> None:
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(output, json.dumps(results, indent=1) + "\n")

    def done(name: str, _: dict) -> None:
        save()
        console.print(report.case_table(name, results).rich())

    if where.type == "cuda" and not results.get("tests_passed"):
        bench.run_tests(TESTS)
        results["tests_passed"] = True
    cases = bench.gpu_cases(quick) if where.type == "cuda" else bench.cpu_cases(quick)
    bench.run(cases[index - 1 :: count], where, results, seconds, done)
    if where.type == "cpu":
        if "memory" not in results and not quick:
            results["memory"] = bench.memory_growth()
        results["checks"] = report.checks(results)
        console.print(report.checks_table(results["checks"]).rich())
    save()
    print(report.summary(results))


if __name__ == "__main__":
    typer.run(main)
