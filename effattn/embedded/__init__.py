"""The embedded model: a small trained multi-head Llama, its tokenizer, and real text to measure it
on.

    model, tokenizer = effattn.embedded.load()
    ids = effattn.embedded.tokens("validation", 50_000)      # int64 (50000,)

The model was trained at length 512 by `recipes/pretrain_embedded.py` on the source of Python's
standard library; `card()` says how long and how well. Nothing here touches the network."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from effattn.embedded import corpus
from effattn.encoding import encode

NAME = "embedded"  # what `--model` calls it


def directory() -> Path:
    """The folder of the shipped checkpoint: plain transformers loads it by this path."""
    return Path(__file__).parent / "model"


def card() -> dict:
    """Training facts of the shipped checkpoint: token budget, loss curve, validation bits per
    byte.
    """
    return json.loads((directory() / "card.json").read_text())


def load(dtype: torch.dtype = torch.float32):
    """The shipped model (eval mode, on the CPU) and its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory(), dtype=dtype, local_files_only=True)
    return model.eval(), tokenizer()


@functools.lru_cache(maxsize=1)
def tokenizer():
    """The shipped byte-level BPE tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory(), local_files_only=True)


def tokens(split: str, n: int | None = None, *, tokenizer=None) -> torch.Tensor:
    """The first `n` tokens (default: all) of `split` ("train" or "validation"), int64 (n,).

    Whole files in a fixed order, each ended by the end-of-text token. Raises ValueError for an
    unknown split or when the split has fewer than `n` tokens."""
    if n is not None and n < 1:
        raise ValueError(f"n: got {n}, valid is a positive number of tokens")
    tokenizer = tokenizer or globals()["tokenizer"]()
    found = encode((text for _, text in corpus.documents(split)), tokenizer, n)
    if n is not None and len(found) < n:
        raise ValueError(f"n: got {n:,}, the {split} split has {len(found):,} tokens")
    return found
