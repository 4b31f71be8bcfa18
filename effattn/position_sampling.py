"""Long positions in short training windows: a data collator that tunes a model for a length it
never computes.

    collator = SampledPositions(target=4096)                    # PoSE; method="random" is the other
    Trainer(model, args, train_dataset=windows, data_collator=collator)

Both methods give every row its own ascending positions below `target`. The model has to read
`position_ids`: train the plain transformers model with its rule in the config (`effattn.swap(model,
positions="yarn(factor=8)")` writes it there); swapped attention counts positions by itself and
refuses ids that jump."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from effattn.errors import check_choice

METHODS = ("pose", "random")


@dataclass(frozen=True)
class SampledPositions:
    """Stacks rows of one length and adds `position_ids`, drawn from torch's global generator, or by
    the rows' own numbers.

    target: positions are below it, in tokens; at least the rows' length. method "pose" (PoSE,
    arXiv:2309.10400): a row is cut into `chunks` runs at random places; positions within a run are
    consecutive, and each run skips ahead of the one before, so that all distances up to `target`
    are met.
    method "random" (randomized positions, arXiv:2305.16843): a random subset of 0 .. target - 1, in
    order."""

    target: int
    method: str = "pose"
    chunks: int = 2

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        for name, least in (("target", 1), ("chunks", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{name}: got {value!r}, valid is a whole number of at least {least}"
                )

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """rows: dicts with "input_ids" (T,) and whatever else is to be stacked, such as "labels"
        and "attention_mask". A row with a number "draw" gets the positions of that number, whenever
        it is asked for.

        Returns them as (B, T), with "position_ids" (B, T) int64, 0 for padding, and an
        "attention_mask", ones if none was given: without one, transformers takes ids that jump for
        the borders of packed documents."""
        lengths = {len(row["input_ids"]) for row in rows}
        if len(lengths) != 1:
            raise ValueError(
                f"rows: got lengths {sorted(lengths)}, valid is one length (pad, with "
                "attention_mask)"
            )
        draws = [row.get("draw") for row in rows]
        names = [name for name in rows[0] if name != "draw"]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
        mask = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        positions = torch.zeros_like(batch["input_ids"])
        for row, real, draw in zip(positions, mask.bool(), draws, strict=True):
            generator = None if draw is None else torch.Generator().manual_seed(int(draw))
            row[real] = self.positions(int(real.sum()), generator)
        return {**batch, "position_ids": positions}

    def positions(self, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Ascending positions of one row, (length,) int64, drawn from the global generator or the
        given one. ValueError for more tokens than `target`."""
        if length > self.target:
            raise ValueError(
                f"target: got {self.target}, shorter than a row of {length} tokens; valid is at "
                "least that"
            )
        if self.method == "random":
            return torch.randperm(self.target, generator=generator)[:length].sort().values
        order = torch.randperm(max(length - 1, 0), generator=generator)
        cuts = (order[: self.chunks - 1] + 1).sort().values.tolist()
        positions, skip = torch.arange(length), 0
        for start, end in pairwise([*cuts, length]):
            # at least the run's before, section 3.1
            skip = int(torch.randint(skip, self.target - length + 1, (), generator=generator))
            positions[start:end] += skip
        return positions
