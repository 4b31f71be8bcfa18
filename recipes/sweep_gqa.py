"""Every conversion method at several numbers of KV heads, side by side, and the uptraining curves.

    python recipes/sweep_gqa.py --output runs/sweep --uptrain-tokens 600k

Writes sweep.json, sweep.html and one checkpoint for each number of heads. Run again to go on after
a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from effattn.recipes.console import (
    Show,
    console,
    contexts_of,
    count_tokens,
    one_line_errors,
    quiet_libraries,
)


@one_line_errors
def main(
    output: Annotated[Path, typer.Option(help="folder for the results")],
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    kv_heads: Annotated[str, typer.Option(help="numbers of KV heads")] = "4,2,1",
    methods: Annotated[
        str, typer.Option(help="conversion methods")
    ] = "optimal,aligned,mean,first,random",
    uptrain_tokens: Annotated[int, count_tokens("to distil `optimal` on; 0: none")] = "0",
    evaluation_tokens: Annotated[int, count_tokens("held out, to measure on")] = "65536",
) -> None:
    from effattn.heads.sweep import sweep

    quiet_libraries()
    reports = sweep(
        model,
        output,
        kv_heads=contexts_of(kv_heads, "kv_heads"),
        methods=list(map(str.strip, methods.split(","))),
        uptrain_tokens=uptrain_tokens,
        evaluation_tokens=evaluation_tokens,
        show=Show(),
    )
    table = Table("KV heads", "method", "re-fit", "excess CE converted", "uptrained", "perplexity")
    for report in reports:
        stage = "uptrained" if report.quality.get("uptrained") else "converted"
        uptrained = f"{report.excess('uptrained'):+.4f}" if stage == "uptrained" else ""
        settings = report.settings
        table.add_row(
            str(settings["kv_heads"]),
            settings["method"],
            "yes" if settings["refit"] else "no",
            f"{report.excess('converted'):+.4f}",
            uptrained,
            f"{report.measured(stage):.3f}",
        )
    console.print(table)
    console.print(f"{(output / 'sweep.html').absolute()}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
