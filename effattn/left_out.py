"""Methods that are known by name and are not here, with the reason.

    left_out("backend", "luna")     # why, in a sentence; None for names that nobody published

An axis looks here before it says that a name is unknown, and the documentation's table of what
stays out is made of this one, so that the reason stands once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LeftOut:
    """What it is called in its paper, where that is, why it is not here, and what to take (an
    expression that this version accepts, or words)."""

    title: str
    source: str
    reason: str
    instead: str = ""

    def __str__(self) -> str:
        instead = f"; take {self.instead}" if self.instead else ""
        return f"{self.title} ({self.source}) is left out: {self.reason}{instead}"


PATTERNS = {
    "bp_transformer": LeftOut(
        "BP-Transformer",
        "arXiv:1911.04070",
        "its tree of spans has states of its own in every layer, which a pretrained checkpoint "
        "does not hold",
        "linformer_blockwise",
    ),
    "ernie_doc": LeftOut(
        "ERNIE-Doc",
        "arXiv:2012.15688",
        "it is a way of pretraining: every document is read twice, with the layer below of the "
        "last segment as memory",
        "block(look_back=1) for the recurrence over segments",
    ),
    "etc": LeftOut(
        "ETC",
        "arXiv:2004.08483",
        "its second, global input and its relative labels are pretrained; what attention sees is "
        "Longformer's",
        "longformer",
    ),
    "expire_span": LeftOut(
        "Expire-Span",
        "arXiv:2105.06548",
        "how long a token is kept must be learned from the start of training, and untrained spans "
        "are a plain window",
        "sliding",
    ),
    "h_transformer_1d": LeftOut(
        "H-Transformer-1D",
        "arXiv:2107.11906",
        "keys far away are means of blocks at every level, which without training is a coarser "
        "linformer_blockwise",
        "linformer_blockwise",
    ),
    "han": LeftOut(
        "Hierarchical attention networks",
        "aclanthology N16-1174",
        "words are pooled into sentences and those into a document: an architecture for "
        "classification, nothing that a decoder's layer can be swapped for",
    ),
    "infinity_former": LeftOut(
        "infinity-former",
        "arXiv:2109.00301",
        "the past is a sum of basis functions that the layer must be trained to read, and fitted "
        "again at each step",
        "linear or performer for a constant state",
    ),
    "luna": LeftOut(
        "Luna",
        "arXiv:2106.01540",
        "a second sequence goes through all layers beside the first; no pretrained checkpoint has "
        "one",
        "linformer_blockwise",
    ),
    "routing": LeftOut(
        "Routing Transformer",
        "arXiv:2003.05997",
        "each of its means takes its nearest tokens out of the whole sequence, later ones "
        "included, so a causal result depends on the future",
        "lsh, whose buckets are causal-safe",
    ),
    "scatterbrain": LeftOut(
        "Scatterbrain",
        "arXiv:2110.15343",
        "its sparse part is lsh and its low-rank part performer, which are here; their sum needs "
        "both denominators at once and no kernel of ours keeps them",
        "lsh, or performer",
    ),
    "sparsebert": LeftOut(
        "SparseBERT",
        "arXiv:2102.12871",
        "it learns a dense T x T mask: a study of which entries matter, with no bytes saved",
        "longformer",
    ),
}
POSITIONS = {
    "clex": LeftOut(
        "CLEX",
        "arXiv:2310.16450",
        "its frequencies are the solution of a differential equation whose right side is a network "
        "trained with the model; for one length it is a factor a frequency",
        "longrope(length=..., long_factor=[...])",
    ),
    "random_padding": LeftOut(
        "Random padding",
        "arXiv:2305.04859",
        "under rotary positions only distances count, and moving all of a sequence changes none",
    ),
    "shape": LeftOut(
        "SHAPE, shifted absolute positions",
        "arXiv:2109.05644",
        "under rotary positions only distances count, and a shift of all positions changes none",
    ),
}
# by the argument that an axis' errors begin with
LEFT_OUT: Mapping[str, Mapping[str, LeftOut]] = {"backend": PATTERNS, "positions": POSITIONS}


def left_out(argument: str, name: str) -> LeftOut | None:
    """Of the axis whose errors begin with `argument`; None where the name is not in the table."""
    return LEFT_OUT.get(argument, {}).get(name)
