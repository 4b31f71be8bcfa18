"""What every training job here shares: windows of a token stream, and the HF Trainer's settings.

Training always goes through `transformers.Trainer`, so that `accelerate launch` or `torchrun` spreads it
over processes and a killed run resumes exactly (optimizer, scheduler, random state, place in the data).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from effattn.resuming import newest_complete

if TYPE_CHECKING:  # at its first use otherwise: it takes 150 MB
    from transformers import Trainer, TrainingArguments


class TokenWindows(Dataset):
    """`count` training windows of `length` tokens from `tokens` (N,) int64, packed end to end.

    Window i is a pure function of (i, seed): pass e over the stream uses its own random offset and its own
    order, so every token is seen once before any is seen twice, whatever process asks for it.
    """

    def __init__(self, tokens: torch.Tensor, length: int, count: int, seed: int = 0):
        if len(tokens) < 2 * length:
            raise ValueError(f"tokens: got {len(tokens):,}, windows of {length} need at least {2 * length:,}")
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.per_pass = len(tokens) // length - 1
        self._order: tuple[int, int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, self.per_pass)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(self.length, (), generator=generator))
            self._order = (epoch, offset, torch.randperm(self.per_pass, generator=generator))
        _, offset, order = self._order
        start = offset + int(order[place]) * self.length
        window = self.tokens[start : start + self.length]
        return {"input_ids": window, "labels": window}


def bf16_pays() -> bool:
    """Whether bf16 matrix products are native on this machine (elsewhere they are emulated, and slow)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def arguments(
    output: Path, *, steps: int, batch: int, lr: float, warmup: int, save_every: int, **overrides
) -> TrainingArguments:
    """The Trainer settings that all jobs share; `overrides` go to `TrainingArguments` as they are."""
    from transformers import TrainingArguments

    settings = dict(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        warmup_steps=warmup,
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=bf16_pays(),
        train_sampling_strategy="sequential",  # TokenWindows shuffles by itself
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=max(1, min(50, steps // 20)),
        logging_first_step=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    settings.update(overrides)
    return TrainingArguments(**settings)


def train(trainer: Trainer) -> None:
    """Runs `trainer`, going on from the newest complete checkpoint in its output folder if there is one."""
    arguments = trainer.args
    last = newest_complete(Path(arguments.output_dir), arguments.world_size, clean=trainer.is_world_process_zero())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
