"""Pretrain the embedded model: a small multi-head Llama on the source of Python's standard library.

    python recipes/pretrain_embedded.py --output runs/embedded --tokens 12_000_000
    python recipes/pretrain_embedded.py --output runs/logn --variant logn

Run it again to go on after a kill. With more than one GPU: `accelerate launch
recipes/pretrain_embedded.py ...`. From Python:

    from effattn.recipes.pretrain_embedded import Settings, run
    card = run(Settings(output=Path("runs/embedded")))

A BPE tokenizer, then the model, then a card that says how long and how well. Everything lands in
`output`, the card last; `output/run` holds the checkpoints that training goes on from.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option, real, whole
from effattn.resuming import check_settings
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass
class Settings(options.Settings):
    """Pretrain the embedded model."""

    output: Path = option(help="where the checkpoint, the tokenizer and the card go")
    tokens: int = whole(12_000_000, "training tokens", least=1)
    hidden: int = whole(256, "hidden size, a multiple of 16", least=16)
    layers: int = whole(4, "decoder layers", least=1)
    vocabulary: int = whole(3072, "tokenizer entries", least=258)
    length: int = whole(512, "training length in tokens", least=8)
    batch: int = whole(4, "windows a step and a process", least=1)
    lr: float = real(2e-3, "peak learning rate", above=0)
    variant: str = option(
        "dense",
        "dense; logn: queries times log n / log T; hwfa: windows in all layers but the last, which "
        "has no positions and log n",
    )
    window: int | None = whole(
        None,
        "of hwfa, in tokens (default: all together reach three quarters of the length)",
        least=2,
    )
    compile: bool = option(False, "torch.compile the model")
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone


def run(settings: Settings, show: Quiet | None = None) -> dict:
    """Trains, or goes on training, the model in `output`; returns its card.

    Raises ValueError (bad settings), FloatingPointError and OSError (disk)."""
    from effattn.outputs import check_writable, claim

    output = Path(settings.output)
    check(settings)
    check_writable("output", output)
    # Rank 0 writes. What is written lies in a staging folder until it is whole.
    with claim("output", output) if main_process() else nullcontext() as staging:
        tokenizer = tokenizer_of(settings, output, staging)
        model = model_of(settings, tokenizer)
        facts, curve = train(settings, output / "run", model, tokenizer)
        card = facts | held_out(model, tokenizer, settings.length) | {"loss_curve": curve}
        if staging is not None:
            save(output, staging, model, card)
    return card


# The steps
# -------------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """ValueError for a variant that is none, or that an unfinished run in the output is not."""
    from effattn.embedded.making import VARIANTS
    from effattn.errors import check_choice

    check_choice("variant", settings.variant, VARIANTS)
    if settings.variant == "hwfa" and settings.layers < 2:
        raise ValueError(
            f"layers: got {settings.layers}, valid for hwfa is at least 2: its last one is full"
        )
    if settings.window is not None and settings.variant != "hwfa":
        raise ValueError(
            f"window: got {settings.window} with variant {settings.variant!r}; valid is with 'hwfa'"
        )
    check_settings(Path(settings.output) / "run", variant_of(settings), write=False)


def variant_of(settings: Settings) -> dict[str, object]:
    """What says of a run which model it trains."""
    return {"variant": settings.variant, "window": settings.window}


def tokenizer_of(settings: Settings, output: Path, staging: Path | None) -> PreTrainedTokenizerFast:
    """The one that an earlier run left in `output`, or a new one, which is put there at once."""
    from transformers import PreTrainedTokenizerFast

    from effattn.embedded.making import train_tokenizer

    if (output / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(output)
    tokenizer = train_tokenizer(settings.vocabulary)
    if staging is not None:
        tokenizer.save_pretrained(staging)
        put(staging, output, "tokenizer.json")
    return tokenizer


def model_of(settings: Settings, tokenizer) -> LlamaForCausalLM:
    """Random weights from a fixed seed, and the variant's attention."""
    import torch
    from transformers import LlamaForCausalLM

    from effattn.embedded.making import axes_of, config
    from effattn.surgery.swapping import swap

    torch.manual_seed(0)
    size = (settings.layers, settings.length)
    model = LlamaForCausalLM(config(tokenizer, settings.hidden, *size))
    axes = axes_of(settings.variant, *size, settings.window)
    return swap(model, **axes) if axes else model


def train(
    settings: Settings, folder: Path, model, tokenizer
) -> tuple[dict[str, object], list[dict[str, float]]]:
    """Trains in place, from the newest checkpoint in `folder` if there is one. Returns what the
    card says of it, and the losses by step."""
    import torch
    from transformers import Trainer

    from effattn.embedded import tokens
    from effattn.training import lending

    length, batch = settings.length, settings.batch
    steps = max(1, settings.tokens // (batch * length))
    stream = tokens("train", tokenizer=tokenizer)
    held_out = tokens("validation", tokenizer=tokenizer)[: 48 * length].view(-1, length)
    arguments = lending.arguments(
        folder,
        steps=steps,
        batch=batch,
        lr=settings.lr,
        warmup=min(200, steps // 10),
        save_every=max(1, min(250, steps // 4)),
        eval_strategy="steps",
        eval_steps=max(1, min(500, steps // 4)),
        per_device_eval_batch_size=batch,
        torch_compile=settings.compile,
        # the Trainer's own bar: it takes an hour
        **({"disable_tqdm": False} | settings.overrides),
    )
    check_settings(folder, variant_of(settings), write=main_process())
    windows = steps * batch * arguments.world_size
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=lending.TokenWindows(stream, length, windows),
        eval_dataset=[{"input_ids": row, "labels": row} for row in held_out],
    )
    with lending.lent(model):
        lending.train(trainer)
    model.cpu().eval()  # in fp32, and with its own forward: what is measured is what is saved
    facts = {
        "parameters": model.num_parameters(),
        "train_tokens": windows * length,
        "train_tokens_unique": len(stream),
        "length": length,
        "batch_tokens": batch * length * arguments.world_size,
        "learning_rate": settings.lr,
        **({} if settings.variant == "dense" else variant_of(settings)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    curve = [
        {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    return facts, curve


def held_out(model, tokenizer, length: int) -> dict[str, float]:
    """Validation bits per byte of the model, and of `xz -9e`, on the same files end to end.

    The model sees windows of `length` tokens that overlap by half: at least length / 2 tokens
    before each one."""
    import torch

    from effattn.embedded import corpus, tokens
    from effattn.evaluate.loss import token_losses

    data = b"".join(text.encode() for _, text in corpus.documents("validation"))
    stream = tokens("validation", tokenizer=tokenizer)
    nats = token_losses(model, stream, context=length, stride=length // 2).double()
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {
        "validation_bytes": len(data),
        "bits_per_byte": float(nats.sum() / torch.tensor(2.0).log() / len(data)),
        "bits_per_byte_xz_9e": 8 * len(xz) / len(data),
        "perplexity": float(nats.mean().exp()),
        "validation_tokens": len(nats) + 1,
    }


def save(output: Path, staging: Path, model, card: dict) -> None:
    """Writes the model and, last, its card."""
    from effattn.permissions import follow_umask
    from effattn.surgery import checkpoint

    whole = checkpoint.save(model, staging / "model")  # of a variant, what it is made of, too
    for file in whole.iterdir():
        os.replace(file, staging / file.name)
    whole.rmdir()
    (staging / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    follow_umask(staging)
    put(staging, output, "card.json")


def put(staging: Path, output: Path, last: str) -> None:
    """Moves the files that were written into `staging` to `output`, `last` last: it says that all
    are there.
    """
    from effattn.outputs import OWNER

    names = [file.name for file in staging.iterdir() if file.name != OWNER]
    for name in sorted(names, key=lambda name: name == last):
        os.replace(staging / name, output / name)


def tell(settings: Settings, card: dict) -> None:
    """One line on the terminal."""
    print(
        f"{card['parameters']:,} parameters, {card['train_tokens']:,} tokens: "
        f"{card['bits_per_byte']:.3f} bits per byte (xz -9e: {card['bits_per_byte_xz_9e']:.3f}), "
        f"perplexity {card['perplexity']:.2f} -> {settings.output}"
    )


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
