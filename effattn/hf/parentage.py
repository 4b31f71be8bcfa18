"""What a model's card can say of the model that it was made of: its name on the hub, and its
license where its own card states one.

    parentage.of("HuggingFaceTB/SmolLM2-135M")      # what was named to a recipe
    parentage.of_model(model)                       # what a live model was loaded from

A folder's card is read where it lies; that of a hub name, which somebody has named and loaded, from
the hub or its cache. A card that is not there, or is broken, says nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from effattn import embedded
from effattn.hf import smollm2
from effattn.hf.source import is_gguf

CARD = "README.md"
MOST = 1 << 20  # bytes of a card
LICENSE = ("license", "license_name", "license_link")
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Parent:
    """Of what model another one was made.

    name: as people read it, no path; None where nothing is known. base: hub names, for the card's
    `base_model`: its own, or those that its card says it was made of. license: the card's fields
    for it."""

    name: str | None = None
    base: tuple[str, ...] = ()
    license: dict[str, str] = field(default_factory=dict)


def of(name: str | Path, revision: str | None = None) -> Parent:
    """The parent by what `effattn.load` takes: "embedded", "smollm2", a folder, a GGUF file or a
    hub name. revision: of the hub name, what was loaded."""
    path = Path(name)
    if str(name) == embedded.NAME or (path.is_dir() and path.samefile(embedded.directory())):
        return Parent("effattn's embedded model")
    if str(name) == smollm2.NAME:
        return Parent(SMOLLM2_HUB, (SMOLLM2_HUB,), {"license": "apache-2.0"})
    if path.is_dir():
        said = _metadata(path / CARD)
        base = _hub_names(said.get("base_model"))
        return Parent(path.resolve().name, base, _license(said))
    if is_gguf(name):
        return Parent(path.name)
    if not _hub_names(str(name)):
        return Parent()
    return Parent(str(name), (str(name),), _license(_metadata(_of_hub(str(name), revision))))


def of_model(model) -> Parent:
    """The parent that a live model was loaded from, as far as transformers has noted it. Only what
    came from the hub has a revision there: a folder that is gone is not taken for a hub name."""
    name = getattr(model.config, "_name_or_path", "") or ""
    revision = getattr(model.config, "_commit_hash", None)
    return of(name, revision) if revision or (name and Path(name).is_dir()) else Parent()


def _of_hub(name: str, revision: str | None) -> Path | None:
    """The hub's card, in the cache. That the hub has none, or is out of reach, stops nothing."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            CARD,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except Exception:  # the hub library's, of many kinds
        return None
    return None if found is None else Path(found)


def _metadata(card: Path | None) -> dict:
    """The fields of a card; {} for one that is not there or cannot be read."""
    from huggingface_hub import ModelCard

    if card is None or not card.is_file() or card.stat().st_size > MOST:
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a text of anybody's: YAML has many ways to be wrong
        return {}


def _license(said: dict) -> dict[str, str]:
    """The fields of a license that are a line of text."""
    found = {name: said.get(name) for name in LICENSE}
    return {
        name: text
        for name, text in found.items()
        if isinstance(text, str) and text.isprintable() and 0 < len(text) <= 200
    }


def _hub_names(said: object) -> tuple[str, ...]:
    """One hub name or several; () unless all of them can be."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    names = said if isinstance(said, list) else [said]
    if not all(isinstance(name, str) for name in names):
        return ()
    try:
        for name in names:
            validate_repo_id(name)
    except HFValidationError:
        return ()
    return tuple(names)
