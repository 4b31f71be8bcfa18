"""A model card: the README.md in a checkpoint's folder, with metadata that the hub reads.

    card.write(folder, parentage.of_model(model))                        # effattn.save
    card.write(folder, parent, report, "convert-gqa", made="effattn convert-gqa ...")    # a recipe

It says what the model is by its config.json, how it is loaded and what it needs; of a recipe's
result also the command, the numbers of its report, and the machine that they were made on. The
metadata is huggingface_hub's `ModelCardData`, which quotes what YAML would take for something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from effattn.hf.names import NAME
from effattn.hf.parentage import CARD, Parent
from effattn.hf.weight_files import file_bytes, read_json
from effattn.profiling.environment import environment
from effattn.reports.document import Document
from effattn.reports.files import write_text_atomic
from effattn.reports.tables import data_size, markdown_text

# how a class's name ends -> (the hub's name of what it is for, the auto class)
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
}
SWAPPED = ("pattern", "positions", "cache", "heads")  # layer -> spec
REPLACED = ("projections", "packed")  # matrix -> what it is
FACTS = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "query heads": "num_attention_heads",
    "key/value heads": "num_key_value_heads",
    "feed-forward size": "intermediate_size",
    "context (tokens)": "max_position_embeddings",
    "dtype": "dtype",
}
ANY = "PATH"  # where the checkpoint lies, which it does not know


def write(
    folder: Path,
    parent: Parent,
    report: Document | None = None,
    recipe: str | None = None,
    made: str | None = None,
    hub: str | None = None,
    paths: Sequence[str] = (),
) -> None:
    """Writes README.md into the folder of a checkpoint, which has its config.json already.

    report: of a recipe, whose tables for the terminal are shown; recipe, made: its name and the
    command; hub: the name that the checkpoint will have there; paths: of which the report's words
    keep the last part, since where files lie is nobody else's business."""
    from huggingface_hub import ModelCardData

    config = read_json(folder / "config.json")
    task, auto = _task(config)
    data = ModelCardData(
        base_model=list(parent.base) if len(parent.base) > 1 else next(iter(parent.base), None),
        library_name="transformers",
        pipeline_tag=task,
        tags=[NAME] if recipe is None else [NAME, recipe.replace(" ", "-")],
        license=parent.license.get("license"),
        license_name=parent.license.get("license_name"),
        license_link=parent.license.get("license_link"),
    )
    title = f"{_span(parent.name or 'A model')}, saved by effattn"
    blocks = [f"---\n{data.to_yaml()}\n---"]
    if report is None:
        blocks += [f"# {title}"]
    else:
        blocks += [f"# {markdown_text(report.title)}", markdown_text(report.headline)]
    blocks += ["## How to load it", *_loading(config, auto, hub or ANY)]
    blocks += ["## What it is", _table(_facts(folder, config, parent))]
    text = "\n\n".join([*blocks, *_made(made, report)])
    for path in sorted(paths, key=len, reverse=True):
        # "/out" is no part of "me/outer", nor of "/outer" or "/out.txt"
        whole = rf"(?<![\w.-]){re.escape(markdown_text(path))}(?![\w-]|\.\w)"
        last = markdown_text(Path(path).name)
        text = re.sub(whole, last.replace("\\", r"\\"), text)
    write_text_atomic(folder / CARD, text + "\n")


def _task(config: dict) -> tuple[str | None, str]:
    name = next(iter(config.get("architectures") or [""]), "")
    return next((how for end, how in TASKS.items() if name.endswith(end)), (None, "AutoModel"))


def _loading(config: dict, auto: str, name: str) -> list[str]:
    """What it needs, and the lines that load it."""
    ours = NAME in config or bool(config.get("per_layer_config"))
    method = (config.get("quantization_config") or {}).get("quant_method", NAME)
    if method != NAME and ours:  # transformers asks one method alone
        lines = ["import effattn", "", f"model = effattn.load({json.dumps(name)})"]
        said = (
            f"It needs effattn: its weights are packed by {_span(str(method))}, the rest is ours."
        )
    else:
        lines = ["import effattn"] * ours + [f"from transformers import {auto}", ""]
        lines += [f"model = {auto}.from_pretrained({json.dumps(name)})"]
        said = "It needs transformers alone."
        if ours:
            said = "It needs effattn (`pip install effattn`)."
    if NAME in config and config.get("model_type") != NAME:
        said += " Without, transformers warns, and loads the model as it was before the swap."
    said += f" `{ANY}` is its folder, or its name on the hub." if name == ANY else ""
    return [said, _fenced("python", "\n".join(lines))]


def _facts(folder: Path, config: dict, parent: Parent) -> list[tuple[str, str]]:
    """What it is: (what, how much)."""
    found = [("made of", _span(parent.name))] if parent.name else []
    found += [("class", _span(name)) for name in config.get("architectures") or []]
    inner = config.get("text_config") or config
    found += [(said, str(inner[key])) for said, key in FACTS.items() if inner.get(key) is not None]
    if different := config.get("per_layer_config"):
        found.append(("layers that differ", ", ".join(map(str, different))))
    found += _swapped(config.get(NAME) or {})
    weights = file_bytes(folder)
    return [*found, ("weights", data_size(weights))] if weights else found


def _swapped(ours: dict) -> list[tuple[str, str]]:
    """What effattn restores, by axis."""
    said = []
    for axis in SWAPPED:
        by_spec: dict[str, list[int]] = {}
        for index, spec in (ours.get(axis) or {}).items():
            by_spec.setdefault(spec, []).append(int(index))
        parts = [f"{_span(spec)} in layers {_ranges(where)}" for spec, where in by_spec.items()]
        said += [(axis, "; ".join(parts))] if parts else []
    return said + [(axis, f"{len(ours[axis])} matrices") for axis in REPLACED if ours.get(axis)]


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _made(made: str | None, report: Document | None) -> list[str]:
    """The command, what was measured, and where."""
    here = environment() if report is None else report.part("environment")
    versions = [
        f"{name} {here[name]}" for name in (NAME, "torch", "transformers") if here.get(name)
    ]
    blocks = ["## How it was made"] + ([_fenced("console", f"$ {made}")] if made else [])
    if report is None:
        return [*blocks, f"With {', '.join(versions)}."]
    blocks += [table.markdown() for table in report.shown()]
    machine = f"Measured on {_span(str(here.get('device')))}"
    machine += f" ({here['threads']} of {here['cores']} cores)" if here.get("threads") else ""
    more = "All numbers are in [report.md](report.md) and `report.html`."
    return [*blocks, f"{machine}, with {', '.join(versions)}. {more}"]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {said} |" for what, said in rows)])


def _span(text: str) -> str:
    """Text as it is, in Markdown, also in a table's cell: no link, no HTML, one line."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def _fenced(language: str, text: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """Backticks enough that none in the text end it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
