"""A short fine-tuning of a model whose rule is in its config already, at long positions.

By default windows are no longer than the trained length and their positions are drawn from the
target's (PoSE), so that tuning for 32k tokens costs what tuning at the trained length costs; or
whole windows of the target length; or segments that follow each other, with a memory of those
before (`effattn.training.segments`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from effattn import registry
from effattn.evaluate.logits import training_loss
from effattn.hf.beginning import bos_of, end_of
from effattn.position_sampling import SampledPositions
from effattn.surgery.attaching import detach, require_own_attention
from effattn.surgery.record import mark
from effattn.surgery.swapping import swap
from effattn.training import lending as training
from effattn.training.lora import adapters
from effattn.training.segments import CarriedMemory, Segments, stacked
from effattn.training.uptrain import Curve, Steps


def default_lr(width: int) -> float:
    """Peak learning rate by width: 6e-4 up to 256, 2e-5 (YaRN's) at 4096."""
    return 6e-4 * min(1.0, 256 / width) ** 1.25


def check_pattern(argument: str, spec: str) -> None:
    """ValueError for a pattern that dense attention cannot take over from, once it was trained
    with."""
    try:
        backend = registry.backend(spec)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    traits, learns = backend.traits, any(True for _ in backend.parameters())
    if not (traits.exact and traits.causal) or traits.learned or learns:
        raise ValueError(
            f"{argument}: got {spec!r}, and dense attention is to take over; valid is a pattern "
            "that is exact, causal and has nothing to learn, such as 's2(block=1024)'"
        )


def tune(
    model,
    tokens: Tensor,
    *,
    target: int,
    window: int,
    train_tokens: int,
    folder: Path,
    sampling: str | None = "pose",
    memory: str | None = None,
    batch: int = 1,
    lr: float | None = None,
    lora: int = 0,
    lora_plus: bool = False,
    seed: int = 0,
    bos: bool | None = None,
    save_every: int | None = None,
    evaluate: Callable[[], dict] | None = None,
    points: int = 6,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:
    """Trains `model` in place on next tokens of `tokens` (N,) int64; returns {"tokens", "steps",
    "seconds", "speed" ({"cpu_seconds"} of this process), "learning_rate", "window", "sampling",
    "lora", "losses" (a number of steps and the mean loss up to it)}, and with `evaluate` "curve":
    what it says of the model as it would be saved, before the first step and at `points` places on
    the way, {"tokens", ...} each; its time is not in the seconds.

    sampling: how a window of `window` tokens gets positions below `target`: "pose", "random"
    (`SampledPositions`; the model's rule must be in its config), or None: positions count from 0,
    and windows should be as long as the target. memory: a bounded pattern, such as
    "block(block=512, look_back=1)", that the model has while it trains: windows follow each other
    then, and each remembers those before it (Transformer-XL); without sampling. train_tokens: the
    budget over all processes. lora: rank of adapters on the attention projections (needs peft),
    merged afterwards; 0 trains all weights. lora_plus: beside the adapters, norms and embeddings
    are trained. folder: checkpoints, from which the same call goes on. bos: whether BOS takes the
    place of each window's first token (None: as the model's tokenizer does it). overrides: passed
    to TrainingArguments. A model in half precision is in fp32 while it trains, see `training.lent`.
    """
    if memory is not None:
        check_memory(memory, sampling)
        require_own_attention(model, "with a memory to train")
    settings = {"disable_tqdm": True, "seed": seed} | training.placed(model) | (overrides or {})
    probe = training.arguments(
        folder, steps=1, batch=batch, lr=1.0, warmup=0, save_every=1, **settings
    )
    per_step = batch * window * probe.world_size
    steps = max(1, train_tokens // per_step)
    width = model.get_input_embeddings().weight.shape[1]
    arguments = training.arguments(
        folder,
        steps=steps,
        batch=batch,
        lr=lr or default_lr(width),
        warmup=steps // 20,
        save_every=save_every or max(1, min(100, steps // 3)),
        **({"weight_decay": 0.0} | settings),
    )
    count = steps * batch * arguments.world_size
    rows = _rows(model, tokens, window, count, seed, bos, sampling, memory, arguments)
    clock = Clock()
    low_rank = adapters(model, lora, lora_plus) if lora else contextlib.nullcontext()
    with (
        remembering(model, memory, rows) as carried,
        low_rank as parameters,
        training.lent(model, frozen_stays=not lora_plus) as loan,
    ):
        callbacks = [*carried, *([Steps(progress)] if progress else [])]
        if parameters is not None:
            loan.train_only(parameters)
        curve = None
        if evaluate is not None:
            every = -(-steps // points)
            curve = Measured(Path(folder), every, per_step, loan, evaluate, clock)
            callbacks.append(curve)
        trainer = NextTokenTrainer(
            model=model,
            args=arguments,
            callbacks=callbacks,
            train_dataset=rows,
            data_collator=_collator(target, sampling, memory),
        )
        trainer.remove_callback(PrinterCallback)  # progress is the caller's
        training.train(trainer)
    found = {} if curve is None else {"curve": curve.points}
    return found | {
        "tokens": steps * per_step,
        "steps": steps,
        **clock.read(),
        "window": window,
        "sampling": sampling,
        "memory": memory,
        "lora": lora,
        "learning_rate": arguments.learning_rate,
        "losses": _losses(trainer, per_step),
    }


def _losses(trainer: Trainer, per_step: int) -> list[dict]:
    """What the trainer has logged: a number of tokens, and the mean loss up to it."""
    logged = (row for row in trainer.state.log_history if "loss" in row)
    return [{"tokens": row["step"] * per_step, "loss": row["loss"]} for row in logged]


def check_memory(memory: str, sampling: str | None) -> None:
    """ValueError for a pattern that remembers everything or that dense attention cannot take over
    from, and for positions that are drawn."""
    check_pattern("memory", memory)
    if sampling is not None:
        raise ValueError(
            f"memory: got {memory!r} with sampling={sampling!r}, and its positions count on from "
            "window to window; valid is no sampling"
        )
    if not registry.backend(memory).new_state().evicts:
        raise ValueError(
            f"memory: got {memory!r}, which remembers every token; valid is a bounded pattern, "
            "such as 'block(block=512, look_back=1)' or 'sliding(window=512)'"
        )


@contextlib.contextmanager
def remembering(model, memory: str | None, rows: Dataset) -> Iterator[list[TrainerCallback]]:
    """Gives the model the pattern `memory` while it trains on `rows`, and yields what carries it;
    a rule in its config stays."""
    if memory is None:
        yield []
        return
    assert isinstance(rows, Segments)
    swap(model, memory)
    carried = None
    try:
        carried = CarriedMemory(model, rows)
        yield [carried]
    finally:
        if carried is not None:
            carried.end()
        detach(model)
        mark(model)


def _rows(model, tokens, window, count, seed, bos, sampling, memory, arguments) -> Dataset:
    """What is trained on: `count` windows."""
    first = bos_of(model, bos)
    if memory is not None:
        side_by_side = arguments.per_device_train_batch_size * arguments.world_size
        return Segments(tokens, window, side_by_side, count // side_by_side, bos=first)
    # sampled positions jump by themselves, and cannot tell documents apart
    end = end_of(model) if sampling is None else None
    windows = training.TokenWindows(tokens, window, count, seed, first, end)
    return windows if sampling is None else Numbered(windows, seed)


def _collator(target: int, sampling: str | None, memory: str | None):
    if memory is not None:
        return stacked
    return None if sampling is None else SampledPositions(target, sampling)


class Clock:
    """The seconds that pass, on the wall and of this process's processors, less what is paused."""

    def __init__(self):
        self.begun = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def read(self) -> dict:
        """{"seconds", "speed": {"cpu_seconds"}} so far."""
        wall, cpu = (now - begun for now, begun in zip(self._now(), self.begun, strict=True))
        return {"seconds": wall, "speed": {"cpu_seconds": cpu}}

    @contextlib.contextmanager
    def paused(self):
        """What is inside does not count."""
        before = self._now()
        yield
        self.begun = tuple(
            begun + now - then
            for begun, now, then in zip(self.begun, self._now(), before, strict=True)
        )


class Measured(Curve):
    """A curve of what `evaluate` says of the lent model as it will be saved, the clock paused."""

    def __init__(
        self, folder: Path, every: int, tokens_per_step: int, loan, evaluate, clock: Clock
    ):
        super().__init__(folder / "curve.json", every, tokens_per_step, self.as_saved)
        self.loan, self.evaluate, self.clock = loan, evaluate, clock

    def as_saved(self) -> dict:
        """A point's values."""
        with self.clock.paused(), self.loan.as_saved():
            return self.evaluate()


class NextTokenTrainer(Trainer):
    """A Trainer whose loss is the model's own, with the logits of long windows in pieces."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        # sharded, the head has its weights only in the model's own forward
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.sharded or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        return training_loss(self.model, given.pop("input_ids"), called=model, **given)


class Numbered(Dataset):
    """Rows with a number of their own under "draw", from which `SampledPositions` draws their
    positions.

    From the global generator they would differ after a kill: the data loader is a batch ahead of
    the step whose random state a checkpoint keeps."""

    def __init__(self, rows: Dataset, seed: int):
        self.rows, self.first = rows, 1 + seed * len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], "draw": self.first + index}
