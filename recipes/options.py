"""Settings of a recipe, declared once: a dataclass field is the argument in Python and the option
on the command line, with its type, default, bounds and help.

    @dataclass
    class Settings(options.Settings):
        \"\"\"What `--help` says of the command.\"\"\"

        kv_heads: int = whole(help="key/value heads to keep", least=1)     # required
        model: str = option("embedded", "a folder, or a hub name")
        uptrain_tokens: int = tokens(0, "to distil on")                    # 100_000, 100k or 1.5M
        decode_contexts: Sequence[int] = contexts((512, 4096), "cache lengths")     # 512,4k or none
        overrides: dict = field(default_factory=dict)                      # for Python alone

The order of the fields is the order of the options. A number out of its bounds is a ValueError
from the start, however it was given; `None` is valid where it is the default. Nothing here imports
torch: `--help` answers at once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, InitVar, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

import typer

from effattn.bounds import MOST, SEED, Bounds

GOES_ON = "stopped; run the same command again to go on from the last checkpoint"


# Fields
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """How a field stands on the command line.

    flags: its names there, where they are not the field's own. parser, metavar: as typer has them,
    of one value. read: (field's name, what was given) -> the setting, where that is not what typer
    makes of it; `shown` is then the default as a person would write it. repeated: the option may be
    given several times."""

    help: str
    flags: tuple[str, ...] = ()
    parser: Callable[[str], object] | None = None
    metavar: str | None = None
    read: Callable[[str, Any], object] | None = None
    shown: str | None = None
    repeated: bool = False


def option(
    default=MISSING,
    help: str | None = None,
    *,
    name: str | None = None,
    read: Callable[[str, Any], object] | None = None,
    shown: str | None = None,
    bounds: Bounds | None = None,
    **how,
):
    """A field that is an option. Without help it is for Python alone; without a default it must be
    given. name: of the option, "--pattern" for a field `patterns`; "--bias" of a bool has no
    "--no-bias". The others are those of `Option`."""
    metadata: dict[str, object] = {} if bounds is None else {"bounds": bounds}
    if help is not None:
        flags = () if name is None else (name,)
        if shown is None and read is not None and isinstance(default, str):
            shown = default
        metadata["option"] = Option(help, flags, read=read, shown=shown, **how)
    return field(default=default, metadata=metadata)


def whole(
    default=MISSING,
    help: str | None = None,
    *,
    least: int,
    most: int | None = None,
    unit: str = "",
    **how,
):
    """A whole number, or, where the default is a tuple, several; `unit` is what it counts."""
    return option(default, help, bounds=Bounds(True, least=least, most=most, unit=unit), **how)


def real(
    default=MISSING,
    help: str | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    **how,
):
    """A finite number, or several."""
    return option(default, help, bounds=Bounds(False, least=least, above=above, most=most), **how)


def tokens(default: int, what: str, *, least: int = 0):
    """A number of tokens, written as people do: 100000, 100_000, 100k or 1.5M."""
    return whole(default, f"tokens {what}", least=least, parser=count_of, metavar="TOKENS")


def contexts(default: Sequence[int] | None, help: str, *, least: int = 1, unit: str = "", **how):
    """Several numbers, mostly of tokens: "512,4k,16k", where k is 1024, or "none"."""
    shown = ",".join(f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in default or ())
    how = {"read": lambda name, text: tuple(contexts_of(text, name)), "shown": shown} | how
    return whole(default, help, least=least, unit=unit, **how)


def names(default: Sequence[str], help: str):
    """Several names, with commas between them, or one each time that the option is given."""

    def read(_: str, texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, ",".join(texts).split(","))))

    told = f"{help} (default: {','.join(default)})" if default else help
    return option(default, told, read=read, repeated=True)


def several(default: Sequence, help: str, **how):
    """An option that is repeated for more; `read` gets a tuple, if any were given."""
    return option(default, help, repeated=True, **how)


def or_none(default: str, help: str):
    """A text, or "none", which is None in Python."""
    return option(default, help, read=lambda _, text: None if text == "none" else text)


# What many recipes take, with the same words
# -------------------------------------------------------------------------------------------------


def model_name():
    """The model that a recipe starts from."""
    said = '"embedded", "smollm2" (fetched), a folder, a GGUF file, or a hub name'
    return option("embedded", said)


def text_files(purpose: str, more: str = "more files"):
    """Files of text, any number of times."""
    return several((), f"UTF-8 text {purpose}; repeat for {more}")


def evaluation_files():
    """Files of text apart from the others, to measure on."""
    return several((), "UTF-8 text to measure on instead of what is held out; repeat for more")


def begins_with_bos():
    """Whether windows begin with BOS."""
    return option(None, "windows of text begin with BOS (default: as the tokenizer does it)")


def dataset_name():
    """A dataset in the place of files."""
    return option(None, "a `datasets` name (or NAME:CONFIG) or folder, streamed")


def text_column():
    """Which of the dataset's columns is text."""
    return option(None, "the dataset's text column")


def window_length():
    """Tokens of a window, where the model may decide."""
    return whole(
        None,
        "window length in tokens (default: as the model was trained, at most 2048)",
        least=8,
        unit="tokens",
    )


def random_seed(of: str, default: int = 0):
    """The seed of what is drawn."""
    return whole(default, f"of {of}", least=0, most=SEED)


def device_name():
    """Where it runs."""
    return option("auto", "auto, cpu or cuda")


def decode_contexts(default: Sequence[int]):
    """Lengths of caches, in tokens, that decoding is timed over."""
    return contexts(default, "cache lengths to time decoding at, or none")


# The class
# -------------------------------------------------------------------------------------------------


class Settings:
    """Base of a recipe's dataclass of settings."""

    APART: ClassVar[tuple[str, ...]] = ()  # what a run that goes on may have otherwise
    AFTER: ClassVar[tuple[str, ...]] = ()  # what comes after the work, and changes nothing of it
    output: Path | None  # where the result is written; every recipe declares it in its place
    WIDTH: ClassVar[int | None] = None  # of the printed report where no terminal says: a log's

    def __post_init__(self, *_) -> None:
        """ValueError for the first number that is out of its bounds."""
        for one in fields(self):
            if "bounds" in one.metadata:
                value = getattr(self, one.name)
                if value is None and one.default is None:
                    continue
                for number in value if isinstance(value, list | tuple) else [value]:
                    one.metadata["bounds"].check(one.name, number)

    @property
    def partial(self) -> Path | None:
        """The folder or file that an unfinished run goes on from; None where there is none."""
        return None

    def stopped(self) -> str:
        """What is said when a run is stopped: what of it is kept."""
        return GOES_ON

    def kept(self) -> dict:
        """What two runs must have in common for one to go on from the other."""
        apart = {"output", "device", "overrides", *self.APART}
        return {key: value for key, value in self.told().items() if key not in apart}

    def told(self) -> dict:
        """What a report may say of what was asked for."""
        return {key: value for key, value in asdict(self).items() if key not in self.AFTER}

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Self:
        """The settings that a command line asks for. ValueError for what means nothing."""
        chosen = {}
        for one in declared(cls):
            how, value = one.metadata["option"], given[one.name]
            if how.repeated and not value:
                continue  # the default
            value = tuple(value) if how.repeated else value
            chosen[one.name] = value if how.read is None else how.read(one.name, value)
        return cls(**chosen)


@dataclass(kw_only=True)
class Saving(Settings):
    """Base of those of a recipe that saves a checkpoint: what may come after the work
    (`effattn.recipes.publishing`). These options are a command's last ones."""

    lm_eval: Sequence[str] = names(
        (), "tasks of lm-evaluation-harness, for the parent and the result, with commas between"
    )
    lm_eval_limit: int | None = whole(
        None, "examples of each of these tasks (default: all)", least=1
    )
    push_to_hub: str | None = option(
        None, "send the output there at the end: a hub repository, owner/name"
    )
    push_private: bool = option(
        False, "a repository that this makes is private", name="--push-private"
    )

    AFTER: ClassVar = ("lm_eval", "lm_eval_limit", "push_to_hub", "push_private")
    COMMAND: ClassVar[str]  # as one types it, behind "effattn"

    @property
    def saves(self) -> bool:
        """Whether this run will save a checkpoint."""
        return self.output is not None


def declared(settings: type[Settings]) -> list[Field]:
    """The fields that are options: those with a help. An `InitVar` is one that is no setting."""
    every = settings.__dataclass_fields__.values()  # `fields` leaves InitVars out
    found = [one for one in every if "option" in one.metadata]
    return sorted(found, key=lambda one: one.kw_only)  # those of a base come first there


def parameters(settings: type[Settings]) -> list[inspect.Parameter]:
    """The options as typer reads them off a function."""
    hints, found = get_type_hints(settings), []
    for one in declared(settings):
        how, hint = one.metadata["option"], hints[one.name]
        hint = hint.type if isinstance(hint, InitVar) else hint
        default = inspect.Parameter.empty if one.default is MISSING else one.default
        if how.repeated:  # what is not given is the field's own default, which is not shown
            hint, default = list[_element(hint)] | None, None
        elif how.read is not None:
            hint, default = (str | None, None) if how.shown is None else (str, how.shown)
            if one.default is MISSING:
                hint, default = str, inspect.Parameter.empty
        elif how.parser is not None:
            default = str(default)
        asked = typer.Option(*how.flags, help=how.help, parser=how.parser, metavar=how.metavar)
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(
            inspect.Parameter(one.name, kind, default=default, annotation=Annotated[hint, asked])
        )
    return found


def _element(hint: object) -> type:
    """Of Sequence[Path]: Path. What is read from texts is given as texts."""
    (inner,) = get_args(hint)
    return inner if get_origin(inner) is None and isinstance(inner, type) else str


# How people write numbers
# -------------------------------------------------------------------------------------------------


def contexts_of(text: str, option: str = "decode_contexts") -> list[int]:
    """ "512,4k,16k" as numbers; empty for "" and "none"."""
    if text.strip().lower() in ("", "none", "0"):
        return []
    try:
        return [
            int(part.lower().removesuffix("k").replace("_", ""))
            * (1024 if part.lower().endswith("k") else 1)
            for part in map(str.strip, text.split(","))
        ]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}, valid is like 512,4k,16k or none") from None


def count_of(text: str) -> int:
    """A number of tokens: 100000, 100_000, 100k or 1.5M."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    try:
        value = float(digits.replace("_", "").replace(",", "")) * factor
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST or abs(value - round(value)) > 1e-6:  # NaN neither
        raise typer.BadParameter(f"got {text!r}, valid is like 50000, 50_000, 50k or 1.5M")
    return round(value)
