"""Texts from the rows of a `datasets` name or folder, streamed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path


def read_dataset(name: str, column: str | None = None) -> Iterator[str]:
    """Streams a text column of a dataset's first split ("train" if it has one); rows without text
    are left out.

    name: of the hub or a local folder; NAME:CONFIG for one of several configurations. column: None
    takes "text", or the first column with text. Raises ValueError for what `datasets` cannot find,
    for a configuration that is unknown or has to be chosen (naming those there are), and for
    columns that hold no text."""
    rows = iter(_rows(name))
    found, count = None, 0
    while found is None and (row := next(rows, None)) is not None:
        found = _column(name, row, column)
        count += 1
    if not count:
        raise ValueError(f"dataset: {name!r} has no rows")
    if found is None:
        raise ValueError(
            f"column: {f'{column!r} of ' if column else ''}{name!r} holds no text in any of "
            f"{count:,} rows"
        )
    yield row[found]
    for number, row in enumerate(rows, count + 1):
        text = row.get(found)
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"column: {found!r} of {name!r} is {type(text).__name__} in row {number:,}, valid "
                "is text"
            )
        if text is not None:
            yield text


def _column(name: str, row: dict, column: str | None) -> str | None:
    """The column to read, by a row of which it is text; None where this row's is null. ValueError
    for no such one.
    """
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if column is None:
        if row.get("text", "") is None:  # it may be text in other rows
            return None
        column = "text" if "text" in texts else next(iter(texts), None)
        nulls = any(value is None for value in row.values())
        if column is None and not nulls:
            raise ValueError(
                f"column: got None, {name!r} has no text columns, only {', '.join(map(repr, row))}"
            )
        return column
    if column in texts:
        return column
    if column in row and row[column] is None:
        return None
    listed = ", ".join(map(repr, texts)) or "none"
    raise ValueError(f"column: got {column!r}, {name!r} has the text columns {listed}")


def _rows(name: str):
    """The streamed split. ValueError as `read_dataset`."""
    import datasets

    path, config = _split(name)
    try:
        splits = datasets.load_dataset(path, config, streaming=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        known = _configurations(path)
        if config is not None and known and config not in known:
            near = difflib.get_close_matches(config, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"dataset: {path!r} has no configuration {config!r}{hint}; valid are "
                f"{', '.join(map(repr, known))}"
            ) from error
        if config is None and len(known) > 1:
            raise ValueError(
                f"dataset: {path!r} has several configurations, valid is one of "
                + ", ".join(f"{path}:{one}" for one in known)
            ) from error
        raise ValueError(f"dataset: {name!r} could not be loaded: {reason}") from error
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _split(name: str) -> tuple[str, str | None]:
    """NAME:CONFIG in two. A folder may have a colon in its name, and a drive one before its
    path.
    """
    path, colon, config = name.rpartition(":")
    if not colon or not path or not config or Path(name).exists() or set(config) & set("/\\"):
        return name, None
    return path, config


def _configurations(path: str) -> list[str]:
    """The names of a dataset's configurations; none where `datasets` cannot tell."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(path))
    except Exception:
        return []
