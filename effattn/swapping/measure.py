"""The three measurements of a swap: perplexity by context, one long stream, and text past the
trained length.

Each returns a JSON-able dict of raw numbers; perplexities are exp of a mean cross-entropy in nats a
token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from effattn.encoding import begun
from effattn.evaluate.loss import Progress, perplexity_of, token_losses
from effattn.evaluate.streaming import stream_losses
from effattn.hf import anatomy
from effattn.hf.beginning import bos_of
from effattn.hf.placement import device_of, input_device
from effattn.surgery.describing import describe

MOST_REFERENCE = 2048  # tokens in a window of the reference: it is recomputed for every window


def scores(losses: torch.Tensor) -> dict[str, float]:
    """Cross-entropy and perplexity of some tokens' losses."""
    mean = losses.double().mean().item()
    return {"cross_entropy": mean, "perplexity": perplexity_of(mean)}


def model_facts(model) -> dict[str, object]:
    """What the report says of the model, as it is now."""
    told, parts = describe(model), anatomy.of(model)
    return {
        "class": told.model,
        "dtype": told.dtype,
        "device": str(device_of(parts.layers[0].k.module)),
        "layers": len(parts.layers),
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "parameters": told.parameters["total"],
        "trained_length": parts.trained_length,
        "kv_bytes_per_token": told.kv_bytes_per_token,
    }


def context_tokens(contexts: Sequence[int], scored: int) -> int:
    """How many tokens `by_context` reads."""
    return max(contexts, default=0) + scored + 1 if contexts else 0


def by_context(
    model,
    tokens: torch.Tensor,
    contexts: Sequence[int],
    scored: int,
    progress: Progress | None = None,
    bos: bool | None = None,
) -> list[dict]:
    """Perplexity of the same `scored` tokens at every context c: each is predicted from c/2 to c
    tokens before it.

    The windows of a context overlap by half, and the tokens lie behind the longest context, so that
    no context has the advantage of other tokens or the handicap of a first window. tokens: int64,
    at least `context_tokens` of them. bos: as in `token_losses`, here and below."""
    longest, rows = max(contexts, default=0), []
    for number, context in enumerate(contexts):
        stride = context // 2
        overlap = context - stride

        def inside(done, total, number=number):
            if progress:
                progress(1000 * number + 1000 * done // total, 1000 * len(contexts))

        start = time.perf_counter()
        part = tokens[longest - overlap : longest + scored + 1]
        losses = token_losses(model, part, context, stride, bos=bos, progress=inside)[overlap:]
        seconds = time.perf_counter() - start
        rows.append(
            {
                "context": context,
                "tokens": len(losses),
                **scores(losses),
                "seconds": round(seconds, 3),
            }
        )
    return rows


def stream(
    model,
    tokens: torch.Tensor,
    chunk: int,
    edges: Sequence[int],
    bucket: int,
    progress: Progress | None = None,
    bos: bool | None = None,
) -> dict:
    """Streams `tokens` through the model's own cache: perplexity per bucket and between `edges`,
    bytes held.

    edges: token counts, ascending from 0; a span that the stream does not reach is left out.
    """
    start = time.perf_counter()
    losses, held = stream_losses(model, tokens, chunk, progress=progress, bos=bos)
    return {
        "tokens": len(losses),
        "spans": spans(losses, edges),
        "buckets": buckets(losses, bucket),
        "cache_bytes": [[min((i + 1) * chunk, len(losses)), size] for i, size in enumerate(held)],
        "seconds": round(time.perf_counter() - start, 3),
    }


def reference(
    model,
    tokens: torch.Tensor,
    context: int,
    edges,
    bucket: int,
    progress: Progress | None = None,
    bos: bool | None = None,
) -> dict:
    """What the unchanged model makes of the same stream when it may start afresh: windows of
    `context` tokens that overlap by half, without a cache. It says how hard the text is at every
    place; its cost is a window a half."""
    start = time.perf_counter()
    losses = token_losses(model, tokens, context, max(1, context // 2), bos=bos, progress=progress)
    return {
        "context": context,
        "tokens": len(losses),
        "spans": spans(losses, edges),
        "buckets": buckets(losses, bucket),
        "seconds": round(time.perf_counter() - start, 3),
    }


def spans(losses: torch.Tensor, edges: Sequence[int]) -> list[dict]:
    """Scores between neighbouring `edges`, of the spans that `losses` cover whole."""
    pairs = [(first, last) for first, last in pairwise(edges) if last <= len(losses)]
    return [{"first": first, "last": last, **scores(losses[first:last])} for first, last in pairs]


def buckets(losses: torch.Tensor, size: int) -> list[dict]:
    """Scores of every `size` tokens; a rest of less than half a bucket joins the last one, it would
    be noise.
    """
    edges = [*range(0, len(losses), size), len(losses)]
    if len(edges) > 2 and edges[-1] - edges[-2] < size / 2:
        del edges[-2]
    return spans(losses, edges)


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompt: torch.Tensor,
    new: int,
    temperature: float,
    seed: int,
    trained: int | None,
    bos: bool | None = None,
) -> dict:
    """`new` tokens after `prompt` (N,) by `model.generate`: the text within the trained length and
    the text past it.

    temperature 0 is greedy. The end-of-text token is not allowed to end it, so that every run has
    the same length."""
    device = input_device(model)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = begun(prompt, bos_of(model, bos))[None].to(device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **(sampling if temperature else {"do_sample": False}),
        )[0, len(prompt) :].cpu()
    cut = new if trained is None else min(new, max(0, trained - len(prompt)))
    return {
        "tokens": len(out),
        "tokens_within": cut,
        "within": decode(tokenizer, out[:cut]),
        "past": decode(tokenizer, out[cut:]),
        "ids": out.tolist(),
        "seconds": round(time.perf_counter() - start, 3),
    }


def decode(tokenizer, ids: torch.Tensor) -> str:
    """The text of token ids, as it is: special tokens shown, no spaces tidied."""
    return tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
