"""How the embedded model is made: a BPE tokenizer, then a small multi-head Llama, then a card.

Everything lands in `output`; `output/run` holds the resumable state while training goes on.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from effattn.bounds import Bounds
from effattn.embedded import corpus, tokens
from effattn.evaluate.loss import token_losses
from effattn.outputs import OWNER, check_writable, claim
from effattn.permissions import follow_umask
from effattn.stages import main_process
from effattn.training import lending as training

END = "<|endoftext|>"


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` entries, trained on the training files only."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _, text in corpus.documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def config(tokenizer, hidden: int, layers: int, length: int) -> LlamaConfig:
    """Full multi-head attention: 8 heads and 8 KV heads, FFN 11/4 of the hidden size, tied
    embeddings.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


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
    """Trains (or goes on training) the model in `output` and returns its card."""
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
    if not main_process():
        return _pretrain(
            output,
            None,
            train_tokens,
            hidden,
            layers,
            vocabulary,
            length,
            batch,
            lr,
            compile,
            overrides,
        )
    with claim("output", output) as staging:
        return _pretrain(
            output,
            staging,
            train_tokens,
            hidden,
            layers,
            vocabulary,
            length,
            batch,
            lr,
            compile,
            overrides,
        )


def _put(staging: Path, output: Path, last: str) -> None:
    """Moves the files that were written into `staging` to `output`, `last` last: it says that all
    are there.
    """
    names = [file.name for file in staging.iterdir() if file.name != OWNER]
    for name in sorted(names, key=lambda name: name == last):
        os.replace(staging / name, output / name)


def _pretrain(
    output: Path,
    staging: Path | None,
    train_tokens: int,
    hidden: int,
    layers: int,
    vocabulary: int,
    length: int,
    batch: int,
    lr: float,
    compile: bool,
    overrides: dict | None,
) -> dict:
    run = output / "run"
    if (output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(vocabulary)
        if staging is not None:
            tokenizer.save_pretrained(staging)
            _put(staging, output, "tokenizer.json")
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
        **(overrides or {}),
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
    card = {
        "parameters": model.num_parameters(),
        "train_tokens": steps * batch * length * arguments.world_size,
        "train_tokens_unique": len(stream),
        "length": length,
        "batch_tokens": batch * length * arguments.world_size,
        "learning_rate": lr,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        **bits_per_byte(model, tokenizer, length),
        "loss_curve": [
            {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ],
    }
    if staging is not None:
        model.save_pretrained(staging)
        (staging / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        follow_umask(staging)
        _put(staging, output, "card.json")
    return card
