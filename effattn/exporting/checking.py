"""Whether an engine computes with an export what we compute with the model that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effattn.embedded import corpus
from effattn.encoding import encode
from effattn.hf.families import trained_length

PROMPTS, LENGTH = 5, 64  # prompts, and tokens of each, and after each
FULL = 4  # places after each prompt whose whole distribution is compared
TIE = 0.05  # nats: tokens that are as likely as each other may change places by rounding
# nats a token, to the model in its own numbers: 16 bits round, q8_0 has a step of 1/254
CLOSE, COARSE = 1e-3, 2e-2
REPEATS = 3  # of a speed


class Engine(Protocol):
    """A module that runs exports.

    ask(folder, question): of a dict with "prompts" (lists of token ids), "new" (tokens to go on
    with), "full" (places with whole distributions), "vocabulary", "threads", and may be "texts",
    "contexts" and "repeats" of speeds, "exact" (float32 everywhere). The answer has "tokens",
    "logprobs" ([prompt][place][V]), "speeds" (context -> tokens a second), "numbers" (what it
    computed and cached in) and, where it tokenizes by itself, "texts"."""

    NAME: str

    def require(self) -> None:
        """ValueError, saying what to install, where it is not there."""

    def version(self) -> str:
        """Of the package that has it."""
        ...

    def ask(self, folder: Path, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; RuntimeError, in one line, where it cannot run the export."""
        ...

    def cores(self) -> int:
        """How many processors it may use."""
        ...


def compare(
    engine: Engine,
    folder: Path,
    model: nn.Module,
    tokenizer,
    limit: float,
    text: Tensor,
    said: str,
) -> dict[str, object]:
    """What the engine makes of the export in `folder` against `model`. text: int64 (N,), of which
    prompts are cut; said: a string that both tokenize; limit: of KL, in nats a token.

    What is compared is the file: the engine computes in float32. How far it is with the numbers
    that it takes by itself is in the answer too, as `kl_as_served`; that is the engine's matter.

    RuntimeError when its greedy tokens, its distributions or its tokenizer are others: equal tokens
    are asked of formats that do not quantize."""
    # a model of short sequences is asked for less
    length = min(LENGTH, (trained_length(model.config) or 2 * LENGTH) // 2)
    prompts = text[: PROMPTS * length].view(PROMPTS, length)
    said = said if length == LENGTH else said[-length:]
    question: dict[str, Any] = {
        "prompts": prompts.tolist(),
        "new": length,
        "full": FULL,
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "texts": [said],
        "exact": True,
        "threads": engine.cores(),
    }
    answer = engine.ask(folder, question)
    equal, total, behind = _tokens(model, prompts, answer)
    kl, far = _distributions(model, prompts, answer)
    served = engine.ask(folder, question | {"exact": False, "new": FULL, "texts": []})
    found = {
        "engine": f"{engine.NAME} ({engine.version()})",
        "numbers": answer["numbers"],
        "tokens": total,
        "equal_tokens": equal,
        "kl": sum(kl) / len(kl),
        "largest_kl": max(kl),
        "largest_difference_of_log_probabilities": far,
        "numbers_as_served": served["numbers"],
        "kl_as_served": torch.tensor(_distributions(model, prompts, served)[0]).mean().item(),
    }
    if limit <= CLOSE and behind > TIE:
        raise RuntimeError(
            f"{engine.NAME} goes on with other tokens: {total - equal} of {total}, one of them "
            f"{behind:.3g} nats less likely than ours"
        )
    if "texts" in answer:
        found["tokens_of_a_text"] = answer["texts"][0][0]
        _judge_tokenizer(engine, answer["texts"][0][0], len(tokenizer(said).input_ids))
    if not sum(kl) / len(kl) <= limit:
        raise RuntimeError(
            f"{engine.NAME} computes something else: KL {found['kl']:.3g} nats a token, valid is "
            f"at most {limit:g}"
        )
    return found


def _tokens(model: nn.Module, prompts: Tensor, answer: dict) -> tuple[int, int, float]:
    """(tokens that are our likeliest, tokens, by how many nats ours is likelier at most)."""
    equal, total, behind = 0, 0, 0.0
    for prompt, new in zip(prompts, answer["tokens"], strict=True):
        ours, new = _logprobs(model, prompt, torch.tensor(new)), torch.tensor(new)
        equal += int((ours.argmax(-1) == new).sum())
        total += len(new)
        chosen = ours.gather(1, new[:, None])[:, 0]
        behind = max(behind, float((ours.max(-1).values - chosen).max()))
    return equal, total, behind


def _distributions(model: nn.Module, prompts: Tensor, answer: dict) -> tuple[list[float], float]:
    """KL(ours || theirs) of each whole distribution, and how far log-probabilities of likely tokens
    are from ours at most."""
    kl: list[float] = []
    far = 0.0
    for prompt, new, rows in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        theirs = torch.tensor(rows, dtype=torch.float64).log_softmax(-1)  # rounded as they came
        ours = _logprobs(model, prompt, torch.tensor(new[: len(theirs)]))
        kl += (ours.exp() * (ours - theirs)).sum(-1).tolist()
        likely = ours > ours.max(-1, keepdim=True).values - 10
        far = max(far, float((ours - theirs)[likely].abs().max()))
    return kl, far


@torch.no_grad()
def _logprobs(model: nn.Module, prompt: Tensor, new: Tensor) -> Tensor:
    """(tokens of `new`, V) fp64: of each new token's place, given all before it."""
    ids = torch.cat([prompt, new])[None].to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().cpu().log_softmax(-1)


def _judge_tokenizer(engine: Engine, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise RuntimeError(
            f"{engine.NAME} reads a text as {theirs} tokens, our tokenizer as {ours}"
        )


def speeds(
    engine: Engine, folder: Path, before: Path | None, text: Tensor, contexts: tuple[int, ...]
) -> list[dict]:
    """Tokens a second while decoding after each of `contexts`, of the parent's export and of this
    one, with the numbers that the engine takes by itself."""
    question = {
        "prompts": [text[:LENGTH].tolist()],
        "new": 1,
        "full": 0,
        "vocabulary": 1,
        "contexts": contexts,
        "repeats": REPEATS,
        "threads": engine.cores(),
    }
    parent = {} if before is None else engine.ask(before, question)["speeds"]
    after = engine.ask(folder, question)["speeds"]
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
