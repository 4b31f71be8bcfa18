"""Uptraining: a short distillation that heals a converted model.

The loss at every position is the forward KL from the unmodified parent plus a little cross-entropy. Both are
computed over chunks of positions that are recomputed in the backward pass, so no (batch, length, vocabulary)
tensor ever exists, let alone two. Training is the HF Trainer: `accelerate launch` or `torchrun` spreads it
over processes, and a killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback

from effattn import training
from effattn.evaluate.loss import compare, kl_chunked, perplexity
from effattn.hf import anatomy as hf
from effattn.profiling.html import write_text_atomic

CHUNK = 1024  # positions whose logits exist at a time
CE_WEIGHT = 0.2


def default_lr(hidden: int) -> float:
    """Peak learning rate by width: 1e-3 up to 256 (measured on the embedded model), 6e-5 at 4096."""
    return min(1e-3, 0.256 / hidden)


def distillation_loss(
    parts: hf.Anatomy, hidden: torch.Tensor, teacher_parts: hf.Anatomy, teacher_hidden: torch.Tensor,
    labels: torch.Tensor, ce_weight: float = CE_WEIGHT, chunk: int = CHUNK,
) -> torch.Tensor:  # fmt: skip
    """Mean over positions of KL(teacher || student) + ce_weight · cross-entropy.

    hidden, teacher_hidden (B, T, D): outputs of the final norms; labels (B, T) int64, the input tokens
    (shifted here). Logits of at most `chunk` positions exist at a time, forward and backward.
    """
    student, teacher = (x[:, :-1].flatten(0, 1) for x in (hidden, teacher_hidden))
    targets = labels[:, 1:].flatten()

    def part(s: torch.Tensor, t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = parts.logits(s).float()
        with torch.no_grad():
            reference = teacher_parts.logits(t)
        kl = kl_chunked(reference, logits, chunk).sum()
        return kl + ce_weight * F.cross_entropy(logits, target, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for s, t, target in zip(student.split(chunk), teacher.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(part, s, t, target, use_reentrant=False)
    return total / len(targets)


class DistillationTrainer(Trainer):
    """A Trainer whose loss is `distillation_loss` against `teacher`, which is never trained or saved."""

    def __init__(self, *args, teacher, ce_weight: float = CE_WEIGHT, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.ce_weight = ce_weight
        self.teacher_parts = hf.of(teacher.eval().requires_grad_(False).to(self.args.device))
        self.parts = hf.of(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, seen = inputs["input_ids"], {}
        # The call goes through the (possibly wrapped) model, so that gradients are synchronised between
        # processes; its logits are asked for one position only, the loss makes its own from the final norm.
        handle = self.parts.final_norm.register_forward_hook(lambda _, __, output: seen.update(hidden=output))
        try:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        with torch.no_grad():
            teacher_hidden = self.teacher_parts.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return distillation_loss(
            self.parts, seen["hidden"], self.teacher_parts, teacher_hidden, inputs["labels"], self.ce_weight
        )


class Curve(TrainerCallback):
    """Measures the student at regular steps and keeps the curve in `path`, so that it survives a kill."""

    def __init__(self, path: Path, every: int, tokens_per_step: int, measure: Callable[[], dict]):
        self.path, self.every, self.tokens_per_step, self.measure = path, every, tokens_per_step, measure
        self.points: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._add(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._add(state)

    def _add(self, state) -> None:
        if not state.is_world_process_zero:
            return
        done = state.global_step * self.tokens_per_step
        self.points = [p for p in self.points if p["tokens"] < done] + [{"tokens": done, **self.measure()}]
        write_text_atomic(self.path, json.dumps(self.points))


class Steps(TrainerCallback):
    """Passes the Trainer's progress on as (steps done, steps)."""

    def __init__(self, progress: Callable[[int, int], None]):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)


def uptrain(
    student, teacher, tokens: torch.Tensor, *, train_tokens: int, folder: Path, evaluation: torch.Tensor | None = None,
    length: int = 512, batch: int = 4, lr: float | None = None, ce_weight: float = CE_WEIGHT, points: int = 5,
    seed: int = 0, save_every: int | None = None, progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:  # fmt: skip
    """Trains `student` in place towards `teacher` on `tokens` (N,) int64; returns a dict: tokens, seconds, curve
    (perplexity, cross-entropy and KL at a number of tokens), parent (its perplexity on the same tokens).

    train_tokens: the budget over all processes. folder: checkpoints; a folder with some makes the run go on from
    there. evaluation (M,) int64: what the curve is measured on, at `points` places. batch: windows of `length`
    a step and process. overrides: passed to TrainingArguments.
    """
    hidden = student.get_input_embeddings().weight.shape[1]
    settings = {"disable_tqdm": True, "logging_strategy": "no", "seed": seed} | (overrides or {})
    probe = training.arguments(folder, steps=1, batch=batch, lr=1.0, warmup=0, save_every=1, **settings)
    tokens_per_step = batch * length * probe.world_size
    steps = max(1, train_tokens // tokens_per_step)
    arguments = training.arguments(
        folder, steps=steps, batch=batch, lr=lr or default_lr(hidden), warmup=min(steps, max(10, steps // 10)),
        save_every=save_every or max(1, min(100, steps // 3)), **({"weight_decay": 0.01} | settings),
    )  # fmt: skip
    use_cache = student.config.use_cache
    callbacks = [Steps(progress)] if progress else []
    curve = None
    if evaluation is not None:

        def measure() -> dict:
            student.eval()
            result = compare(teacher, student, evaluation, length)
            student.train()
            return result

        curve = Curve(Path(folder) / "curve.json", -(-steps // points), tokens_per_step, measure)
        callbacks.append(curve)
    trainer = DistillationTrainer(
        model=student, args=arguments, teacher=teacher, ce_weight=ce_weight, callbacks=callbacks,
        train_dataset=training.TokenWindows(tokens, length, steps * batch * arguments.world_size, seed),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # progress is the caller's
    start = time.perf_counter()
    training.train(trainer)
    student.config.use_cache = use_cache
    student.eval()
    return {
        "tokens": steps * tokens_per_step,
        "seconds": time.perf_counter() - start,
        "processes": arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "parent": {"perplexity": perplexity(teacher, evaluation, length)} if curve else None,
        "curve": curve.points if curve else [],
    }
