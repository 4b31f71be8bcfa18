"""Recurrent memory: a causal LM that reads a long text in segments, and hands a few vectors on from
each to the next.

RMT (Bulatov et al., arXiv:2207.06881, section 3.2; as a decoder arXiv:2304.11062). Segment s of the
text, x_s, goes into the model between two copies of the memory m_s, as embeddings:

    [ . ; h_s ; m_(s+1) ] = model([ m_s ; x_s ; m_s ]),      m_0 learned

with h_s what the next tokens are told from, and m_(s+1) the final hidden states where the second
copy stood, which has seen the whole segment. Gradients flow through the memory, `through` segments
back. The model itself stays what it is: any causal LM that takes `inputs_embeds`.

    reader = RecurrentMemory(model, memory=8, segment=256)
    train_memory(reader, tokens, train_tokens=1_000_000, folder=folder)
    reader.generate(ids, max_new_tokens=100)
    effattn.save(reader.model, folder); reader.save(folder)       # and RecurrentMemory.load

B: rows; T: tokens; S: of a segment; M: memory vectors; D: hidden size."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from effattn.errors import Unsupported, check_choice
from effattn.evaluate.logits import Scores, positions_at_a_time
from effattn.hf import anatomy
from effattn.hf.beginning import bos_of
from effattn.hf.placement import require_here
from effattn.training import lending as training
from effattn.training.uptrain import Steps, default_lr

FILE = "recurrent_memory.safetensors"
TRAINABLE = ("all", "memory")


class RecurrentMemory(nn.Module):
    """`model`, with `memory` learned vectors that it reads and writes at every `segment` tokens.

    through: gradients go back so many segments, the present one included. The vectors are drawn
    like the model's embeddings, by `seed`. Raises ValueError for sizes that mean nothing, and where
    a segment with its memory is longer than the positions that a model has learned; Unsupported
    for a model that is no causal LM."""

    _keys_to_ignore_on_save = None  # which a Trainer asks of what it loads again

    def __init__(
        self, model: nn.Module, memory: int = 8, segment: int = 256, through: int = 2, seed: int = 0
    ):
        super().__init__()
        for name, value, least in (
            ("memory", memory, 1),
            ("segment", segment, 2),
            ("through", through, 1),
        ):
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{name}: got {value!r}, valid is a whole number of at least {least}"
                )
        parts = anatomy.of(model)
        if not parts.causal:
            raise Unsupported(f"model: {type(model).__name__} is not causal; valid is a causal LM")
        most = None if parts.positions is None else int(model.config.max_position_embeddings)
        if most is not None and segment + 2 * memory > most:
            raise ValueError(
                f"segment: got {segment} and {memory} memory vectors on both sides, but the model "
                f"has learned {most} positions; valid is at most {most - 2 * memory}"
            )
        self.model, self.segment, self.through = model, segment, through
        table = model.get_input_embeddings().weight
        draw = torch.randn(
            memory, table.shape[1], generator=torch.Generator().manual_seed(seed)
        ).to(table.device)
        values = table.detach().float()
        self.memory = nn.Parameter((values.mean(0) + values.std(0) * draw).to(table.dtype))

    def read(self, ids: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One segment: ids (B, T <= S) and the memory (B, M, D) before it (None: the learned one).
        Returns the hidden states (B, T, D) of its tokens and the memory (B, M, D) after it."""
        if memory is None:
            memory = self.memory.expand(len(ids), -1, -1)
        embedded = self.model.get_input_embeddings()(ids)
        memory = memory.to(embedded.dtype)
        given = torch.cat([memory, embedded, memory], dim=1)
        body = self.model.base_model
        hidden = body(inputs_embeds=given, use_cache=False).last_hidden_state
        size = memory.shape[1]
        return hidden[:, size:-size], hidden[:, -size:]

    def segments(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids (B, S), hidden states (B, S, D)) of each segment of ids (B, T) in order; the last
        may be shorter. Gradients end at every `through` segments."""
        memory = None
        for number, part in enumerate(ids.split(self.segment, dim=1)):
            if memory is not None and number % self.through == 0:
                memory = memory.detach()
            hidden, memory = self.read(part, memory)
            yield part, hidden

    def losses(self, ids: Tensor) -> list[Tensor]:
        """Cross-entropy in nats of each segment's tokens but its first, (B, S - 1) each: ids (B,
        T), with gradients where they are recorded."""
        parts = anatomy.of(self.model)
        chunk = positions_at_a_time(self.model.get_input_embeddings().weight.shape[0])
        found = []
        for part, hidden in self.segments(ids):
            targets = part[:, 1:].flatten()

            def entropy(logits: Tensor, at: slice, targets: Tensor = targets) -> Tensor:
                return F.cross_entropy(logits, targets[at], reduction="none")

            scores = Scores(parts, hidden[:, :-1], chunk)
            if len(targets):
                found.append(torch.cat([*scores.each(entropy)]).view(len(part), -1))
        return found

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss"}: the mean of `losses`, 0-d. labels are the ids, and not looked at."""
        return {"loss": torch.cat(self.losses(input_ids), dim=1).mean()}

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None, **options
    ) -> Tensor:
        """ids (B, T) and what follows, (B, T + new). options: as for transformers' `generate`, one
        answer a row. A segment that is full is written into the memory, and the next one begins.

        Unsupported for padding, and for beams, which would need a memory each."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise Unsupported("attention_mask: padding; valid are rows of one length")
        for name in ("num_beams", "num_return_sequences"):
            if options.get(name, 1) != 1:
                raise Unsupported(f"{name}: got {options[name]}, valid is 1")
        if options.get("return_dict_in_generate"):
            raise Unsupported("return_dict_in_generate: got True, valid is False: ids alone")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens!r}, valid is a whole number of at least 1"
            )
        config = self.model.generation_config
        ends = options.get("eos_token_id", config.eos_token_id)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
        pad = options.setdefault("pad_token_id", pad)
        memory, left = None, max_new_tokens
        *whole, open_ = ids.split(self.segment, dim=1)
        for part in whole:
            _, memory = self.read(part, memory)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while left and not bool(done.all()):
            if open_.shape[1] == self.segment:
                # the last token of a full segment goes on, so that there is one to continue from
                _, memory = self.read(open_, memory)
                open_ = open_[:, -1:]
            new = self._continued(open_, memory, min(left, self.segment - open_.shape[1]), options)
            new = torch.where(done[:, None], pad, new)
            for end in ends:
                done = done | (new == end).any(dim=1)
            ids, open_ = torch.cat([ids, new], dim=1), torch.cat([open_, new], dim=1)
            left -= new.shape[1]
        return ids

    def _continued(self, ids: Tensor, memory: Tensor | None, count: int, options: dict) -> Tensor:
        """Up to `count` tokens more of a segment, (B, new)."""
        if memory is None:
            memory = self.memory.expand(len(ids), -1, -1)
        embedded = self.model.get_input_embeddings()(ids)
        given = torch.cat([memory.to(embedded.dtype), embedded], dim=1)
        mask = torch.ones(given.shape[:2], dtype=torch.int64, device=ids.device)
        # with embeddings alone, transformers returns the new tokens
        return self.model.generate(
            inputs_embeds=given, attention_mask=mask, max_new_tokens=count, **options
        )

    def save(self, folder: Path | str) -> None:
        """Writes the memory into `folder`, beside the model that `effattn.save` wrote there."""
        file = Path(folder) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {"segment": self.segment, "through": self.through}
        partial = file.with_name(f".{FILE}.new")
        try:
            save_file(
                {"memory": self.memory.detach().cpu().contiguous()},
                partial,
                {"settings": json.dumps(told)},
            )
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, model: nn.Module, folder: Path | str) -> RecurrentMemory:
        """The memory of `folder` around its model. ValueError where there is none, and for one of
        another width."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(f"folder: {folder} has no {FILE}; valid is what `save` wrote")
        with safe_open(file, framework="pt") as opened:
            memory = opened.get_tensor("memory")
            told = json.loads((opened.metadata() or {})["settings"])
        width = model.get_input_embeddings().weight.shape[1]
        if memory.ndim != 2 or memory.shape[1] != width:
            raise ValueError(
                f"{file}: the memory is {tuple(memory.shape)}, and the model's vectors have "
                f"{width} numbers"
            )
        reader = cls(model, len(memory), told["segment"], told["through"])
        reader.memory.data.copy_(memory)
        return reader


class _Trainer(Trainer):
    """A Trainer that can save a model around a model: each tensor once, whatever its names."""

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        seen: dict[int, str] = {}
        for name, x in self.model.state_dict().items():
            seen.setdefault(x.data_ptr(), name)
        state = self.model.state_dict()
        kept = {name: state[name].detach().cpu().contiguous() for name in seen.values()}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})


def train_memory(
    reader: RecurrentMemory,
    tokens: Tensor,
    *,
    train_tokens: int,
    folder: Path,
    segments: int = 4,
    batch: int = 2,
    lr: float | None = None,
    trainable: str = "all",
    seed: int = 0,
    bos: bool | None = None,
    save_every: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    overrides: dict | None = None,
) -> dict:
    """Trains `reader` in place on windows of `segments` segments of `tokens` (N,) int64; returns
    {"tokens", "seconds", "learning_rate", "losses" (a number of tokens and the mean loss up to
    it)}.

    trainable: "all", or the "memory" alone, of a model that stays as it is. folder: checkpoints,
    from which the same call goes on. bos: whether BOS takes the place of each window's first token
    (None: as the model's tokenizer does it). In one process. A model in half precision is in fp32
    while it trains, see `training.lent`. Raises ValueError for bad settings."""
    require_here(reader.model, "train_memory")
    check_choice("trainable", trainable, TRAINABLE)
    for name, value in (("segments", segments), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: got {value!r}, valid is a whole number of at least 1")
    settings = {"disable_tqdm": True, "seed": seed} | training.placed(reader) | (overrides or {})
    length = segments * reader.segment
    steps = max(1, train_tokens // (batch * length))
    arguments = training.arguments(
        folder,
        steps=steps,
        batch=batch,
        lr=lr or default_lr(anatomy.of(reader.model)),
        warmup=max(1, steps // 20),
        save_every=save_every or max(1, min(100, steps // 3)),
        **({"weight_decay": 0.0} | settings),
    )
    if arguments.world_size > 1:
        raise ValueError(f"processes: got {arguments.world_size}, valid is 1")
    first = bos_of(reader.model, bos)
    windows = training.TokenWindows(tokens, length, steps * batch, seed, first)
    start = time.perf_counter()
    with training.lent(reader) as loan:
        if trainable == "memory":
            loan.train_only([reader.memory])
        trainer = _Trainer(
            model=reader,
            args=arguments,
            callbacks=[Steps(progress)] if progress else [],
            train_dataset=windows,
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)  # progress is the caller's
        training.train(trainer)
    losses = [
        {"tokens": row["step"] * batch * length, "loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return {
        "tokens": steps * batch * length,
        "seconds": time.perf_counter() - start,
        "learning_rate": arguments.learning_rate,
        "losses": losses,
    }
