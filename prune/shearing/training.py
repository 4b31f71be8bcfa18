"""The training loop of both stages of shearing: HF Trainer on domains, with masks first, and plain
afterwards.

A checkpoint of it holds everything that the rest of the run depends on (weights, log alphas,
multipliers, domain weights, optimizer, place in the data), so that a killed run ends bit for bit
where an uninterrupted one does. Gates are drawn anew at every step from a generator seeded by it:
the same on every process, so that two with half the windows each do what one does with all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from effattn.errors import check_choice
from effattn.evaluate.logits import PREDICTING, Scores, training_loss
from effattn.evaluate.loss import kl_chunked
from effattn.hf import anatomy as hf
from effattn.prune.shearing import batch_loading
from effattn.prune.shearing.batch_loading import Domains, DomainWindows, LoadingWeights
from effattn.prune.shearing.lagrangian import Lagrangian
from effattn.prune.shearing.masks import Masks
from effattn.prune.shearing.trainer import Loading, ShearTrainer
from effattn.training import lending as training
from effattn.training.uptrain import Steps


class Shearing(nn.Module):
    """What is trained: a causal LM, the history of the domain weights, and while pruning masks and
    constraints.

    teacher: a model whose predictions are then learned instead of the text; it is never trained or
    saved."""

    # the Trainer asks for it where names are missing: those of tied weights
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        model: nn.Module,
        weights: LoadingWeights,
        masks: Masks | None = None,
        constraints: Lagrangian | None = None,
        seed: int = 0,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        self.model, self.weights, self.masks, self.constraints = model, weights, masks, constraints
        self.seed, self.step = seed, 0
        # a list's are no submodules, so no part of checkpoints
        self.teachers = [] if teacher is None else [teacher]
        if masks is not None:
            masks.attach(hf.of(model))
        self.register_state_dict_post_hook(_each_tensor_once)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """input_ids, position_ids (B, T) int64; these restart where a document begins. "loss":
        cross-entropy in nats a token; while training with the penalty, and with a teacher
        KL(teacher || model) in its place."""
        if self.masks is not None:
            # one draw for all windows of a step, of every process: see the module's docstring
            if self.training:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
                self.masks.values = self.masks.draw(generator)
            else:
                self.masks.values = self.masks.settled()
        loss = self._loss(input_ids, position_ids)
        if self.constraints is not None and self.training:
            loss = loss + self.constraints(self.masks.removed(), self.step)
        return {"loss": loss}

    def _loss(self, ids: Tensor, places: Tensor | None) -> Tensor:
        call = {} if places is None else {"position_ids": places}
        if not (self.teachers and self.training):
            return training_loss(self.model, ids, **call)
        with torch.no_grad():
            theirs = Scores.of(self.teachers[0], ids, PREDICTING, **call)
        ours = Scores.of(self.model, ids, PREDICTING, **call)

        def divergence(logits: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                taught = theirs.logits(at)
            return kl_chunked(taught, logits)

        return torch.cat([*ours.each(divergence)]).mean()


def _each_tensor_once(module: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    """Tied weights under their first name only: safetensors refuses more."""
    seen: set[tuple] = set()
    for name in list(state):
        key = (state[name].data_ptr(), state[name].shape)
        if state[name].numel() and key in seen:
            del state[name]
        seen.add(key)


def steps_of(
    tokens: int, length: int, batch: int, overrides: dict | None = None
) -> tuple[int, int]:
    """(steps, windows a step) of a budget of tokens over all processes. ValueError when it is less
    than one step.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = training.arguments(
            scratch, steps=1, batch=batch, lr=1.0, warmup=0, save_every=1, **(overrides or {})
        )
    per_step = batch * probe.world_size * probe.gradient_accumulation_steps
    steps = tokens // (per_step * length)
    if steps < 1:
        raise ValueError(f"tokens: got {tokens:,}, one step takes {per_step * length:,}")
    return steps, per_step


def train(
    module_of: Callable[[LoadingWeights, int], Shearing],
    domains: Domains,
    references: Tensor,
    *,
    tokens: int,
    folder: Path | None,
    batch: int,
    lr: float,
    mask_lr: float = 0.0,
    level_lr: float = 0.0,
    multiplier_lr: float = 0.0,
    warmup: int | None = None,
    every: int,
    rule: str = "clamped",
    weight_decay: float = 0.1,
    save_every: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> tuple[Shearing, dict]:
    """Trains what `module_of(domain weights, steps)` makes; returns it and {"tokens", "steps",
    "seconds", "processes", "learning_rate", "domains", "references", "record"}.

    tokens: the budget over all processes; batch: windows a step and process; every: steps between
    updates of the domain weights, at most. folder: checkpoints, from which a run goes on; None:
    none are written."""
    check_choice("loading", rule, batch_loading.RULES)
    overrides = overrides or {}
    scratch = tempfile.TemporaryDirectory() if folder is None else nullcontext(folder)
    with scratch as place:
        steps, per_step = steps_of(tokens, domains.length, batch, overrides)
        every = max(1, min(every, steps // 8))
        arguments = _arguments(
            place,
            steps,
            batch=batch,
            lr=lr,
            warmup=warmup,
            save_every=save_every,
            weight_decay=weight_decay,
            seed=seed,
            checkpoints=folder is not None,
            overrides=overrides,
        )
        module = module_of(LoadingWeights(domains.proportions, steps // every), steps)
        windows = DomainWindows(domains, module.weights, steps, per_step, every, seed)
        with training.lent(module, *module.teachers) as loan:
            loading = Loading(
                loan,
                domains,
                references,
                every=every,
                rule=rule,
                path=Path(place) / "record.json",
                tokens_per_step=per_step * domains.length,
            )
            trainer = ShearTrainer(
                model=module,
                args=arguments,
                train_dataset=windows,
                callbacks=[loading, *([Steps(progress)] if progress else [])],
                **dict(mask_lr=mask_lr, level_lr=level_lr, multiplier_lr=multiplier_lr),
            )
            trainer.remove_callback(PrinterCallback)  # progress is the caller's
            start = time.perf_counter()
            training.train(trainer)
            seconds = time.perf_counter() - start
    return module, {
        "tokens": steps * per_step * domains.length,
        "steps": steps,
        "seconds": round(seconds, 3),
        "processes": arguments.world_size,
        "learning_rate": lr,
        "domains": domains.names,
        "references": references.tolist(),
        "every": every,
        "loading": rule,
        "record": loading.points,
    }


def _arguments(
    place: Path | str,
    steps: int,
    *,
    batch: int,
    lr: float,
    warmup: int | None,
    save_every: int | None,
    weight_decay: float,
    seed: int,
    checkpoints: bool,
    overrides: dict,
):
    """The Trainer's arguments for a run of `steps` that writes into `place`."""
    settings = {
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": seed,
        "weight_decay": weight_decay,
        "max_grad_norm": 0.0,  # `Loading` clips the model's own gradients, not the masks'
        **overrides,
    }
    if not checkpoints:
        settings["save_strategy"] = "no"
    return training.arguments(
        Path(place),
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=max(1, steps // 20) if warmup is None else warmup,
        save_every=save_every or max(1, min(100, steps // 3)),
        **settings,
    )
