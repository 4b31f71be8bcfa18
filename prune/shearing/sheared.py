"""Sheared LLaMA: learn which parts of a model to keep, cut it to exactly a target shape, and train
on.

    target = effattn.prune.Target(heads=4, ffn=352)
    small = effattn.prune.shear(model, target=target, data={"code": a, "prose": b})

Xia, Gao, Zeng and Chen, "Sheared LLaMA: accelerating language model pre-training via structured
pruning", arXiv:2310.06694. Masks over hidden dimensions, heads, FFN dimensions and layers are
learned together with the weights under constraints on the shape, then folded into the weights and
cut away; the result is a plain transformers model. What is left may first learn the unmodified
model's predictions (`recover_tokens`), and then the text alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effattn.hf.beginning import bos_of, end_of
from effattn.hf.placement import require_here
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.mask_stage import MASK_TOKENS, learn_masks
from effattn.prune.shearing.rates import default_lr, recover_lr
from effattn.prune.shearing.target import Target
from effattn.prune.shearing.training import Shearing, train
from effattn.training import lending as training

# For the embedded model, 10 % of its pretraining, `MASK_TOKENS` included: with so few tokens the
# parent's predictions teach more than the text does (perplexity 19.2 instead of 20.3). The paper
# has none and 50 billion.
RECOVER_TOKENS, CONTINUE_TOKENS = 1_140_000, 0
UPDATES_AFTER = 400  # steps between updates of the domain weights


def shear(
    model: nn.Module,
    target: Target,
    data: Domains | Mapping[str, Tensor] | Tensor,
    *,
    mask_tokens: int = MASK_TOKENS,
    recover_tokens: int = RECOVER_TOKENS,
    continue_tokens: int = CONTINUE_TOKENS,
    folder: Path | str | None = None,
    length: int = 512,
    batch: int = 4,
    lr: float | None = None,
    recover_lr: float | None = None,
    continue_lr: float | None = None,
    loading: str = "clamped",
    seed: int = 0,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
    **masking,
) -> nn.Module:
    """Shears a causal LM to `target`: returns a new, smaller, plain model in eval mode. `model` is
    used up. Source: Sheared LLaMA, arXiv:2310.06694.

    data: int64 tokens (N,), or a dict of them by domain, or `Domains`. mask_tokens, recover_tokens,
    continue_tokens: budgets of the stages: learning masks, and after cutting, learning the
    unmodified model's predictions (0: none), and the text (0: none). folder: checkpoints, from
    which the same call goes on after a kill. length, batch: tokens of a window, windows a step and
    process. lr, recover_lr, continue_lr: peak learning rates of the weights in each stage, which
    has a warm-up and a cosine to 0 (None: by width). loading: "clamped" (the paper's rule),
    "signed" (the released code's) or "fixed". bos: whether BOS takes the place of each window's
    first token (None: as the model's tokenizer does it); `Domains` have their own. masking: see
    `learn_masks`.

    Raises ValueError for a target, data or settings that cannot be, Unsupported for models and
    axes, all before anything is changed; FloatingPointError when training diverges."""
    require_here(model, "shear")
    domains = data
    if not isinstance(data, Domains):
        domains = Domains(data, length, bos=bos_of(model, bos), end=end_of(model))
    shared: dict[str, Any] = dict(batch=batch, loading=loading, seed=seed, overrides=overrides)
    folders = {
        name: None if folder is None else Path(folder) / name
        for name in ("masks", "recovered", "continued")
    }
    teacher = copy.deepcopy(model).eval() if recover_tokens else None
    small, facts = learn_masks(
        model,
        target,
        domains,
        tokens=mask_tokens,
        folder=folders["masks"],
        lr=lr,
        progress=progress,
        **shared,
        **masking,
    )
    references = torch.tensor(facts["references"], dtype=torch.float64)
    for name, tokens, rate, learned in (
        ("recovered", recover_tokens, recover_lr, teacher),
        ("continued", continue_tokens, continue_lr, None),
    ):
        if tokens:
            continue_training(
                small,
                domains,
                references,
                tokens=tokens,
                folder=folders[name],
                lr=rate,
                teacher=learned,
                progress=progress,
                **shared,
            )
    return small


def continue_training(
    model: nn.Module,
    domains: Domains,
    references: Tensor,
    *,
    tokens: int = CONTINUE_TOKENS,
    folder: Path | None = None,
    batch: int = 4,
    lr: float | None = None,
    loading: str = "clamped",
    every: int = UPDATES_AFTER,
    seed: int = 0,
    teacher: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:
    """A stage after cutting, in place, with a warm-up and a cosine to 0: learns the predictions of
    `teacher`, or without one the text, which is plain language modelling. references (K,): the
    domains' losses that the weights are steered by. Returns what `train` says."""
    by_width = default_lr if teacher is None else recover_lr
    _, facts = train(
        lambda weights, steps: Shearing(model, weights, seed=seed, teacher=teacher),
        domains,
        references,
        tokens=tokens,
        folder=folder,
        batch=batch,
        lr=lr or by_width(model.get_input_embeddings().weight.shape[1]),
        every=every,
        rule=loading,
        seed=seed + (1 if teacher is None else 2),
        progress=progress,
        overrides=training.placed(model) | (overrides or {}),
    )
    return facts
