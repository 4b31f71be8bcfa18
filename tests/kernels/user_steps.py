"""Decode steps as `generate` makes them, on GPUs that are not there: with a mask and position_ids
that it grows itself, beams that change places, and models, backends and caches of all kinds.
`launches` runs the cases. Between two tokens the host waits for nothing: a value that is asked for
raises (`fake_gpu`)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from launches import case, qkv, where
from torch.utils._python_dispatch import _disable_current_modes
from user_launches import MODEL, made, model, one_document

import effattn
from effattn.kernels import ragged

UPDATE = "_update_model_kwargs_for_generation"
STEPS = 3
PROMPT = 70


@contextlib.contextmanager
def answered(padded: bool):
    """What the device would say of a prompt: its padding is on the left, 5 tokens of it at most, or
    there is none; position_ids are those of the real tokens."""
    from effattn import padding as rows
    from effattn.hf import position_ids
    from effattn.states import evicting, paged

    def of(cls, mask):
        seen = cls(mask.bool())
        seen.left = seen.begun = True
        seen.whole, seen.ends, seen.late = (not padded, 5 * padded, 5 * padded)
        return seen

    def check(layer, cached, batch, *args):
        if layer.own_positions and cached is not None:
            cached.state.shift = (0,) * batch
        return (0,) * batch

    def same(state, k, v, count):
        return [[False] * count] * len(k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Mask, "of", classmethod(of))
        patch.setattr(position_ids, "check", check)
        patch.setattr(paged.PagedState, "_same", same)
        patch.setattr(evicting.EvictingState, "_evict", evicted)
        yield


def evicted(state, q, mask, call) -> None:
    """In the place of an eviction, whose lengths the host asks for: of each head the first 20
    tokens stay, and all from number 50 on."""
    (k, v), stay = (state.newest.k, state.newest.v), 20
    batch, heads = k.shape[:2]
    rows = [
        ragged.encode(x[:, :, :stay], coding).flatten(0, 2)
        for x, coding in zip((k, v), state.rule.codings, strict=True)
    ]
    begin = torch.arange(0, len(rows[0]) + 1, stay, device=k.device)
    state.kept = ragged.Ragged(
        *rows,
        begin,
        torch.arange(batch, device=k.device),
        (stay,) * (batch * heads),
        tuple(range(batch)),
        (k.shape[3], v.shape[3]),
        k.dtype,
        state.rule.codings,
    )
    state.newest.k, state.newest.v = k[:, :, 50:].clone(), v[:, :, 50:].clone()
    state.newest.rooms, state.since = None, 0


@torch.no_grad()
def generated(kind: str, padded: bool, beams: bool = False, masked: bool = True, **options) -> None:
    """A prompt and steps of a swapped model, with what `generate` passes, but for the choice of
    tokens."""
    from fake_gpu import watch

    swapped = model(kind, **options)
    device, cache = where[-1], effattn.new_cache(swapped)
    ids = torch.zeros(2, PROMPT, dtype=torch.int64, device=device)
    given = {"past_key_values": cache, "position_ids": torch.zeros_like(ids), "use_cache": True}
    if masked:
        given["attention_mask"] = torch.ones_like(ids)
    order = torch.zeros(2, dtype=torch.int64, device=device)

    def step(tokens: int) -> None:
        nonlocal given
        inputs = swapped.prepare_inputs_for_generation(ids, next_sequence_length=tokens, **given)
        given = getattr(swapped, UPDATE)(swapped(**inputs), given)
        if beams:
            cache.reorder_cache(order)

    with one_document():
        with answered(padded):
            step(PROMPT)
        step(1)
        with watch() as seen:
            for _ in range(STEPS):
                step(1)
    if seen.waits:
        raise RuntimeError(f"a step waits: {seen.waits[:4]}")


@torch.no_grad()
def padded_steps(spec: str) -> None:
    """A padded prompt, and steps whose mask is known."""
    from fake_gpu import watch

    from effattn import padding

    attn = made(spec)
    state = attn.new_state()

    def step(tokens: int, seen: padding.Mask) -> None:
        padding.tell(seen.real, seen, own=True)
        attn(*qkv(tokens, tokens), state=state, padding_mask=seen.real)

    with answered(padded=True):
        seen = padding.Mask.of(torch.ones(2, PROMPT, dtype=torch.bool, device=where[-1]))
    step(PROMPT, seen)
    for watched in (False, True):
        with watch() if watched else contextlib.nullcontext() as noted:
            for _ in range(STEPS):
                longer = torch.cat([seen.real, seen.real.new_ones(2, 1)], dim=1)
                seen = seen.grown(longer)
                step(1, seen)
    if noted.waits:
        raise RuntimeError(f"a step waits: {noted.waits[:4]}")


@torch.no_grad()
def whole(kind: str = "llama", packed: str | None = None, auto=None, **options) -> None:
    """One call of a model whose projections are swapped, or of another class."""
    import transformers
    from fake_gpu import moved

    from effattn import prune

    if packed is None and auto is None:
        swapped = model(kind, **options)
    else:
        with _disable_current_modes():
            config = transformers.AutoConfig.for_model(kind, **MODEL)
            swapped = getattr(transformers, auto or "AutoModelForCausalLM").from_config(config)
            swapped = swapped.to(torch.bfloat16).eval()
            if packed is not None:
                ids = torch.arange(1024) % 100
                prune.oneshot(swapped, ids, method="magnitude", sparsity=packed)
                prune.pack(swapped, format=packed)
            if options:
                effattn.swap(swapped, **options)
        swapped = moved(swapped, where[-1])
    ids = torch.zeros(2, PROMPT, dtype=torch.int64, device=where[-1])
    with one_document():
        swapped(input_ids=ids)
        swapped(input_ids=ids[:, :1])


SWAPS = {
    "dense": dict(pattern="dense"),
    "sinks": dict(pattern="sliding", window=48, sinks=4),
    "linear": dict(pattern="linear"),
    "rerope": dict(positions="rerope(window=32)"),
    "int8": dict(cache="int8(group=32, residual=32, first=4)"),
}
MORE = {
    "by layer": dict(pattern={"1": "sliding(window=48)"}),
    "block": dict(pattern="block", block=32),
    "performer": dict(pattern="performer", features=64),
    "lsh": dict(pattern="lsh", rounds=2, buckets=8, chunk=16),
    "topk": dict(pattern="topk", window=32, block=16, blocks=3),
    "vq": dict(pattern="vq", codes=48, block=32),
    "strided": dict(pattern="strided", stride=16),
    "longformer": dict(pattern="longformer", window=33, global_tokens=3),
    "alibi": dict(positions="alibi"),
    "gated": dict(pattern="gated(delta=True)"),
    "hybrid": dict(pattern="hybrid(window=32, sinks=2)"),
    "evict": dict(cache="evict(policy='expected', keep=32, sinks=2, recent=8)"),
    "evict int8": dict(
        cache="evict(policy='snapkv(window=8)', keep=40, recent=8, adaptive=True, format='int8')"
    ),
    "paged": dict(cache="paged(page=16)"),
    "latent": dict(heads="latent(ratio=0.5)", calibration=torch.arange(2600) % 100),
    "latent sinks": dict(
        pattern="sliding(window=48, sinks=4)",
        heads="latent(ratio=0.5)",
        calibration=torch.arange(2600) % 100,
    ),
    "int4 ring": dict(pattern="sliding", window=48, cache="int4(group=32, residual=32)"),
}
# backends by themselves, with padding on the left
PADDED = (
    "dense",
    "block(block=24, look_back=2)",
    "sliding(window=48, sinks=4)",
    "longformer(window=33, global_tokens=3)",
    "fixed(stride=16, summary=2)",
    "vq(codes=48, block=32)",
    "linformer_blockwise(k=32, max_length=512, block=64)",
    "lsh(rounds=2, buckets=8, chunk=16)",
    "topk(window=32, sinks=4, block=16, blocks=3)",
    "linear(feature_map='hedgehog', decay=0.9)",
    "performer(features=64)",
    "gated(delta=True, gate='feature')",
    "hybrid(window=32, sinks=2)",
)
KINDS = ("gpt_neox", "gemma2", "gemma3_text", "qwen3")


def _cases() -> None:
    for name, options in SWAPS.items():
        case(f"generate {name} padded, beams", "llama", True, beams=True, **options)(generated)
    case("generate sinks", "llama", False, **SWAPS["sinks"])(generated)
    case("generate sinks without a mask", "llama", False, masked=False, **SWAPS["sinks"])(generated)
    for name, options in MORE.items():
        case(f"generate {name} padded", "llama", True, **options)(generated)
    for spec in PADDED:
        case(f"more {spec} padded", spec)(padded_steps)
    case("more monarch", projections="monarch(blocks=8)")(whole)
    case("more monarch sinks", projections="monarch(blocks=8)", **SWAPS["sinks"])(whole)
    case("more 2:4", packed="2:4")(whole)
    case("more 2:4 linear", packed="2:4", pattern="linear(feature_map='hedgehog')")(whole)
    bert = dict(kind="bert", auto="AutoModelForMaskedLM", pattern="sliding(window=33)")
    case("more bert", **bert)(whole)
    linearized = dict(pattern="linear", feature_map="hedgehog")
    case("generate linearized padded", "llama", True, **linearized)(generated)
    for kind in KINDS:
        case(f"generate {kind} sinks padded", kind, True, **SWAPS["sinks"])(generated)


_cases()
