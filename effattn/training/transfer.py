"""Attention transfer: every layer's attention learns to give what the parent's attention gives.

The first stage of LoLCATs (arXiv:2410.10254, section 3.1), for any backend and for structured
projections: the parent runs over the text, each of its attention modules' inputs also go through
the student's, and the loss is how far the two outputs are apart. Layers do not see each other's
errors and can all learn at once, in one pass of the parent; no logits are made. Training is the HF
Trainer, so that `accelerate launch` spreads it and a killed run goes on.

B: rows; T: tokens; L: layers; D: hidden size."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from effattn.calibration.layerwise import windows
from effattn.errors import check_choice
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.beginning import bos_of, end_of
from effattn.hf.placement import input_device, require_here
from effattn.training import lending as training
from effattn.training.uptrain import Steps

TRAINABLE = ("attention", "maps")


def output_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs|^2 / |theirs|^2, each summed over everything: a 0-d fp32 tensor. 1.0 is what
    zeros would get.
    """
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12)


class AttentionTransfer(nn.Module):
    """The student's attention modules, as one module whose forward gives {"loss", "layers"} on a
    batch of token ids.

    student, teacher: two causal LMs with the same layers. Only the student's attention modules are
    parts of this one."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.attention = nn.ModuleList(layer.attention for layer in hf.of(student))
        self._teacher = (hf.of(teacher.eval()),)  # in a tuple: not a part

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """input_ids (B, T) int64; position_ids (B, T) restart where a document begins. "layers"
        (L,): `output_distance` by layer; "loss": their mean."""
        found: list[Tensor] = []
        with self._compared(found), torch.no_grad():
            self._teacher[0].model.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            )
        layers = torch.stack(found)
        return {"loss": layers.mean(), "layers": layers.detach()}

    @contextmanager
    def _compared(self, found: list[Tensor]):
        handles = []
        for layer, ours in zip(self._teacher[0], self.attention, strict=True):

            def compare(module, args, kwargs, output, ours=ours):
                # The student is lent, so in fp32, where the teacher may be in half precision. The
                # mask is the teacher's implementation's; windows are not padded, so that swapped
                # attention, which tells documents by position_ids, needs none.
                own, kwargs = next(ours.parameters()).dtype, dict(kwargs)
                if ours.config._attn_implementation != module.config._attn_implementation:
                    kwargs["attention_mask"] = None
                args, kwargs = _in_dtype((args, kwargs), own)
                with torch.set_grad_enabled(self.training):
                    got = ours(*args, **kwargs)
                    found.append(
                        output_distance(
                            *(x[0] if isinstance(x, tuple) else x for x in (got, output))
                        )
                    )

            handles.append(layer.attention.register_forward_hook(compare, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_dtype(given, dtype: torch.dtype):
    """`given`, in whatever tuples and dicts, with its floating-point tensors in `dtype`."""
    if isinstance(given, tuple):
        return tuple(_in_dtype(part, dtype) for part in given)
    if isinstance(given, dict):
        return {name: _in_dtype(part, dtype) for name, part in given.items()}
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


@torch.no_grad()
def distances(student: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> list[float]:
    """Mean `output_distance` of each layer over batches of token ids (B, T)."""
    device = input_device(student)
    settings = training.Settings(student, teacher)
    try:
        both = AttentionTransfer(student, teacher).eval()
        return torch.stack([both(batch.to(device))["layers"] for batch in batches]).mean(0).tolist()
    finally:
        settings.put_back()


def learnable(student: nn.Module, layers: list[int], which: str) -> list[nn.Parameter]:
    """The parameters that transfer trains in the attention modules of `layers`: all of "attention",
    or only the "maps" that a backend brought. ValueError when there are none."""
    check_choice("transfer_trainable", which, TRAINABLE)
    found: list[nn.Parameter] = []
    for layer in hf.of(student):
        if layer.index in layers:
            part = (
                layer.attention
                if which == "attention"
                else layer.attention._modules.get(hooks.PATTERN)
            )
            found += [] if part is None else list(part.parameters())
    if not found:
        raise ValueError(
            f"transfer_trainable: got {which!r}, but the swapped layers have no such parameters; "
            "valid is 'attention'"
        )
    return found


def transfer(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    *,
    layers: list[int],
    train_tokens: int,
    folder: Path,
    length: int = 512,
    batch: int = 2,
    lr: float = 3e-3,
    trainable: str = "attention",
    seed: int = 0,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:
    """Trains the attention of `layers` of `student` in place; returns {"tokens", "seconds",
    "before", "after"}, where the last two are each layer's `output_distance` on the first windows
    of `tokens` (N,) int64.

    folder: checkpoints; a folder with some makes the run go on from there. bos: as for
    `uptrain`. Raises ValueError for bad settings."""
    require_here(student, "transfer")
    chosen = learnable(student, layers, trainable)
    settings = {"disable_tqdm": True, "logging_strategy": "no", "seed": seed}
    settings |= training.placed(student) | (overrides or {})
    # how many processes there are, only the Trainer's settings know; steps follow from that
    probe = training.arguments(
        folder, steps=1, batch=batch, lr=1.0, warmup=0, save_every=1, **settings
    )
    tokens_per_step = batch * length * probe.world_size
    steps = max(1, train_tokens // tokens_per_step)
    arguments = training.arguments(
        folder,
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=min(steps, max(5, steps // 20)),
        save_every=max(1, min(100, steps // 3)),
        **({"weight_decay": 0.0} | settings),
    )
    beginning = bos_of(teacher, bos)
    sample = windows(tokens[: 4 * length], length, 2, beginning)
    before = distances(student, teacher.to(arguments.device), sample)
    attention = nn.ModuleList(layer.attention for layer in hf.of(student))
    with training.lent(attention, teacher) as loan:
        loan.train_only(chosen)
        trainer = Trainer(
            model=AttentionTransfer(student, teacher),
            args=arguments,
            callbacks=[Steps(progress)] if progress else [],
            train_dataset=training.TokenWindows(
                tokens,
                length,
                steps * batch * arguments.world_size,
                seed,
                beginning,
                end_of(teacher),
            ),
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)  # progress is the caller's
        start = time.perf_counter()
        training.train(trainer)
        seconds = time.perf_counter() - start
    return {
        "tokens": steps * tokens_per_step,
        "seconds": round(seconds, 3),
        "learning_rate": lr,
        "trainable": trainable,
        "parameters": sum(p.numel() for p in chosen),
        "before": before,
        "after": distances(student, teacher, sample),
    }
