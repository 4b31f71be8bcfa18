"""The command behind `make real`.

python -m bench.real                               # all of it, hours; nothing is done twice
python -m bench.real --only caches                 # a subject, or "caches/int4", a step
python -m bench.real --tokens small                # an eighth of the tokens: that all runs
python -m bench.real --model DIR --text FILE       # instead of SmolLM2 and the handbook
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.real import running, text
from bench.real.steps import Step, find, subjects
from effattn.errors import check_choice

SIZES = ("full", "small")
WORK = Path("runs") / "real"


def chosen(only: list[str]) -> list[tuple[str, Step]]:
    """(subject, step): all, or those that `only` names. ValueError for a name that is none."""
    every = [(name, step) for name, one in subjects().items() for step in one.steps]
    found = []
    for part in only:
        subject, _, step = part.partition("/")
        check_choice("only: a subject", subject, [name for name, _ in every])
        wanted = [find(subject, step)] if step else [one for name, one in every if name == subject]
        found += [(subject, one) for one in wanted]
    return found if only else every


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="SUBJECT or SUBJECT/STEP; repeat for more")
    ] = None,
    model: Annotated[str, typer.Option(help="as --model elsewhere")] = "smollm2",
    text_file: Annotated[
        Path | None, typer.Option("--text", help="an English text instead of the handbook")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="full, or small: an eighth, and no results are written")
    ] = "full",
    results: Annotated[
        Path | None, typer.Option(help="folder (default: results/<device>/real)")
    ] = None,
    work: Annotated[Path, typer.Option(help="folder of what is fetched and unfinished")] = WORK,
) -> None:
    """Measures what the documentation claims on a real model, step by step."""
    import torch

    from bench.results import slug

    try:
        check_choice("tokens", tokens, SIZES)
        steps = chosen(only or [])
        files, held_out = text.prepare(work / "text", text_file)
        if results is None:
            place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            results = Path("results") / slug(place) / "real"
        job = running.Job(model, files, held_out, work, tokens == "small")

        def kept(subject: str, step: str, row: dict) -> None:
            if not job.small:
                running.keep(results / f"{subject}.json", subject, step, row)

        failed = running.run(job, steps, kept)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if failed:
        raise SystemExit(f"{len(failed)} of {len(steps)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
