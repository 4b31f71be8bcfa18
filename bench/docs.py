"""Everything in the documentation that is made by code: the benchmark's tables and figures, those
of a real model, what goes with what, and the index of each folder of results.

python -m bench.docs             # `make pages`
python -m bench.docs --check     # changes nothing, and fails if something is out of date
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bench import compatibility, extending, kernels, pages, plots
from bench.day import page as day
from bench.real import page as real
from bench.real.steps import subjects
from effattn.reports.files import write_text_atomic
from effattn.reports.tables import Table

ROOT = Path(__file__).parents[1]
REAL = "real"  # the folder of what `make real` found, in that of a device
# What each file of a folder of results is about, and what makes it again.
SUBJECTS = {
    "approximation": ("Error of the approximate patterns", "effattn.measure_approximation"),
    "bench": ("Attention against its peers, growth, targets", "make bench"),
    "bench_approximate": ("Linear and Performer, today's block sizes", "recipes/bench.py --only"),
    "bench_bidirectional": ("Bidirectional linear in its own process", "recipes/bench.py --only"),
    "bench_sparsegpt": ("SparseGPT against llmcompressor", "recipes/bench.py --only SparseGPT"),
    "convert_gqa": ("Fewer KV heads: methods, uptraining curves", "recipes/sweep_gqa.py"),
    "extend_context": ("Position rules past the trained length", "recipes/extend_context.py"),
    "extend_context_hwfa": ("Windows, and a last layer without positions", "extend_context.py"),
    "extend_context_logn": ("Position rules in a model trained with log-n", "extend_context.py"),
    "extend_context_tuned": ("Rules tuned to longer contexts", "extend_context.py --tune-tokens"),
    "extend_longlora": ("LongLoRA beside whole attention", "effattn extend --train-pattern"),
    "extend_longrope": ("Factors of longrope, searched for", "effattn extend --rule longrope(...)"),
    "kernels": ("Kernels' predicted share of an H200's limits", "python -m bench.kernels"),
    "loading": ("from_pretrained after import effattn", "python -m bench.loading"),
    "linearize_all": ("Every layer linear", "effattn linearize"),
    "linearize_hybrid": ("Linear, every fourth a window", "effattn linearize --keep-every 4"),
    "linearize_monarch": ("Monarch projections", "effattn linearize --projections"),
    "lra": ("A small encoder with every pattern on ListOps", "recipes/lra.py --tasks listops"),
    "prune_oneshot": ("SparseGPT, Wanda, magnitude", "effattn prune oneshot"),
    "prune_structured": ("A quarter of the FFN away", "effattn prune structured"),
    "shear": ("Sheared, gates by Taylor, all baselines", "effattn shear --compare"),
    "shear_obs": ("Sheared, gates by obs, and one-shot taught", "effattn shear --baseline taught"),
    "shear_then_text": ("Sheared, then mostly text", "effattn shear --continue-tokens"),
}


def of_a_real_model() -> dict[str, tuple[str, str]]:
    """`SUBJECTS` of results/<device>/real."""
    return {
        name: (one.title, f"python -m bench.real --only {name}") for name, one in subjects().items()
    }


def index(folder: Path) -> str:
    """The README.md of a folder of results: a line a file. ValueError for a file without a
    subject.
    """
    name, known, lines = folder.name, SUBJECTS, []
    if folder.name == REAL:
        name, known = f"{folder.parent.name}: a real model", of_a_real_model()
    for file in sorted(folder.glob("*.json")):
        if file.stem not in known:
            raise ValueError(f"{file}: not in SUBJECTS of bench/docs.py; add what it is about")
        subject, command = known[file.stem]
        found = json.loads(file.read_text(encoding="utf-8"))
        where = found.get("environment", {}) if isinstance(found, dict) else found[0]["environment"]
        on = "{device}, threads: {threads}, torch {torch}".format(**where)
        lines.append(
            [f"[{file.name}]({file.name})", subject, f"`{command}`", on, where["date"][:10]]
        )
    table = Table("", ["file", "subject", "made by", "on", "date"], lines)
    text = table.markdown().partition("\n\n")[2].partition("\n\n")[0].replace("---:", "---")
    head = f"# Results on {name}\n\nMade by `make pages`. One current file a subject."
    return f"{head}\n\n{text}\n"


def wanted(root: Path) -> dict[Path, str]:
    """{path: text} of every file that is made, as it should be."""
    found: dict[Path, str] = {}
    for page in sorted((root / "docs").rglob("*.md")):
        old = page.read_text(encoding="utf-8")
        text, figures = pages.update(old, root)
        text = compatibility.update(text)
        for made in (real, kernels, day, extending):
            text = made.update(text, root)
        text, drawn = plots.update(text, root, page.relative_to(root))
        found[page] = text
        found |= {root / path: svg for path, svg in (figures | drawn).items()}
    for folder in sorted(path for path in (root / "results").iterdir() if path.is_dir()):
        for one in (folder, folder / REAL):
            if one.is_dir():
                found[one / "README.md"] = index(one)
    return found


def main(
    check: Annotated[
        bool, typer.Option(help="change nothing; exit code 1 if something is out of date")
    ] = False,
    root: Annotated[Path, typer.Option(help="the checkout")] = ROOT,
) -> None:
    stale = {
        path: text
        for path, text in wanted(root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if not check:
            write_text_atomic(path, text)
        said = "out of date" if check else "written"
        print(f"{said}  {path.relative_to(root)}")
    if not stale:
        print("pages and figures are up to date")
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
