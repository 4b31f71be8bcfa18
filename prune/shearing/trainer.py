"""The Trainer of shearing: learning rates by kind of parameter, and the record of the domains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from effattn.prune.shearing import batch_loading
from effattn.prune.shearing.batch_loading import Domains
from effattn.reports.files import write_text_atomic
from effattn.training import lending as training

CLIP = 1.0  # norm of the weights' gradient; that of masks and multipliers is not part of it


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

            # masks and multipliers keep their rates: they have to arrive at the target, not to
            # settle
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
        self.loan, self.module = loan, loan.model
        self.domains, self.references = domains, references
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
            # processes may differ in the last bit: the first one's weights are everybody's
            weights.add(broadcast(new.to(args.device)).cpu())
        self.points = [old for old in self.points if old["step"] < state.global_step] + [point]
        if state.is_world_process_zero:
            write_text_atomic(self.path, json.dumps(self.points))
