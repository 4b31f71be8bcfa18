"""The `effattn` command line. Each command parses, calls the Python API and shows the result.

Errors of the user's making end in one line on stderr and exit code 2; nothing is half-written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from effattn.recipes import (
    convert_gqa,
    convert_latent,
    convert_mla,
    export,
    extend,
    fit,
    linearize,
    measure,
    prune_oneshot,
    prune_structured,
    quantize_kv,
    rehost,
    shear,
    swap_backend,
)
from effattn.recipes.console import Show, console, one_line_errors
from effattn.reports.files import write_text_atomic

app = typer.Typer(
    help="Swap, shrink and measure attention in Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

prune = typer.Typer(
    help="Prune a checkpoint: single weights, or whole heads, FFN dimensions and layers.",
    no_args_is_help=True,
)
prune.command("oneshot")(prune_oneshot.command)
prune.command("structured")(prune_structured.command)


@app.callback()
def _root() -> None:
    """Keeps the sub-commands' names, however many there are."""


@app.command()
@one_line_errors
def backends(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """List the attention backends and what each can do."""
    from effattn import registry

    found = registry.backends()
    if as_json:
        print(json.dumps({name: vars(cls.traits) for name, cls in found.items()}))
        return
    table = Table("backend", "exact", "causal", "bidirectional", "learned", "state", "what it is")
    for name, cls in found.items():
        traits = cls.traits
        flags = [
            "yes" if getattr(traits, flag) else "no"
            for flag in ("exact", "causal", "bidirectional", "learned")
        ]
        table.add_row(name, *flags, traits.state, (cls.__doc__ or "").strip().splitlines()[0])
    console.print(table)


app.command("convert-gqa")(convert_gqa.command)
app.command("convert-latent")(convert_latent.command)
app.command("convert-mla")(convert_mla.command)
app.command("rehost")(rehost.command)
app.command("swap")(swap_backend.command)
app.command("measure")(measure.command)


@app.command()
@one_line_errors
def compare(
    before: Annotated[
        Path, typer.Argument(help="a result of `effattn measure` or of a benchmark (JSON)")
    ],
    after: Annotated[Path, typer.Argument(help="another one")],
    tolerance: Annotated[float, typer.Option(help="share by which a median may grow")] = 0.05,
) -> None:
    """Say what got slower or bigger beyond the noise; exit code 1 if anything did."""
    from effattn.measuring import compare as comparing

    found = comparing.compare(comparing.load(before), comparing.load(after), tolerance)
    console.print(found)
    print(found.summary())
    if found.worse:
        raise SystemExit(1)


app.command("fit")(fit.command)
app.command("linearize")(linearize.command)
app.command("extend")(extend.command)
app.command("shear")(shear.command)
app.add_typer(prune, name="prune")
app.command("quantize-kv")(quantize_kv.command)
app.command("export")(export.command)


@app.command()
@one_line_errors
def kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", "--target", help="sm_80, sm_90, sm_100 or gfx942; repeat for more"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    only: Annotated[
        str | None, typer.Option(help="only kernels with this in their folder and name")
    ] = None,
    report: Annotated[
        bool, typer.Option(help="read the inner loops too, and predict an H200 (sm_90 by default)")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="a file for the JSON")] = None,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory,
    matrix units; with --report what their inner loops cost.
    """
    try:
        from effattn.errors import check_choice
        from effattn.kernels import aot, marks
        from effattn.kernels import report as reporting
    except ImportError:
        raise ValueError("kernels: triton is not installed (it exists for Linux)") from None

    default = [reporting.PREDICTED] if report else aot.ARCHES
    arches = [check_choice("arch", name, aot.ARCHES) for name in arch or default]
    for name in arches:
        aot.chosen(name, only)  # an unknown one is said before anything is compiled
    if "TRITON_INTERPRET" in os.environ:  # triton read it on import: only a new process can compile
        again = [sys.executable, "-m", "effattn.recipes.cli", "kernels"]
        again += [f"--arch={name}" for name in arches] + ["--json"] * as_json
        again += [f"--only={only}"] * bool(only) + ["--report"] * report
        again += [f"--output={output}"] * (output is not None)
        rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        sys.exit(subprocess.run(again, env=rest).returncode)
    with Show().stage("compiling") as progress:
        if report:
            reports = reporting.report_all(arches, progress, only)
            results, plain = [each.result for each in reports], [each.to_dict() for each in reports]
        else:
            results = aot.check_all(arches, progress, only)
            plain = [vars(result) for result in results]
    if output is not None:
        write_text_atomic(output, json.dumps(plain, indent=1) + "\n")
    failed = [result for result in results if result.problem]
    if as_json:
        print(json.dumps(plain))
    else:
        wide = console if console.is_terminal else Console(width=160)  # a log's lines may be long
        for name in arches:
            if report:
                wide.print(
                    _loop_table(name, [each for each in reports if each.result.arch == name])
                )
            else:
                wide.print(_kernel_table(name, [each for each in results if each.arch == name]))
        if report and (found := marks.marks(reports)):
            wide.print(_mark_table(found))
        console.print(f"{len(results)} variants, {len(failed)} failed", highlight=False)
    if failed:
        sys.exit(1)


def _kernel_table(arch: str, results: list) -> Table:
    table = Table("kernel", "variant", title=arch, title_justify="left")
    for heading in ("registers", "spills B", "shared B", "blocks", "occupancy"):
        table.add_column(heading, justify="right")
    table.add_column("matrix unit")
    table.add_column("check", overflow="fold")
    for result in results:
        numbers = (result.registers, result.spills, result.shared, result.blocks)
        occupancy = "?" if result.occupancy is None else f"{result.occupancy:.0%}"
        used = (
            "?"
            if result.instructions is None
            else ", ".join(f"{n} {k}" for k, n in result.instructions.items())
        )
        table.add_row(
            result.folder,
            result.name,
            *("?" if n is None else str(n) for n in numbers),
            occupancy,
            used or "-",
            result.problem or "ok",
            style="bold red" if result.problem else None,
        )
    return table


def _loop_table(arch: str, reports: list) -> Table:
    table = Table("kernel", "variant", title=arch, title_justify="left")
    headings = "registers", "spills B", "shared B", "blocks", "instructions", "a byte", "a kFLOP"
    for heading in headings:
        table.add_column(heading, justify="right")
    for heading in ("global bits", "shared bits", "matrix unit", "of the limit"):
        table.add_column(heading, overflow="fold")
    for each in reports:
        result, loop = each.result, each.main
        cells = [result.registers, result.spills, result.shared, result.blocks]
        if loop is not None:
            issued = loop.instructions * each.warps
            cells += [
                loop.instructions,
                f"{issued / loop.bytes:.2f}" if loop.bytes else None,
                f"{issued * 1000 / loop.flops:.2f}" if loop.flops else None,
                _widths(loop.global_widths),
                _widths(loop.shared_widths),
                loop.matrix,
                each.unknown
                if loop.fraction is None
                else f"{loop.fraction:.0%} of {loop.limit}, by {loop.bound_by}",
            ]
        else:
            cells += [None] * 6 + [each.unknown]
        shown = ("?" if cell is None else str(cell) for cell in cells)
        table.add_row(result.folder, result.name, *shown)
    return table


def _mark_table(found: list) -> Table:
    title = "marks in the model of an H200"
    table = Table("mark", title=title, title_justify="left")
    for heading in ("at least", "predicted", "holds"):
        table.add_column(heading, justify="right")
    for each in found:
        least = f"{each.least:.2f}" if each.least else "0"
        holds = "yes" if each.holds else "no"
        table.add_row(
            each.what, least, f"{each.got:.2f}", holds, style=None if each.holds else "bold red"
        )
    return table


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{n} x {bits}" for bits, n in sorted(counts.items(), reverse=True)) or "-"


if __name__ == "__main__":
    app()
