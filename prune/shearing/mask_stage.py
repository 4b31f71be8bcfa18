"""The first stage of shearing: masks and weights are learned together, then folded and cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported, check_choice
from effattn.evaluate.logits import positions_at_a_time, training_loss
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.prune.shearing import folding
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.lagrangian import Lagrangian
from effattn.prune.shearing.masks import START, Masks
from effattn.prune.shearing.ranking import calibration_windows, rank
from effattn.prune.shearing.rates import RAMP, default_lr, default_mask_lrs
from effattn.prune.shearing.target import Target
from effattn.prune.shearing.training import Shearing, steps_of, train
from effattn.prune.structural import criteria
from effattn.prune.structural.compensation import compensate as fit_outputs
from effattn.prune.structural.compensation import output_module
from effattn.prune.structural.slicing import slice_model
from effattn.surgery.checkpoint import check_finite
from effattn.training import lending as training

# For the embedded model; see `effattn.prune.shearing.sheared`. The paper has 0.4 billion.
MASK_TOKENS = 60_000
# The criterion that ranks the gates. The embedded model, cut to half and taught on 400,000 tokens
# in all: perplexity 19.75, with Taylor's scores 20.01.
WARM_START = "obs"
TOKENS_PER_INPUT = 10  # of a module that is solved
UPDATES_PRUNING = 50  # steps between updates of the domain weights


def learn_masks(
    model: nn.Module,
    target: Target,
    domains: Domains,
    *,
    tokens: int = MASK_TOKENS,
    folder: Path | None = None,
    batch: int = 4,
    lr: float | None = None,
    mask_lr: float | None = None,
    multiplier_lr: float | None = None,
    warm_start: str | None = WARM_START,
    start: float = START,
    ramp: float = RAMP,
    distill: bool = True,
    compensate: bool = True,
    loading: str = "clamped",
    every: int = UPDATES_PRUNING,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> tuple[nn.Module, dict]:
    """The first stage: masks and weights together, then folding and slicing. `model` is used up;
    returns the small model and what `train` says of the run, with "max_logit_difference" between
    the masked model and the sliced one, and "compensation", what
    `effattn.prune.structural.compensation` says.

    mask_lr, multiplier_lr: of log alphas and of the Lagrange multipliers; None: see
    `default_mask_lrs`. warm_start: a criterion of `effattn.prune.structural.criteria` whose ranking
    spreads the log alphas (`Masks.rank`; see `ranked_by`); None, and axes that no criterion knows:
    all begin at `start`, as in the paper, which takes more steps to find out what matters. ramp:
    share of the steps until the target is the whole one. every: steps between updates of the domain
    weights.

    What the paper does not do, and what few tokens need: distill: masks and weights learn the
    unmodified model's predictions, which say more a token than the text does (its predecessor does,
    CoFi, arXiv:2204.00408, section 3.2). compensate: after slicing, o_proj and the FFN's output
    module are solved again for what the unmodified model gives (not with a smaller hidden size).
    Either keeps a copy of the model."""
    parts, smaller = _checked(model, target, warm_start, ramp)
    dtype = model.dtype
    with training.lent(model):  # to the end: what is folded and solved for is in fp32, too
        references = reference_losses(model, domains)  # before anything is changed
        parent = None
        if distill or compensate:
            parent = copy.deepcopy(model).eval().requires_grad_(False)

        def module_of(weights, steps: int) -> Shearing:
            masks = Masks(parts, smaller, start)
            if warm_start is not None:
                rank(masks, parts, domains, warm_start)
            constraints = Lagrangian(masks, int(ramp * steps))
            return Shearing(model, weights, masks, constraints, seed, parent if distill else None)

        overrides = training.placed(model) | (overrides or {})
        steps, _ = steps_of(tokens, domains.length, batch, overrides)
        rates = _rates(mask_lr, multiplier_lr, default_mask_lrs(steps, ramp))
        module, facts = train(
            module_of,
            domains,
            references,
            tokens=tokens,
            folder=folder,
            batch=batch,
            lr=lr or default_lr(parts.embeddings.weight.shape[1]),
            every=every,
            rule=loading,
            seed=seed,
            progress=progress,
            overrides=overrides,
            **rates,
        )
        compared = min(128, positions_at_a_time(parts.embeddings.weight.shape[0]))
        small, difference = cut(module, next(iter(domains.held_out.values()))[:1, :compared])
        fitted = _solve_again(small, parent, module.masks, smaller, domains) if compensate else []
    _narrow(small, dtype)
    return small, facts | rates | {
        "target": smaller,
        "max_logit_difference": difference,
        "compensation": fitted,
    }


def _checked(
    model: nn.Module, target: Target, warm_start: str | None, ramp: float
) -> tuple[hf.Anatomy, dict[str, int]]:
    """The model's parts, and axis -> what stays. ValueError and Unsupported for what cannot be,
    before anything is changed."""
    require_own_weights(model)
    check_finite(model)
    require_here(model, "shear")
    parts = hf.of(model)
    if not parts.predicts_next:
        raise Unsupported(
            f"model: got {type(model).__name__}, valid is a causal LM: shearing learns next tokens"
        )
    smaller = target.of(parts)
    if warm_start is not None:
        check_choice("warm_start", warm_start, criteria.CRITERIA)
    if not 0 <= ramp <= 1:
        raise ValueError(f"ramp: got {ramp}, valid is 0 to 1 (a share of the steps)")
    return parts, smaller


def _rates(
    mask_lr: float | None, multiplier_lr: float | None, default: tuple[float, float, float]
) -> dict[str, float]:
    """Learning rates of log alphas, levels and multipliers: as given, or by default."""
    return {
        "mask_lr": mask_lr or default[0],
        "level_lr": default[1],
        "multiplier_lr": multiplier_lr or default[2],
    }


def _solve_again(
    small: nn.Module, parent: nn.Module, masks: Masks, smaller: dict[str, int], domains: Domains
) -> list[dict]:
    """Fits the output modules of `small` to what `parent` gives, in place: what
    `effattn.prune.structural.compensation` says. Nothing is fitted where no output module was cut,
    or where the hidden size, in which it would be fitted, is another."""
    new, axes = hf.of(small), [axis for axis in ("heads", "ffn") if axis in smaller]
    if not axes or "hidden" in smaller:
        return []
    inputs = max(output_module(layer, axis).in_features for layer in new for axis in axes)
    batches = calibration_windows(domains, TOKENS_PER_INPUT * inputs)
    return fit_outputs(hf.of(parent), new, folding.keep(masks.values), batches)


@torch.no_grad()
def cut(module: Shearing, ids: Tensor) -> tuple[nn.Module, float]:
    """Folds the final gates of `module` into its model and slices it. Returns the small model, in
    eval mode, and the largest difference of its logits on ids (B, T) to the masked model's.

    RuntimeError when they differ by more than rounding: then the model is not built as we think it
    is."""
    model, masks = module.model.eval(), module.masks
    parts = hf.of(model)
    masks.values = masks.settled(final=True)
    ids = ids.to(parts.embeddings.weight.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    masks.detach()
    folding.fold(parts, masks.values)
    small = slice_model(model, folding.keep(masks.values)).eval()
    difference = float(
        (small(input_ids=ids, use_cache=False).logits.float() - expected).abs().max()
    )
    if not difference <= 1e-4 * float(expected.abs().max()):
        raise RuntimeError(
            f"the sliced model gives other logits than the masked one: by up to {difference:.3g}"
        )
    return small, difference


@torch.no_grad()
def reference_losses(model: nn.Module, domains: Domains) -> Tensor:
    """The model's own losses on the held-out windows of each domain, (K,) fp64. Raises
    FloatingPointError naming the domain when one is not finite."""
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = domains.losses(lambda ids: training_loss(model, ids), device)
    for name, loss in zip(domains.names, found.tolist(), strict=True):
        if loss != loss or abs(loss) == float("inf"):
            raise FloatingPointError(
                f"the model's loss on domain {name!r} is not finite before anything was changed"
            )
    return found


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters, and not buffers: rotary frequencies stay in fp32. FloatingPointError
    for what is beyond the range of `dtype`."""
    for name, parameter in model.named_parameters():
        if wrong := training.unfit(name, parameter, dtype):
            raise FloatingPointError(wrong)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
