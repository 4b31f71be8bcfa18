"""Pretrain the embedded model: a small multi-head Llama on the source of Python's standard library.

    python recipes/pretrain_embedded.py --output runs/embedded --tokens 12_000_000

Run it again to go on after a kill. With more than one GPU: `accelerate launch
recipes/pretrain_embedded.py ...`."""

from __future__ import annotations

import json
import lzma
import os
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from effattn.bounds import Bounds
from effattn.embedded import corpus, tokens
from effattn.embedded.making import config, train_tokenizer
from effattn.evaluate.loss import token_losses
from effattn.outputs import OWNER, check_writable, claim
from effattn.permissions import follow_umask
from effattn.recipes.console import one_line_errors
from effattn.stages import main_process
from effattn.training import lending as training


def pretrain(
    output: Path,
    *,
    train_tokens: int,
    hidden: int = 256,
    layers: int = 4,
    vocabulary: int = 3072,
    length: int = 512,
    batch: int = 4,
    lr: float = 2e-3,
    compile: bool = False,
    overrides: dict | None = None,
) -> dict:
    """Trains (or goes on training) the model in `output` and returns its card.

    Everything lands in `output`; `output/run` holds the resumable state while training goes on."""
    for name, value, least in (
        ("tokens", train_tokens, 1),
        ("hidden", hidden, 16),
        ("layers", layers, 1),
        ("vocabulary", vocabulary, 258),
        ("length", length, 8),
        ("batch", batch, 1),
    ):
        Bounds(whole=True, least=least).check(name, value)
    Bounds(whole=False, above=0).check("lr", lr)
    output = Path(output)
    check_writable("output", output)
    with claim("output", output) if main_process() else nullcontext() as staging:
        tokenizer = make_tokenizer(output, staging, vocabulary)
        model, facts = train(
            tokenizer,
            output / "run",
            train_tokens=train_tokens,
            hidden=hidden,
            layers=layers,
            length=length,
            batch=batch,
            lr=lr,
            compile=compile,
            overrides=overrides or {},
        )
        curve = facts.pop("loss_curve")
        card = facts | bits_per_byte(model, tokenizer, length) | {"loss_curve": curve}
        if staging is not None:
            model.save_pretrained(staging)
            (staging / "card.json").write_text(json.dumps(card, indent=1) + "\n")
            follow_umask(staging)
            put(staging, output, last="card.json")
    return card


def make_tokenizer(output: Path, staging: Path | None, vocabulary: int) -> PreTrainedTokenizerFast:
    """The one that an earlier run left in `output`, or a new one, which is put there at once."""
    if (output / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(output)
    tokenizer = train_tokenizer(vocabulary)
    if staging is not None:
        tokenizer.save_pretrained(staging)
        put(staging, output, last="tokenizer.json")
    return tokenizer


def train(
    tokenizer,
    run: Path,
    *,
    train_tokens: int,
    hidden: int,
    layers: int,
    length: int,
    batch: int,
    lr: float,
    compile: bool,
    overrides: dict,
) -> tuple[LlamaForCausalLM, dict]:
    """The trained model on the CPU, and the facts of its training for the card."""
    steps = max(1, train_tokens // (batch * length))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tokenizer, hidden, layers, length))
    stream = tokens("train", tokenizer=tokenizer)
    held_out = tokens("validation", tokenizer=tokenizer)[: 48 * length].view(-1, length)
    arguments = training.arguments(
        run,
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=min(200, steps // 10),
        save_every=max(1, min(250, steps // 4)),
        eval_strategy="steps",
        eval_steps=max(1, min(500, steps // 4)),
        per_device_eval_batch_size=batch,
        torch_compile=compile,
        **overrides,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training.TokenWindows(stream, length, steps * batch * arguments.world_size),
        eval_dataset=[{"input_ids": row, "labels": row} for row in held_out],
    )
    with training.lent(model):
        training.train(trainer)
    model.cpu().eval()  # in fp32, and with its own forward: what is measured is what is saved
    facts = {
        "parameters": model.num_parameters(),
        "train_tokens": steps * batch * length * arguments.world_size,
        "train_tokens_unique": len(stream),
        "length": length,
        "batch_tokens": batch * length * arguments.world_size,
        "learning_rate": lr,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "loss_curve": [
            {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ],
    }
    return model, facts


def bits_per_byte(model, tokenizer, length: int) -> dict[str, float]:
    """Validation bits per byte of the model, and of `xz -9e`, on the same files end to end.

    The model sees windows of `length` tokens that overlap by half: at least length / 2 tokens
    before each one."""
    documents = corpus.documents("validation")
    data = b"".join(text.encode() for _, text in documents)
    nats = token_losses(
        model, tokens("validation", tokenizer=tokenizer), context=length, stride=length // 2
    )
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {
        "validation_bytes": len(data),
        "bits_per_byte": float(nats.double().sum() / torch.tensor(2.0).log() / len(data)),
        "bits_per_byte_xz_9e": 8 * len(xz) / len(data),
        "perplexity": float(nats.double().mean().exp()),
        "validation_tokens": len(nats) + 1,
    }


def put(staging: Path, output: Path, last: str) -> None:
    """Moves the files that were written into `staging` to `output`, `last` last: it says that all
    are there.
    """
    names = [file.name for file in staging.iterdir() if file.name != OWNER]
    for name in sorted(names, key=lambda name: name == last):
        os.replace(staging / name, output / name)


@one_line_errors
def main(
    output: Annotated[
        Path, typer.Option(help="where the checkpoint, the tokenizer and the card go")
    ],
    tokens: Annotated[int, typer.Option(help="training tokens")] = 12_000_000,
    hidden: Annotated[int, typer.Option(help="hidden size, a multiple of 16")] = 256,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 4,
    vocabulary: Annotated[int, typer.Option(help="tokenizer entries")] = 3072,
    length: Annotated[int, typer.Option(help="training length in tokens")] = 512,
    batch: Annotated[int, typer.Option(help="windows a step and a process")] = 4,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    compile: Annotated[bool, typer.Option(help="torch.compile the model")] = False,
) -> None:
    card = pretrain(
        output,
        train_tokens=tokens,
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        length=length,
        batch=batch,
        lr=lr,
        compile=compile,
    )
    print(
        f"{card['parameters']:,} parameters, {card['train_tokens']:,} tokens: "
        f"{card['bits_per_byte']:.3f} bits per byte (xz -9e: {card['bits_per_byte_xz_9e']:.3f}), "
        f"perplexity {card['perplexity']:.2f} -> {output}"
    )


if __name__ == "__main__":
    typer.run(main)
