"""The training loop of both stages of shearing: HF Trainer on domains, with masks first, and plain
afterwards.

A checkpoint of it holds everything that the rest of the run depends on (weights, log alphas,
multipliers, domain weights, optimizer, place in the data), so that a killed run ends bit for bit
where an uninterrupted one does. Gates are drawn anew at every step from a generator seeded by it:
the same on every process, so that two with half the windows each do what one does with all."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback

from effattn.errors import check_choice
from effattn.hf import anatomy as hf
from effattn.prune.shearing import batch_loading
from effattn.prune.shearing.batch_loading import Domains, DomainWindows, LoadingWeights
from effattn.prune.shearing.lagrangian import Lagrangian
from effattn.prune.shearing.masks import Masks
from effattn.reports.files import write_text_atomic
from effattn.training import lending as training
from effattn.training.uptrain import Steps

CLIP = 1.0  # norm of the weights' gradient; that of masks and multipliers is not part of it


class Shearing(nn.Module):
    """What is trained: a causal LM, the history of the domain weights, and while pruning masks and
    constraints.

    teacher: a model whose predictions are then learned instead of the text; it is never trained or
    saved."""

    _keys_to_ignore_on_save = (
        None  # the Trainer asks for it where names are missing: those of tied weights
    )

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

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids (B, T) int64. "loss": cross-entropy in nats a token; while training with the
        penalty, and with a teacher KL(teacher || model) in its place."""
        if self.masks is not None:
            if self.training:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
                self.masks.values = self.masks.draw(generator)
            else:
                self.masks.values = self.masks.settled()
        loss = self._loss(input_ids)
        if self.constraints is not None and self.training:
            loss = loss + self.constraints(self.masks.removed(), self.step)
        return {"loss": loss}

    def _loss(self, ids: Tensor) -> Tensor:
        if not (self.teachers and self.training):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        with torch.no_grad():
            taught = (
                self.teachers[0](input_ids=ids, use_cache=False)
                .logits[:, :-1]
                .float()
                .log_softmax(-1)
            )
        learned = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return F.kl_div(
            learned.flatten(0, 1), taught.flatten(0, 1), reduction="batchmean", log_target=True
        )


def _each_tensor_once(module: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    """Tied weights under their first name only: safetensors refuses more."""
    seen: set[tuple] = set()
    for name in list(state):
        key = (state[name].data_ptr(), state[name].shape)
        if state[name].numel() and key in seen:
            del state[name]
        seen.add(key)


class ShearTrainer(Trainer):
    """A Trainer with learning rates of their own for masks and multipliers, which follow no
    schedule; that of the weights has a warm-up and a cosine to 0."""

    def __init__(self, *args, mask_lr: float, level_lr: float, multiplier_lr: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.mask_lr, self.level_lr, self.multiplier_lr = mask_lr, level_lr, multiplier_lr

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            module = self.model
            decayed = set(self.get_decay_parameter_names(module))
            groups = [
                {"params": [], "weight_decay": self.args.weight_decay},
                {"params": [], "weight_decay": 0.0},
            ]
            for name, parameter in module.model.named_parameters():
                groups[f"model.{name}" not in decayed]["params"].append(parameter)
            if module.masks is not None:
                own = (
                    (module.masks.own, self.mask_lr),
                    (module.masks.level, self.level_lr),
                    (module.constraints, self.multiplier_lr),
                )
                groups += [
                    {"params": list(part.parameters()), "weight_decay": 0.0, "lr": lr}
                    for part, lr in own
                ]
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)

            def weights(step: int) -> float:
                if step < warmup:
                    return (step + 1) / warmup
                share = (step - warmup) / max(1, num_training_steps - warmup)
                return 0.5 + 0.5 * math.cos(math.pi * share)

            rules = [weights, weights] + [lambda step: 1.0] * (len(optimizer.param_groups) - 2)
            self.lr_scheduler, self._created_lr_scheduler = LambdaLR(optimizer, rules), True
        return self.lr_scheduler


class Loading(TrainerCallback):
    """Measures the domains' held-out losses every so many steps, updates their weights, and keeps
    the record.
    """

    def __init__(
        self,
        loan: training.Loan,
        domains: Domains,
        references: Tensor,
        *,
        every: int,
        rule: str,
        path: Path,
        tokens_per_step: int,
    ):
        self.loan, self.module, self.domains, self.references = (
            loan,
            loan.model,
            domains,
            references,
        )
        self.every, self.rule, self.path, self.tokens_per_step = every, rule, path, tokens_per_step
        self.points: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def on_train_begin(self, args, state, control, **kwargs):
        self.points = [point for point in self.points if point["step"] <= state.global_step]
        if state.global_step == 0:
            self._add(args, state, change=False)

    def on_step_begin(self, args, state, control, **kwargs):
        self.module.step = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), CLIP)

    def on_step_end(self, args, state, control, **kwargs):
        if self.module.masks is not None:
            self.module.masks.clamp()
        self.module.step = state.global_step
        last = state.global_step == state.max_steps
        if last or state.global_step % self.every == 0:
            self._add(args, state, change=not last)

    def _add(self, args, state, change: bool) -> None:
        module, weights = self.module, self.module.weights
        with self.loan.as_saved():
            losses = self.domains.losses(lambda ids: module(ids)["loss"], args.device)
        if not torch.isfinite(losses).all():
            worst = self.domains.names[int((~torch.isfinite(losses)).int().argmax())]
            raise FloatingPointError(
                f"the loss on domain {worst!r} is not finite after step {state.global_step}: "
                "lower the learning rates"
            )
        point = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "losses": losses.tolist(),
            "weights": weights.now.tolist(),
        }
        if module.masks is not None:
            with torch.no_grad():
                removed = module.masks.removed()
            point["removed"] = {axis: float(share.mean()) for axis, share in removed.items()}
            point["target"] = module.constraints.targets(state.global_step)
        if change:
            new = batch_loading.update(weights.now, losses, self.references, self.rule)
            # processes may differ in the last bit
            weights.add(broadcast(new.to(args.device)).cpu())
        self.points = [old for old in self.points if old["step"] < state.global_step] + [point]
        if state.is_world_process_zero:
            write_text_atomic(self.path, json.dumps(self.points))


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
    settings = {
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": seed,
        "weight_decay": weight_decay,
    }
    settings |= {"max_grad_norm": 0.0} | (overrides or {})
    scratch = tempfile.TemporaryDirectory() if folder is None else nullcontext(folder)
    with scratch as place:
        place = Path(place)
        steps, per_step = steps_of(tokens, domains.length, batch, overrides)
        every = max(1, min(every, steps // 8))
        if folder is None:
            settings["save_strategy"] = "no"
        arguments = training.arguments(
            place,
            steps=steps,
            batch=batch,
            lr=lr,
            warmup=max(1, steps // 20) if warmup is None else warmup,
            save_every=save_every or max(1, min(100, steps // 3)),
            **settings,
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
                path=place / "record.json",
                tokens_per_step=per_step * domains.length,
            )
            trainer = ShearTrainer(
                model=module,
                args=arguments,
                train_dataset=windows,
                mask_lr=mask_lr,
                level_lr=level_lr,
                multiplier_lr=multiplier_lr,
                callbacks=[loading, *([Steps(progress)] if progress else [])],
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
