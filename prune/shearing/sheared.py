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
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.placement import require_here
from effattn.prune.shearing import folding
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.lagrangian import Lagrangian
from effattn.prune.shearing.masks import START, Masks, check_axes, shapes
from effattn.prune.shearing.training import Shearing, steps_of, train
from effattn.prune.structural import criteria
from effattn.prune.structural.compensation import compensate as fit_outputs
from effattn.prune.structural.compensation import output_module
from effattn.prune.structural.slicing import Keep, slice_model, sliced_config
from effattn.surgery.checkpoint import check_finite
from effattn.training import lending as training

# For the embedded model, 10 % of its pretraining: with so few tokens the parent's predictions teach
# more than the text does (perplexity 19.2 instead of 20.3). The paper has 0.4 billion, none and 50
# billion.
MASK_TOKENS, RECOVER_TOKENS, CONTINUE_TOKENS = 60_000, 1_140_000, 0
# The criterion that ranks the gates. The embedded model, cut to half and taught on 400,000 tokens
# in all: perplexity 19.75, with Taylor's scores 20.01.
WARM_START = "obs"
WINDOWS = 64  # of text that it looks at, and that output modules are solved on; at least
TOKENS_PER_INPUT = 10  # of a module that is solved
PAPER_STEPS = 3_200  # of pruning, with learning rates of 1.0 for masks and multipliers
RAMP = (
    0.2  # share of the mask stage in which the target is ramped up: the paper's 640 of 3,200 steps
)
UPDATES_PRUNING, UPDATES_AFTER = 50, 400  # steps between updates of the domain weights
NAMES = {
    "hidden": "hidden dimensions",
    "heads": "key/value heads a layer",
    "ffn": "FFN dimensions a layer",
    "layers": "layers",
}


@dataclass(frozen=True)
class Target:
    """How much of each axis stays; None leaves it as it is. heads: key/value groups a layer, with
    all their query heads (for multi-head attention a group is a head)."""

    hidden: int | None = None
    heads: int | None = None
    ffn: int | None = None
    layers: int | None = None

    def of(self, parts: hf.Anatomy) -> dict[str, int]:
        """Axis -> what stays, for the axes that get smaller. Raises ValueError, naming what can be
        reached, for what this model cannot become, and Unsupported for axes that it cannot be cut
        along."""
        sizes = {axis: shape[-1] for axis, shape in shapes(parts).items()}
        wanted = {axis: value for axis, value in asdict(self).items() if value is not None}
        check_axes(parts, [axis for axis in wanted if axis not in sizes])
        for axis, value in wanted.items():
            if type(value) is not int or not 1 <= value <= sizes[axis]:
                raise ValueError(
                    f"target: {axis}: got {value!r}, the model has {sizes[axis]} {NAMES[axis]}; "
                    "valid is "
                    f"1 to {sizes[axis]}"
                )
        smaller = {axis: value for axis, value in wanted.items() if value < sizes[axis]}
        if not smaller:
            has = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ValueError(
                f"target: got {wanted or 'nothing'}, which removes nothing from a model of {has}; "
                "valid "
                "is less of at least one"
            )
        check_axes(parts, list(smaller))
        # refuses what its config cannot say
        sliced_config(parts.model.config, _first(sizes, smaller))
        return smaller


def _first(sizes: dict[str, int], smaller: dict[str, int]) -> Keep:
    """Keeps the first of everything: for checks of a shape before it is known what will stay."""
    kept = {axis: torch.arange(smaller.get(axis, size)) for axis, size in sizes.items()}
    rows = {
        axis: [kept[axis]] * len(kept["layers"]) for axis in ("heads", "ffn") if axis in smaller
    }
    return Keep(**rows, **{axis: kept[axis] for axis in ("hidden", "layers") if axis in smaller})


def default_lr(hidden: int) -> float:
    """Peak learning rate of the weights by width: the paper's 1e-4 at 4096, more for narrower
    models, up to 3e-4.

    Higher rates undo more of what a model has learned than a short stage brings back: the embedded
    model, cut by `structured` and trained on 100,000 tokens, gets better at 2e-4, not at 5e-4, and
    worse at 1e-3; the masks' stage does better at 3e-4 than at 1.5e-3."""
    return min(3e-4, 1e-4 * 4096 / hidden)


def recover_lr(hidden: int) -> float:
    """The same for learning a teacher's predictions, which are less noisy than the text, up to 8e-4
    (the embedded model, cut to half, 1.1 million tokens: perplexity 19.65 at 3e-4, 19.23 at
    8e-4)."""
    return min(8e-4, 1e-4 * 4096 / hidden)


def scratch_lr(hidden: int) -> float:
    """The same for a model with random weights, up to 2e-3."""
    return min(2e-3, 1e-4 * 4096 / hidden)


def default_mask_lrs(steps: int, ramp: float = RAMP) -> tuple[float, float, float]:
    """Learning rates of the log alphas, of the rows' levels and of the multipliers.

    The first and the last: the paper's 1.0 for its 3,200 steps, less for fewer, since few steps
    average little noise, and multipliers that grew as fast would ask for more than the target
    before the gates could follow. A level must get from 1 to about 0 while the target is ramped up,
    and behind it soon enough (found by simulation, 50 to 200 steps)."""
    share = min(1.0, steps / PAPER_STEPS)
    return share, min(0.2, 6 / max(1.0, ramp * steps)), share


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
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
    **masking,
) -> nn.Module:
    """Shears a causal LM to `target`: returns a new, smaller, plain model in eval mode. `model` is
    used up.

    data: int64 tokens (N,), or a dict of them by domain, or `Domains`. mask_tokens, recover_tokens,
    continue_tokens: budgets of the stages: learning masks, and after cutting, learning the
    unmodified model's predictions (0: none), and the text (0: none). folder: checkpoints, from
    which the same call goes on after a kill. length, batch: tokens of a window, windows a step and
    process. lr, recover_lr, continue_lr: peak learning rates of the weights in each stage, which
    has a warm-up and a cosine to 0 (None: by width). loading: "clamped" (the paper's rule),
    "signed" (the released code's) or "fixed". masking: see `learn_masks`.

    Raises ValueError for a target, data or settings that cannot be, Unsupported for models and
    axes, all before anything is changed; FloatingPointError when training diverges."""
    require_here(model, "shear")
    domains = data if isinstance(data, Domains) else Domains(data, length)
    shared = dict(batch=batch, loading=loading, seed=seed, overrides=overrides)
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
    dtype = model.dtype
    # from here to the end: what is folded and solved for is in fp32, too
    with training.lent(model):
        references = reference_losses(model, domains)
        parent = (
            copy.deepcopy(model).eval().requires_grad_(False) if distill or compensate else None
        )

        def module_of(weights, steps: int) -> Shearing:
            masks = Masks(parts, smaller, start)
            if warm_start is not None:
                _rank(masks, parts, domains, warm_start)
            return Shearing(
                model,
                weights,
                masks,
                Lagrangian(masks, int(ramp * steps)),
                seed,
                parent if distill else None,
            )

        overrides = training.placed(model) | (overrides or {})
        defaults = default_mask_lrs(steps_of(tokens, domains.length, batch, overrides)[0], ramp)
        chosen = {
            "mask_lr": mask_lr or defaults[0],
            "level_lr": defaults[1],
            "multiplier_lr": multiplier_lr or defaults[2],
        }
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
            **chosen,
        )
        small, difference = cut(module, next(iter(domains.held_out.values()))[:1, :128])
        fitted = []
        if compensate and {"heads", "ffn"} & set(smaller) and "hidden" not in smaller:
            new = hf.of(small)
            inputs = max(
                output_module(layer, axis).in_features
                for layer in new
                for axis in ("heads", "ffn")
                if axis in smaller
            )
            batches = _calibration(domains, TOKENS_PER_INPUT * inputs)
            fitted = fit_outputs(hf.of(parent), new, folding.keep(module.masks.values), batches)
    _narrow(small, dtype)
    return small, facts | chosen | {
        "target": smaller,
        "max_logit_difference": difference,
        "compensation": fitted,
    }


def ranked_by(criterion: str, axes: Iterable[str]) -> dict[str, str]:
    """Axis -> the criterion that ranks it: this one, or Taylor's where it does not know the axis.
    Axes that neither knows are left out."""
    known = {
        name: importlib.import_module(f"effattn.prune.structural.criteria.{name}").TARGETS
        for name in (criterion, "taylor")
    }
    found = {axis: [name for name, targets in known.items() if axis in targets] for axis in axes}
    return {axis: names[0] for axis, names in found.items() if names}


def _rank(masks: Masks, parts: hf.Anatomy, domains: Domains, criterion: str) -> None:
    """Ranks the gates that a criterion knows."""
    by_axis = ranked_by(criterion, masks.own)
    for name in dict.fromkeys(by_axis.values()):
        ranked = [axis for axis in by_axis if by_axis[axis] == name]
        importance = criteria.measure(name, parts, _calibration(domains), ranked)
        for axis in ranked:
            masks.rank(axis, getattr(importance, axis))


def _calibration(domains: Domains, least: int = 0) -> list[Tensor]:
    """Windows of the domains, int64 (4 or fewer, length) each: `WINDOWS`, or `least` tokens if that
    is more, as far as there is text. As many of each: in proportion, what a rare domain needs would
    count for little (the embedded model, cut to half: perplexity 26.1, and this way 24.3)."""
    windows = max(WINDOWS, math.ceil(least / domains.length))
    batches = []
    for tokens in domains.train.values():
        count = min(math.ceil(windows / len(domains.train)), len(tokens) // domains.length)
        batches += tokens[: count * domains.length].view(-1, domains.length).split(4)
    return batches


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


@torch.no_grad()
def reference_losses(model: nn.Module, domains: Domains) -> Tensor:
    """The model's own losses on the held-out windows of each domain, (K,) fp64. Raises
    FloatingPointError naming the domain when one is not finite."""
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = domains.losses(
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, device
    )
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
