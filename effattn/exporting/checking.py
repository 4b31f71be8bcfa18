"""Whether llama.cpp computes with a file what we compute with the model that it was made of."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from effattn.embedded import corpus
from effattn.encoding import encode
from effattn.exporting import llama_cpp
from effattn.hf.families import trained_length

PROMPTS, LENGTH = 5, 64  # prompts, and tokens of each, and after each
FULL = 4  # places after each prompt whose whole distribution is compared
TIE = 0.05  # nats: tokens that are as likely as each other may change places by rounding
# nats a token, to the model in its own numbers: 16 bits round, q8_0 has a step of 1/254
LIMITS = {"f16": 1e-3, "bf16": 1e-3, "f32": 1e-3, "q8_0": 2e-2}


def compare(
    model: nn.Module, tokenizer, file: Path, kind: str, text: Tensor, said: str
) -> dict[str, object]:
    """What the engine makes of `file` against `model`. text: int64 (N,), of which prompts are cut;
    said: a string that both tokenize.

    RuntimeError when its greedy tokens, its distributions (beyond LIMITS) or its tokenizer are
    others: equal tokens are asked of the formats that do not quantize."""
    # a model of short sequences is asked for less
    length = min(LENGTH, (trained_length(model.config) or 2 * LENGTH) // 2)
    prompts = text[: PROMPTS * length].view(PROMPTS, length)
    said = said if length == LENGTH else said[-length:]
    size = model.get_input_embeddings().weight.shape[0]
    question = {
        "prompts": prompts.tolist(),
        "new": length,
        "full": FULL,
        "vocabulary": size,
        "texts": [said],
        "exact": True,
        "threads": llama_cpp.cores(),
    }
    answer = llama_cpp.ask(file, question)
    equal = total = 0
    behind = 0.0  # by how much our own likeliest token is likelier than the engine's
    kl: list[float] = []
    far = 0.0
    for prompt, new, rows in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        ours = _logprobs(model, prompt, torch.tensor(new))
        equal += int((ours.argmax(-1) == torch.tensor(new)).sum())
        total += len(new)
        chosen = ours.gather(1, torch.tensor(new)[:, None])[:, 0]
        behind = max(behind, float((ours.max(-1).values - chosen).max()))
        theirs = torch.tensor(rows, dtype=torch.float64).log_softmax(-1)  # rounded as they came
        ours = ours[: len(theirs)]
        kl += (ours.exp() * (ours - theirs)).sum(-1).tolist()
        likely = ours > ours.max(-1, keepdim=True).values - 10
        far = max(far, float((ours - theirs)[likely].abs().max()))
    found = {
        "engine": f"llama.cpp ({llama_cpp.version()})",
        "cache": "float32",
        "tokens": total,
        "equal_tokens": equal,
        "kl": sum(kl) / len(kl),
        "largest_kl": max(kl),
        "largest_difference_of_log_probabilities": far,
        "tokens_of_a_text": answer["texts"][0][0],
    }
    if kind != "q8_0" and behind > TIE:
        raise RuntimeError(
            f"llama.cpp goes on with other tokens: {total - equal} of {total}, one of them "
            f"{behind:.3g} nats less likely than ours"
        )
    _judge(found, kind, len(tokenizer(said).input_ids))
    return found


@torch.no_grad()
def _logprobs(model: nn.Module, prompt: Tensor, new: Tensor) -> Tensor:
    """(tokens of `new`, V) fp64: of each new token's place, given all before it."""
    ids = torch.cat([prompt, new])[None].to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().cpu().log_softmax(-1)


def _judge(found: dict, kind: str, ours: int) -> None:
    if found["tokens_of_a_text"] != ours:
        raise RuntimeError(
            f"llama.cpp reads a text as {found['tokens_of_a_text']} tokens, our tokenizer as {ours}"
        )
    if not found["kl"] <= LIMITS[kind]:
        raise RuntimeError(
            f"llama.cpp computes something else: KL {found['kl']:.3g} nats a token, "
            f"{kind} has at most {LIMITS[kind]:g}"
        )


def speeds(file: Path, before: Path | None, text: Tensor, contexts: tuple[int, ...]) -> list[dict]:
    """Tokens a second while decoding after each of `contexts`, of the parent's file and of this
    one, in turns."""
    question = {
        "prompts": [text[:LENGTH].tolist()],
        "new": 1,
        "full": 0,
        "vocabulary": 1,
        "contexts": contexts,
        "repeats": 3,
        "threads": llama_cpp.cores(),
    }
    after = llama_cpp.ask(file, question)["speeds"]
    parent = {} if before is None else llama_cpp.ask(before, question)["speeds"]
    return [
        {"context": one, "before": parent.get(str(one)), "after": after[str(one)]}
        for one in contexts
    ]


def prompts(tokenizer) -> tuple[Tensor, str]:
    """Tokens to cut prompts from, int64 (N,), and a text that both tokenize: the source of Python's
    standard library, which is on every machine."""
    documents = [text for _, text in corpus.documents("validation")]
    ids = encode(iter(documents), tokenizer, PROMPTS * LENGTH)
    return ids, documents[0][:500] + " 12345 Äpfel  \n\n\t“déjà vu” 東京 don't"
