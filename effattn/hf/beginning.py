"""The token that a model's texts begin with (BOS): a model whose tokenizer gives it one was trained
with it in every text, and is another model without. Gemma 3 (270M) has perplexity 58.6 without BOS
and 24.9 with it.

    bos_of(model)          # its id, or None
    bos_of(model, True)    # in any case
    settle(model, False)   # from here on it is None for `model` and copies of it

Wherever windows of a text are cut (evaluation, calibration, training), BOS takes the place of their
first token (`effattn.encoding.begun`), and it is never scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from effattn.encoding import beginning, check_bos
from effattn.hf.source import TOKENIZER_FILES, load_tokenizer

SETTLED = "_effattn_bos"  # of a model: what `settle` was told; 0 tokens can be BOS, False is none


def settle(model, bos: bool | None = None, tokenizer=None) -> None:
    """Decides once for `model` what `bos_of` otherwise finds beside its checkpoint: by `tokenizer`,
    where one is given. Copies of the model have it, too. Raises ValueError as `bos_of`."""
    token = bos_of(model, bos) if tokenizer is None else beginning(tokenizer, bos)
    setattr(model, SETTLED, False if token is None else token)


@contextmanager
def settled(model, bos: bool | None) -> Iterator[None]:
    """While open, `model` is settled on `bos`, or as it is where that is None."""
    before = getattr(model, SETTLED, None)
    if bos is not None:
        settle(model, bos)
    try:
        yield
    finally:
        if bos is not None:
            delattr(model, SETTLED)
            if before is not None:
                setattr(model, SETTLED, before)


def bos_of(model, bos: bool | None = None) -> int | None:
    """The token that each window of `model` begins with; None: windows are the text as it is.

    bos None: what it was settled on, or else what the tokenizer of the model's checkpoint puts
    before a text. The checkpoint is where the model was loaded from (its config's name: a folder,
    or a hub name whose tokenizer is in the local cache; nothing is downloaded). A model without a
    tokenizer there has none: its config's `bos_token_id`, which nearly every config has, does not
    say that texts begin with it. True: the tokenizer's BOS, or the config's. False: None.
    ValueError for anything else, and for True where there is no such token."""
    check_bos(bos)
    if bos is False:
        return None
    settled = getattr(model, SETTLED, None)
    if settled is not None and (bos is None or settled is not False):
        return None if settled is False else settled
    config = getattr(model, "config", None)
    tokenizer = tokenizer_in(getattr(config, "_name_or_path", None) or "")
    if bos is None:
        return None if tokenizer is None else beginning(tokenizer)
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None and config is not None:
        token = getattr(config.get_text_config(), "bos_token_id", None)
    if token is None:
        raise ValueError(
            "bos: got True, neither the model's tokenizer nor its config has a BOS token; valid is "
            "False"
        )
    return token


def end_of(model) -> int | None:
    """The token that closes each document in a stream of tokens (`effattn.encoding.encode`), by the
    tokenizer of the model's checkpoint; None where there is none on this machine."""
    config = getattr(model, "config", None)
    return getattr(tokenizer_in(getattr(config, "_name_or_path", None) or ""), "eos_token_id", None)


def tokenizer_in(name: str | Path):
    """The tokenizer of a checkpoint (folder or hub name), None if there is none on this machine."""
    if not name:
        return None
    folder = Path(name)
    files = [folder / file for file in TOKENIZER_FILES]
    return _loaded(str(name), tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


@lru_cache(maxsize=4)
def _loaded(name: str, _written: tuple[int, ...]):
    """`_written`: when its files were, so that another tokenizer in the same place is loaded."""
    if Path(name).is_dir():
        try:
            return load_tokenizer(name)
        except ValueError:  # none, or none that can be read
            return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # not in the cache: every class has its own way of saying so
        return None
