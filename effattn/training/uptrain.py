"""Uptraining: a short distillation that heals a converted model.

The loss at every position is the forward KL from the unmodified parent plus a little cross-entropy,
plus how far each layer's output is from the parent's. The first two are computed over chunks of
positions that are recomputed in the backward pass, so no (batch, length, vocabulary) tensor ever
exists, let alone two. By default only the attention projections, which the conversion changed, are
trained. Training is the HF Trainer: `accelerate launch` or `torchrun` spreads it over processes,
and a killed run goes on from its last checkpoint.

Measured on the embedded model, 8 -> 1 heads, 120,000 tokens, KL to the parent on held-out text
(0.752 before): all weights, KL + 0.2 CE 0.348; KL alone 0.300; attention alone 0.264; attention and
layer outputs 0.198. Training everything, or on more cross-entropy, drifts towards the uptraining
text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from effattn.errors import check_choice
from effattn.evaluate.logits import Scores, positions_at_a_time
from effattn.evaluate.loss import compare, kl_chunked, perplexity
from effattn.hf import anatomy as hf
from effattn.hf.beginning import bos_of, end_of
from effattn.hf.placement import require_here
from effattn.reports.files import write_text_atomic
from effattn.training import lending as training

CE_WEIGHT = 0.05
LAYER_WEIGHT = 30.0  # 10 to 60 were alike
TRAINABLE = training.TRAINABLE


def default_lr(parts: hf.Anatomy) -> float:
    """Peak learning rate by width and depth: 3e-3 for the embedded model (256 wide, 4 layers), less
    for wider and for deeper ones.

    Adam moves every weight by the rate, and an output by the rate times the width; what the layers
    do adds up. SmolLM2 (576 wide, 30 layers: 1.8e-4), 3 -> 1 heads, cross-entropy 4.67 before and
    after 4,096 tokens: 4.52 at 2e-4, 4.73 at 5e-4. 4096 wide, 32 layers: 2.3e-5, near the 2e-5 that
    is usual there."""
    width, layers = parts.embeddings.weight.shape[1], len(parts.layers)
    return 3e-3 * min(1.0, 256 / width) * min(1.0, 4 / layers)


def distillation_loss(
    parts: hf.Anatomy,
    hidden: torch.Tensor,
    teacher_parts: hf.Anatomy,
    teacher_hidden: torch.Tensor,
    labels: torch.Tensor,
    ce_weight: float = CE_WEIGHT,
    chunk: int | None = None,
) -> torch.Tensor:
    """Mean over positions of KL(teacher || student) + ce_weight · cross-entropy, in nats: a 0-d
    float32 tensor.

    hidden, teacher_hidden (B, T, D): outputs of the final norms; labels (B, T) int64, the input
    tokens (shifted here). Logits of at most `chunk` positions exist at a time (None: what fits
    into `effattn.evaluate.logits.BYTES`), forward and backward."""
    chunk = chunk or positions_at_a_time(parts.embeddings.weight.shape[0])
    student = Scores(parts, hidden[:, :-1], chunk)
    teacher = Scores(teacher_parts, teacher_hidden[:, :-1], chunk)
    targets = labels[:, 1:].flatten()

    def part(logits: torch.Tensor, at: slice) -> torch.Tensor:
        with torch.no_grad():
            reference = teacher.logits(at)
        kl = kl_chunked(reference, logits).sum()
        return kl + ce_weight * F.cross_entropy(logits, targets[at], reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for loss in student.each(part):
        total = total + loss
    return total / len(targets)


def layer_distance(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers and positions of |s - t|^2 / |t|^2, for layer outputs (B, T, D). Relative to
    each position, so that the few positions with massive activations do not drown the others."""
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        if {s.dtype, t.dtype} & set(training.HALF):  # massive activations, squared, are beyond fp16
            s, t = s.float(), t.float()
        total = total + ((s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)).mean()
    return total / len(teacher)


class DistillationTrainer(Trainer):
    """A Trainer whose loss is `distillation_loss` plus `layer_distance`; `teacher` is never trained
    or saved.
    """

    def __init__(
        self,
        *args,
        teacher,
        ce_weight: float = CE_WEIGHT,
        layer_weight: float = LAYER_WEIGHT,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.ce_weight, self.layer_weight = ce_weight, layer_weight
        self.teacher_parts = hf.of(teacher.eval().to(self.args.device))
        self.parts = hf.of(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = {"input_ids": inputs["input_ids"], "position_ids": inputs.get("position_ids")}
        # The call goes through the (possibly wrapped) model, so that gradients are synchronised
        # between processes; its logits are asked for one position only, the loss makes its own from
        # the final norm.
        with _outputs(self.parts) as student:
            model(**given, use_cache=False, logits_to_keep=1)
        with torch.no_grad(), _outputs(self.teacher_parts) as teacher:
            self.teacher_parts.model.base_model(**given, use_cache=False)
        loss = distillation_loss(
            self.parts,
            student.pop(),
            self.teacher_parts,
            teacher.pop(),
            inputs["labels"],
            self.ce_weight,
        )
        return (
            loss + self.layer_weight * layer_distance(student, teacher)
            if self.layer_weight
            else loss
        )


@contextmanager
def _outputs(parts: hf.Anatomy):
    """Yields a list that a forward pass fills with every layer's output and, last, the final
    norm's: (B, T, D) each.
    """
    seen: list[torch.Tensor] = []

    def note(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    modules = [*(layer.block for layer in parts), parts.final_norm]
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Curve(TrainerCallback):
    """Measures the student at regular steps and keeps the curve in `path`, so that it survives a
    kill.
    """

    def __init__(self, path: Path, every: int, tokens_per_step: int, measure: Callable[[], dict]):
        self.path, self.every, self.tokens_per_step, self.measure = (
            path,
            every,
            tokens_per_step,
            measure,
        )
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
        # a run that goes on from an earlier checkpoint measures some points again
        self.points = [p for p in self.points if p["tokens"] < done] + [
            {"tokens": done, **self.measure()}
        ]
        write_text_atomic(self.path, json.dumps(self.points))


class Steps(TrainerCallback):
    """Passes the Trainer's progress on as (steps done, steps)."""

    def __init__(self, progress: Callable[[int, int], None]):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)


def _schedule(
    folder: Path, train_tokens: int, tokens: int, *, save_every: int | None, **settings
) -> tuple:
    """(TrainingArguments, tokens a step) for a budget over all processes, each of which takes
    `tokens` a step. How many processes there are, only the Trainer's settings know."""
    probe = training.arguments(folder, steps=1, warmup=0, save_every=1, **settings)
    tokens_per_step = tokens * probe.world_size
    steps = max(1, train_tokens // tokens_per_step)
    arguments = training.arguments(
        folder,
        steps=steps,
        warmup=min(steps, max(10, steps // 10)),
        save_every=save_every or max(1, min(100, steps // 3)),
        **({"weight_decay": 0.01} | settings),
    )
    return arguments, tokens_per_step


def uptrain(
    student,
    teacher,
    tokens: torch.Tensor,
    *,
    train_tokens: int,
    folder: Path,
    evaluation: torch.Tensor | None = None,
    length: int = 512,
    batch: int = 2,
    lr: float | None = None,
    ce_weight: float = CE_WEIGHT,
    layer_weight: float = LAYER_WEIGHT,
    trainable: str | Sequence[nn.Parameter] = "attention",
    points: int = 5,
    seed: int = 0,
    bos: bool | None = None,
    save_every: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:
    """Trains `student` in place towards `teacher` on `tokens` (N,) int64; returns a dict: tokens,
    seconds, curve (perplexity, cross-entropy and KL at a number of tokens), parent (its perplexity
    on the same tokens).

    train_tokens: the budget over all processes. folder: checkpoints; a folder with some makes the
    run go on from there. evaluation (M,) int64: what the curve is measured on, at `points` places.
    batch: windows of `length` a step and process. trainable: "attention" (what the conversion
    changed), "all", or the parameters themselves. bos: whether BOS takes the place of each window's
    first token (None: as the teacher's tokenizer does it). Documents, which the tokenizer closes
    with its end-of-text token, do not see each other. overrides: passed to TrainingArguments.
    Both models come back as `training.lent` says: while it trains, a student in half precision is
    in fp32, and is measured and given back in its own dtype."""
    require_here(student, "uptrain")
    if isinstance(trainable, str):
        check_choice("trainable", trainable, TRAINABLE)
    settings = {"disable_tqdm": True, "logging_strategy": "no", "seed": seed}
    settings |= training.placed(student) | (overrides or {})
    lr = lr or default_lr(hf.of(student))
    arguments, tokens_per_step = _schedule(
        folder, train_tokens, batch * length, batch=batch, lr=lr, save_every=save_every, **settings
    )
    steps = arguments.max_steps
    if trainable == "attention":
        trainable = [p for layer in hf.of(student) for p in layer.attention.parameters()]
    callbacks = [Steps(progress)] if progress else []
    curve = None
    with training.lent(student, teacher) as loan:
        if trainable != "all":
            loan.train_only(trainable)
        if evaluation is not None:

            def measure() -> dict:
                with loan.as_saved():
                    return compare(teacher, student, evaluation, length, bos=bos)

            curve = Curve(
                Path(folder) / "curve.json", -(-steps // points), tokens_per_step, measure
            )
            callbacks.append(curve)
        trainer = DistillationTrainer(
            model=student,
            args=arguments,
            teacher=teacher,
            ce_weight=ce_weight,
            layer_weight=layer_weight,
            callbacks=callbacks,
            train_dataset=training.TokenWindows(
                tokens,
                length,
                steps * batch * arguments.world_size,
                seed,
                bos_of(teacher, bos),
                end_of(teacher),
            ),
        )
        trainer.remove_callback(PrinterCallback)  # progress is the caller's
        start = time.perf_counter()
        training.train(trainer)
        seconds = time.perf_counter() - start
        parent = None
        if curve:
            parent = {"perplexity": perplexity(teacher, evaluation, length, bos=bos)}
    return {
        "tokens": steps * tokens_per_step,
        "seconds": seconds,
        "processes": arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "parent": parent,
        "curve": curve.points if curve else [],
    }
