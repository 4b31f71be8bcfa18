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

from effattn.extending.cli import extend
from effattn.linearizing.cli import linearize
from effattn.quant.sensitivity.cli import quantize_kv
from effattn.recipes import convert_gqa, prune_oneshot, prune_structured, shear
from effattn.recipes.console import (
    Show,
    console,
    contexts_of,
    count_tokens,
    one_line_errors,
    quiet_libraries,
    when_stopped,
)

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


@app.command()
@one_line_errors
def swap(
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="a spec (default: sliding(window=256, sinks=4)), or JSON "
            "from layers to specs; repeat to compare, the first one is saved"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    output: Annotated[
        Path | None, typer.Option(help="new folder for the swapped checkpoint and its report")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to measure on; repeat for more files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    contexts: Annotated[
        str, typer.Option(help="contexts to measure perplexity at, or none")
    ] = "128,256,512,1k,2k,4k",
    evaluation_tokens: Annotated[int, count_tokens("to score at every context")] = "4096",
    stream_tokens: Annotated[int, count_tokens("of the long stream")] = "20000",
    dense_stream_tokens: Annotated[
        int, count_tokens("after which the unchanged model's stream stops")
    ] = "4096",
    chunk: Annotated[int, typer.Option(help="tokens of the stream that go in at a time")] = 128,
    prompt_tokens: Annotated[int, count_tokens("of held-out text to generate after")] = "400",
    generate_tokens: Annotated[int, count_tokens("to generate; 0: none")] = "300",
    temperature: Annotated[float, typer.Option(help="of the generated text; 0 is greedy")] = 0.8,
    seed: Annotated[int, typer.Option(help="of the generated text")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Swap the attention pattern: perplexity by context, a long stream, and generated text, before
    and after.
    """
    from effattn.swapping.job import Job, run

    quiet_libraries()
    job = Job(
        model=model,
        output=output,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        contexts=contexts_of(contexts, "contexts"),
        evaluation_tokens=evaluation_tokens,
        stream_tokens=stream_tokens,
        dense_stream_tokens=dense_stream_tokens,
        chunk=chunk,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        **({"patterns": tuple(pattern)} if pattern else {}),
    )
    with when_stopped(lambda: "stopped; nothing was written"):
        report = run(job, Show())
    console.print(report)
    if output is not None:
        console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
        console.print(
            f"report      {(output / 'report.html').absolute()}", soft_wrap=True, highlight=False
        )


@app.command()
@one_line_errors
def measure(
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    pattern: Annotated[
        str | None, typer.Option(help="a spec, or JSON from layers to specs, to compare")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="a cache format; with --pattern, one variant together")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="name=spec, repeated: a backend, plain, or axes such as "
            "'heads=gqa(kv_heads=2); pattern=dense'"
        ),
    ] = None,
    contexts: Annotated[str, typer.Option(help="tokens of the prompt")] = "1k,4k,16k",
    batches: Annotated[str, typer.Option(help="sequences at once")] = "1",
    steps: Annotated[int, typer.Option(help="decode steps to time, at most")] = 32,
    seconds: Annotated[
        float, typer.Option(help="about so long for the prefills, and the steps, of a context")
    ] = 5.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16 or float64")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="of the random tokens")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="folder for report.{html,md,json}; a killed run resumes")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="file for the page")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="file for the results, for `compare`")
    ] = None,
    fresh: Annotated[
        bool, typer.Option(help="forget an unfinished run, replace a finished one")
    ] = False,
) -> None:
    """Measure time to first token, time per token, memory and bandwidth, variants side by side."""
    from effattn.measuring.command import Job, run, what_is_kept

    quiet_libraries()
    job = Job(
        model=model,
        pattern=pattern,
        cache=cache,
        variants=tuple(variant or ()),
        steps=steps,
        seconds=seconds,
        contexts=contexts_of(contexts, "contexts"),
        batches=contexts_of(batches, "batches"),
        seed=seed,
        device=device,
        dtype=dtype,
        output=output,
        html=html,
        markdown=markdown,
        json=json_file,
        fresh=fresh,
    )
    with when_stopped(lambda: what_is_kept(job)):
        report = run(job, Show())
    wide = console if console.is_terminal else Console(width=180)  # a log's lines may be long
    wide.print(report)
    pages = [file.absolute() for file in (output and output / "report.html", html) if file]
    for file in pages:
        console.print(f"\nreport      {file}", soft_wrap=True, highlight=False)
    print(report.summary())


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


app.command()(linearize)
app.command()(extend)
app.command("shear")(shear.command)
app.add_typer(prune, name="prune")
app.command()(quantize_kv)


@app.command()
@one_line_errors
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeat for more")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory,
    matrix units.
    """
    try:
        from effattn.errors import check_choice
        from effattn.kernels import aot
    except ImportError:
        raise ValueError("kernels: triton is not installed (it exists for Linux)") from None

    arches = [check_choice("arch", name, aot.ARCHES) for name in arch or aot.ARCHES]
    if "TRITON_INTERPRET" in os.environ:  # triton read it on import: only a new process can compile
        again = [
            sys.executable,
            "-m",
            "effattn.recipes.cli",
            "kernels",
            *(f"--arch={name}" for name in arches),
        ]
        rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        sys.exit(subprocess.run(again + ["--json"] * as_json, env=rest).returncode)
    with Show().stage("compiling") as progress:
        results = aot.check_all(arches, progress)
    failed = [result for result in results if result.problem]
    if as_json:
        print(json.dumps([vars(result) for result in results]))
    else:
        wide = console if console.is_terminal else Console(width=160)  # a log's lines may be long
        for name in arches:
            wide.print(_kernel_table(name, [result for result in results if result.arch == name]))
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


if __name__ == "__main__":
    app()
