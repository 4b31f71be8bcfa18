"""The words that a subject is written in: its steps, which numbers of their reports are kept, the
table made of these, and what they should reach.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from effattn.errors import check_choice

SMALL = 8  # by so much `--tokens small` divides what a step reads
LEAST = {"calibration_tokens": 12_288}  # that a step still reads then: ten for each input solved
WINDOW = 512  # and of other tokens


@dataclass(frozen=True)
class Place:
    """Where a step finds what it works on. model: as `--model` takes it; text: files to calibrate
    and train on; held_out: one to measure on; output: a new folder for what a recipe leaves;
    measured: a file of what serves all steps of a subject, where its recipe has such a file."""

    model: str
    text: Sequence[Path]
    held_out: Path
    output: Path
    measured: Path


@dataclass(frozen=True)
class Step:
    """One measurement. run(place, **settings) -> the numbers that are kept, JSON-able."""

    name: str
    run: Callable[..., dict]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scaled(self, small: bool) -> dict[str, Any]:
        """The settings; `small`: to see that everything runs, with an eighth of the tokens."""
        found = dict(self.settings)
        for name, value in found.items():
            if small and name.endswith("tokens"):
                found[name] = min(value, max(LEAST.get(name, WINDOW), value // SMALL))
        return found


@dataclass(frozen=True)
class Target:
    """What is to be reached: value(numbers by step) <= most. None: not measured."""

    what: str
    most: float
    value: Callable[[Mapping[str, dict]], float | None]


@dataclass(frozen=True)
class Subject:
    """A file of results, and a table of the page. columns: heading -> (numbers of a step) -> cell;
    they come behind the step's name and before what it took. note: below the table."""

    title: str
    steps: Sequence[Step]
    columns: Mapping[str, Callable[[dict], str]]
    targets: Sequence[Target] = ()
    note: str = ""


def subjects() -> dict[str, Subject]:
    """File's name -> what it declares as SUBJECT, by the order that files give themselves."""
    found = {name: module(name).SUBJECT for name in names()}
    return dict(sorted(found.items(), key=lambda item: module(item[0]).ORDER))


def names() -> list[str]:
    """Of the files in `subjects`."""
    from bench.real import subjects

    return [one.name for one in pkgutil.iter_modules(subjects.__path__)]


def module(name: str) -> ModuleType:
    """The file of a subject. ValueError for a name that is none."""
    check_choice("only: a subject", name, names())
    return importlib.import_module(f"bench.real.subjects.{name}")


def find(subject: str, step: str) -> Step:
    """ValueError for one that does not exist."""
    steps = {one.name: one for one in module(subject).SUBJECT.steps}
    return steps[check_choice(f"only: a step of {subject}", step, steps)]


def recipe(name: str, take: Callable[[dict], dict], **fixed) -> Callable[..., dict]:
    """A step that is a recipe: its own `run` with these and the step's settings, of whose report
    `take(data)` is kept. A recipe reads what it calibrates on from `text`, what it measures from
    `evaluation_text`, or where it calibrates nothing the latter from `text`."""

    def run(place: Place, **settings) -> dict:
        code = importlib.import_module(f"effattn.recipes.{name}")
        known = code.Settings.__dataclass_fields__
        given = {"model": place.model, "text": [place.held_out]} | fixed | settings
        if "evaluation_text" in known:
            given |= {"text": list(place.text), "evaluation_text": [place.held_out]}
        if "output" in known:
            given.setdefault("output", place.output)
        if "measured" in known:
            given.setdefault("measured", place.measured)
        given = {key: value for key, value in given.items() if key in known}
        return take(code.run(code.Settings(**given)).data)

    return run
