"""Segment recurrence: a model reads a long text piece by piece, and remembers the pieces before.

Transformer-XL (arXiv:1901.02860, section 3.2): in layer n, segment s + 1 attends to itself and to
what the layer held of the segments before, through which no gradient flows:

    k, v = [SG(k_s) ; k_(s+1)], [SG(v_s) ; v_(s+1)],      h_(s+1) = attention(q_(s+1), k, v)

with SG the stop-gradient. What is carried is the cache that the model decodes with, so the pattern
that a swap gave it says how far back it reaches, and training and inference see the same:

    effattn.swap(model, "block", block=512, look_back=1)           # the segment before, whole
    rows = Segments(tokens, length=512, rows=8, steps=1000)
    Trainer(
        model,
        TrainingArguments(..., train_sampling_strategy="sequential", remove_unused_columns=False),
        train_dataset=rows,
        data_collator=stacked,
        callbacks=[CarriedMemory(model, rows)],
    )

The paper keeps hidden states and multiplies them by today's weights; keys and values are kept here,
so that W_K and W_V learn from the present segment alone, and the memory is as old as its step.

T: tokens of a segment; B: rows of a batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DynamicCache, TrainerCallback
from transformers.cache_utils import DynamicSlidingWindowLayer

from effattn.encoding import begun
from effattn.hf import anatomy, cache_files
from effattn.hf.cache import new_cache
from effattn.hf.state_layer import StateLayer

NUMBER = "segment"  # of a row in its text, 0 where no memory goes before it
FILE = "memory-{step}-{process}.safetensors"
CHECKPOINT = "checkpoint-{step}"  # transformers' folder of a step


class Segments(Dataset):
    """`rows` texts that are read side by side: row r of each batch goes on where row r of the batch
    before ended.

    tokens (N,) int64, cut into `rows` stretches of equal length; item i is segment i // rows of
    stretch i % rows, so that items have to be taken in order. Each has `length` tokens under
    "input_ids" and "labels", of which the first is read and not predicted, and its number under
    "segment". rows: of a batch, those of all processes together; a step that accumulates takes
    several batches. steps: batches in all; beyond the stretches' end they are read again. carry:
    the memory is forgotten after so many segments (None: at a stretch's end only). bos: takes the
    place of the first token where there is no memory. Documents of a stretch are one text, as in
    the paper.

    ValueError for sizes that mean nothing, and for too few tokens."""

    def __init__(
        self,
        tokens: Tensor,
        length: int,
        rows: int,
        steps: int,
        carry: int | None = None,
        bos: int | None = None,
    ):
        for name, value in (("length", length), ("rows", rows), ("steps", steps), ("carry", carry)):
            least = 2 if name == "length" else 1
            if (name, value) != ("carry", None) and (type(value) is not int or value < least):
                raise ValueError(
                    f"{name}: got {value!r}, valid is a whole number of at least {least}"
                )
        if len(tokens) < rows * length:
            raise ValueError(
                f"tokens: got {len(tokens):,}, {rows} rows of segments of {length} need at least "
                f"{rows * length:,}"
            )
        self.tokens, self.length, self.rows, self.steps = tokens, length, rows, steps
        self.carry, self.bos = carry, bos
        self.per_row = len(tokens) // (rows * length)

    def __len__(self) -> int:
        return self.rows * self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, row = divmod(index, self.rows)
        place = step % self.per_row
        number = place if self.carry is None else place % self.carry
        start = (row * self.per_row + place) * self.length
        ids = self.tokens[start : start + self.length]
        ids = begun(ids, self.bos) if number == 0 else ids
        return {"input_ids": ids, "labels": ids, NUMBER: torch.tensor(number)}


def stacked(rows: list[dict]) -> dict[str, Tensor]:
    """The data collator of `Segments`: (B, T), and "segment" (B,). ValueError for rows that are at
    different places of their texts, and where a Trainer took the numbers away."""
    if any(NUMBER not in row for row in rows):
        raise ValueError(
            f"rows: no {NUMBER!r} in them; valid are rows of Segments, in a Trainer with "
            "remove_unused_columns=False"
        )
    if len(numbers := {int(row[NUMBER]) for row in rows}) != 1:
        raise ValueError(
            f"rows: got segments {sorted(numbers)} in one batch, valid is one; a batch has "
            "Segments' `rows`, and train_sampling_strategy='sequential'"
        )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class CarriedMemory(TrainerCallback):
    """Gives each training batch of `rows` the cache that the one before has filled, detached.

    Evaluation, in eval mode, has no memory. Checkpoints have theirs beside them, so that a killed
    run goes on as if it had not been. Outside of a Trainer: `begin()`, batches with their
    "segment", `end()`.

    ValueError for a pattern that remembers everything where `rows` never forgets, for texts beyond
    the positions that a model has learned, for batches that do not follow each other, and for
    trainings that make activations again or have several models in one process."""

    def __init__(self, model: nn.Module, rows: Segments):
        self.model = model
        self.cache: DynamicCache | None = None
        self.number: int | None = None  # of the segment that was read last
        self._hook = None
        if rows.carry is None:
            check_bounded(model)
        segments = min(rows.carry or rows.per_row, rows.per_row)
        check_positions(model, segments, rows.length)

    def begin(self) -> None:
        """From now on the model's training calls have a memory."""
        self.end()
        # before the hooks of a swap, which look at the cache
        self._hook = self.model.register_forward_pre_hook(
            self._remember, with_kwargs=True, prepend=True
        )

    def end(self) -> None:
        """The model is as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.cache = self.number = None

    def _remember(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        numbers = kwargs.pop(NUMBER, None)
        if not model.training:
            return args, kwargs
        if numbers is None:
            raise ValueError(
                f"{NUMBER}: missing in a training batch; valid are batches of Segments, stacked by "
                "`stacked`"
            )
        number = int(numbers[0])
        if number and number - 1 != self.number:
            raise ValueError(
                f"{NUMBER}: got {number} after {self.number}, valid is the next one, or 0; a "
                "Trainer shuffles unless train_sampling_strategy='sequential'"
            )
        if number:
            cache_files.detach(self.cache)
        else:
            self.cache = new_cache(model)
        self.number = number
        return args, kwargs | {"past_key_values": self.cache, "use_cache": True}

    # What a Trainer calls
    # --------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if args.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: a memory is a cache; valid is False")
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: got {args.n_gpu} in one process, valid is 1; torchrun starts one for each"
            )
        self.begin()
        if state.global_step:
            self._read(Path(args.output_dir), state.global_step, args)

    def on_step_end(self, args, state, control, **kwargs):
        # before the checkpoint: a whole one has its memory, whenever the run is killed
        if control.should_save and self.cache is not None:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            told = {NUMBER: self.number}
            cache_files.write(self.cache, self._file(folder, state.global_step, args), told)

    def on_save(self, args, state, control, **kwargs):
        self._forget(Path(args.output_dir), args)

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def _file(self, folder: Path, step: int | str, args) -> Path:
        return folder / FILE.format(step=step, process=args.process_index)

    def _read(self, folder: Path, step: int, args) -> None:
        file = self._file(folder, step, args)
        if not file.is_file():
            self.end()
            raise ValueError(
                f"{file} is missing: the run of step {step} cannot go on; delete {folder} to start "
                "again"
            )
        self.cache = new_cache(self.model)
        self.number = cache_files.read(self.cache, file, args.device)[NUMBER]

    def _forget(self, folder: Path, args) -> None:
        """Deletes the memories of checkpoints that are gone."""
        for file in folder.glob(self._file(folder, "*", args).name):
            step = file.name.split("-")[1]
            if not (folder / CHECKPOINT.format(step=step)).is_dir():
                file.unlink(missing_ok=True)


def check_positions(model: nn.Module, segments: int, length: int) -> None:
    """ValueError where so many segments have more tokens than the model has learned positions."""
    parts = anatomy.of(model)
    most = None if parts.positions is None else int(parts.model.config.max_position_embeddings)
    if most is not None and segments * length > most:
        raise ValueError(
            f"carry: {segments} segments of {length} tokens, but the model has learned {most} "
            f"positions; valid is at most {most // length}"
        )


def check_bounded(model: nn.Module) -> None:
    """ValueError, naming a layer, where the model's cache grows with every token."""
    for index, layer in enumerate(new_cache(model).layers):
        bounded = isinstance(layer, DynamicSlidingWindowLayer)
        if isinstance(layer, StateLayer):
            bounded = layer.state.evicts
        if not bounded:
            raise ValueError(
                f"carry: layer {index} remembers every token, so that a memory would grow without "
                "end; valid is a number of segments, or a model swapped to a bounded pattern, such "
                "as block(block=512, look_back=1) or sliding(window=512)"
            )
