"""Makes the README's benchmark tables and figures again from the files in `results/`.

python recipes/readme_figures.py   # --check: changes nothing, and fails if something is out of date
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effattn.recipes.console import console, one_line_errors

ROOT = Path(__file__).parents[1]


@one_line_errors
def main(
    check: Annotated[
        bool, typer.Option(help="change nothing; exit code 1 if something is out of date")
    ] = False,
    root: Annotated[Path, typer.Option(help="the checkout")] = ROOT,
) -> None:
    from bench.readme import update
    from effattn.reports.files import write_text_atomic

    readme = root / "README.md"
    text, figures = update(readme.read_text(encoding="utf-8"), root)
    wanted = {root / path: svg for path, svg in figures.items()} | {readme: text}
    stale = [
        path
        for path, new in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != new
    ]
    for path in stale:
        if not check:
            write_text_atomic(path, wanted[path])
        console.print(
            f"{'out of date' if check else 'written'}  {path.relative_to(root)}", highlight=False
        )
    if not stale:
        console.print("README and figures are up to date", highlight=False)
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
