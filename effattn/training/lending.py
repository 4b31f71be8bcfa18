"""What every training job here shares: windows of a token stream, and the HF Trainer's settings.

Training always goes through `transformers.Trainer`, so that `accelerate launch` or `torchrun`
spreads it over processes and a killed run resumes exactly (optimizer, scheduler, random state,
place in the data).

A Trainer leaves a lot behind on what it trains: autocast around `forward`, flags, a changed config.
`lent` takes all of it off again, and holds half-precision weights in fp32 meanwhile:

    with training.lent(student, teacher) as loan:
        loan.train_only(parameters)
        training.train(Trainer(model=student, ...))
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import Dataset

from effattn.encoding import begun
from effattn.resuming import newest_complete

if TYPE_CHECKING:  # at its first use otherwise: it takes 150 MB
    from transformers import Trainer, TrainingArguments

# what `uptrain` trains, by name; here, so that a wrong one is refused before the Trainer is loaded
TRAINABLE = ("attention", "all")


class TokenWindows(Dataset):
    """`count` training windows of `length` tokens from `tokens` (N,) int64, packed end to end.

    Window i is a pure function of (i, seed): pass e over the stream uses its own random offset and
    its own order, so every token is seen once before any is seen twice, whatever process asks for
    it. bos: the token that takes the place of each one's first. end: the token that closes a
    document; windows then have "position_ids" that begin anew behind it, so that the documents in a
    window do not see each other (None: a window is one text)."""

    def __init__(
        self,
        tokens: torch.Tensor,
        length: int,
        count: int,
        seed: int = 0,
        bos: int | None = None,
        end: int | None = None,
    ):
        if len(tokens) < 2 * length:
            raise ValueError(
                f"tokens: got {len(tokens):,}, windows of {length} need at least {2 * length:,}"
            )
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.bos, self.end = bos, end
        self.per_pass = len(tokens) // length - 1  # one less: the offset takes up to a window
        self._order: tuple[int, int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # nothing but the index and the seed decides, so that a resumed run, or one on other
        # processes, sees the same windows; the order of the present pass is kept
        epoch, place = divmod(index, self.per_pass)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(self.length, (), generator=generator))
            self._order = (epoch, offset, torch.randperm(self.per_pass, generator=generator))
        _, offset, order = self._order
        start = offset + int(order[place]) * self.length
        window = begun(self.tokens[start : start + self.length], self.bos)
        batch = {"input_ids": window, "labels": window}
        return batch if self.end is None else batch | {"position_ids": places(window, self.end)}


def places(window: torch.Tensor, end: int) -> torch.Tensor:
    """The position of each token of a window (T,) in its document, of which each but the last is
    closed by `end`: int64 (T,)."""
    at = torch.arange(len(window))
    begins = torch.zeros_like(at)
    begins[1:] = torch.where(window[:-1] == end, at[1:], 0)
    return at - begins.cummax(0).values


def bf16_pays(on_cpu: bool | None = None) -> bool:
    """Whether bf16 matrix products are native (elsewhere they are emulated, and slow): on the CPU,
    or on the GPU (None: if there is one)."""
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def arguments(
    output: Path, *, steps: int, batch: int, lr: float, warmup: int, save_every: int, **overrides
) -> TrainingArguments:
    """The Trainer settings that all jobs share; `overrides` go to `TrainingArguments` as they
    are.
    """
    from transformers import TrainingArguments

    # asked for bf16, it needs to be told
    on_cpu = overrides.setdefault("use_cpu", not torch.cuda.is_available())
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
        bf16=bf16_pays(on_cpu),
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


def placed(model: nn.Module) -> dict[str, bool]:
    """The setting that makes a Trainer leave `model` where it is: on the CPU, or on this process's
    GPU.
    """
    return {"use_cpu": next(model.parameters()).device.type == "cpu"}


def train(trainer: Trainer) -> None:
    """Runs `trainer`, going on from the newest complete checkpoint in its output folder if there is
    one.
    """
    arguments = trainer.args
    last = newest_complete(
        Path(arguments.output_dir), arguments.world_size, clean=trainer.is_world_process_zero()
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))


# ---- a model in a Trainer's hands
# -----------------------------------------------------------------------------------

HALF = (torch.float16, torch.bfloat16)
# What a Trainer, accelerate and transformers set on the modules that they train, and on configs.
ON_MODULES = (
    "forward",
    "_original_forward",
    "_is_accelerate_prepared",
    "_compiled_call_impl",
    "training",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)
ON_CONFIGS = ("use_cache", "dtype")


@contextmanager
def lent(
    model: nn.Module, *teachers: nn.Module | None, frozen_stays: bool = True
) -> Iterator[Loan]:
    """Everything that trains `model` does it inside: afterwards, also after an error or Ctrl-C,
    `model` and `teachers` have their own `forward`, flags (training, requires_grad), settings and
    dtypes again, and no gradients.

    fp16 and bf16 weights are fp32 while lent, since steps are too small for them and Adam's epsilon
    is 0 in fp16: the whole of `model` takes 4 bytes a weight, besides what the optimizer needs;
    teachers stay as they are. With LoRA, what is frozen in bf16 stays so (fp16 has too little range
    for gradients), unless `frozen_stays` is False: where embeddings or norms are trained beneath,
    what is between them has to take their dtype.

    Raises FloatingPointError, naming a parameter, when training ends with weights that are not
    finite, or that the dtype they came in cannot hold: they are left in fp32 then."""
    others = [teacher for teacher in teachers if teacher is not None]
    loan = Loan(model, others, frozen_stays)
    try:
        loan.begin()
        yield loan
    except BaseException:
        loan.end()
        raise
    if wrong := loan.end():
        raise FloatingPointError(wrong)


class Loan:
    """What `lent` yields: half-precision parameters of `model` are in fp32 from `begin` to
    `end`.
    """

    def __init__(self, model: nn.Module, teachers: list[nn.Module], frozen_stays: bool = True):
        self.model, self.frozen_stays = model, frozen_stays
        self.before = Settings(model, *teachers)
        self.dtypes = {parameter: parameter.dtype for parameter in model.parameters()}

    def begin(self) -> None:
        """Makes the masters. It may run out of memory half-way, after which `end` is right, too."""
        # `data` is replaced and the parameters stay the same objects: optimizers, ties and hooks
        # hold them. Adapters cast what they get, so that frozen bf16 can stay beneath.
        low_rank = self.frozen_stays and hasattr(self.model, "peft_config")
        for parameter, dtype in self.dtypes.items():
            parameter.grad = None
            stays = low_rank and dtype == torch.bfloat16 and not parameter.requires_grad
            if dtype in HALF and not stays:
                parameter.data = parameter.data.float()

    def train_only(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freezes all others of the model."""
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """While open, the model computes what it will when it is given back, in eval mode: what is
        measured while it trains is what is saved."""
        lent, masters = (
            Settings(self.model),
            {parameter: parameter.data for parameter in self.dtypes},
        )
        try:
            self.before.put_back()
            self.model.eval()
            for parameter, dtype in self.dtypes.items():
                parameter.data = parameter.data.to(dtype)
            yield
        finally:
            for parameter, data in masters.items():
                parameter.data = data
            lent.put_back()

    def end(self) -> str | None:
        """Puts everything back; returns what is wrong with the weights, if anything."""
        wrong = self._wrong()
        # embeddings that were made to ask for gradients have a hook for it
        for module in self.model.modules():
            new = "_require_grads_hooks" not in self.before.modules.get(module, ())
            for handle in vars(module).get("_require_grads_hooks", ()) if new else ():
                handle.remove()
        self.before.put_back()
        for parameter, dtype in self.dtypes.items():
            parameter.grad = None
            if not wrong:
                parameter.data = parameter.data.to(dtype)
        return wrong

    def _wrong(self) -> str | None:
        trained = (
            (name, p)
            for name, p in self.model.named_parameters()
            if p.requires_grad and p in self.dtypes
        )
        found = (unfit(name, parameter, self.dtypes[parameter]) for name, parameter in trained)
        return next((wrong for wrong in found if wrong), None)


def unfit(name: str, values: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the trained `values` of a parameter cannot be given back in `dtype`; None: they can."""
    values = values.detach()
    if not torch.isfinite(values).all():
        return f"training: {name} is not finite any more; lower the learning rate"
    if dtype in HALF and not torch.isfinite(values.to(dtype)).all():
        return (
            f"training: {name} has come to {float(values.abs().max()):.3g}, beyond {dtype}, which "
            f"holds up to {torch.finfo(dtype).max:.3g}; lower the learning rate, or load the "
            "model in float32"
        )
    return None


class Settings:
    """What can be set on a model besides the values of its weights, as it was when this was
    made.
    """

    def __init__(self, *models: nn.Module):
        every = {module: None for model in models for module in model.modules()}
        configs = {
            id(module.config): module.config for module in every if hasattr(module, "config")
        }
        self.modules = {module: _chosen(module, ON_MODULES) for module in every}
        self.configs = [(config, _chosen(config, ON_CONFIGS)) for config in configs.values()]
        self.trained = {
            parameter: parameter.requires_grad
            for model in models
            for parameter in model.parameters()
        }

    def put_back(self) -> None:
        """Sets everything as it was when it was noted."""
        for module, settings in self.modules.items():
            _set(module, ON_MODULES, settings)
        for config, settings in self.configs:
            _set(config, ON_CONFIGS, settings)
        for parameter, trained in self.trained.items():
            parameter.requires_grad_(trained)


@torch.no_grad()
def rehearse(model: nn.Module) -> None:
    """Two tokens in training mode: raises what training would, before anything is measured for
    it.
    """
    settings = Settings(model)
    try:
        ids = torch.zeros(
            1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device
        )
        model.train()(input_ids=ids, use_cache=False)
    finally:
        settings.put_back()


def _chosen(thing: object, names: tuple[str, ...]) -> dict[str, object]:
    return {name: vars(thing)[name] for name in names if name in vars(thing)}


def _set(thing: object, names: tuple[str, ...], settings: dict[str, object]) -> None:
    """Attributes of the object itself, past `__setattr__`: those of `settings`, and no others of
    `names`.
    """
    for name in names:
        vars(thing).pop(name, None)
    vars(thing).update(settings)
