"""Launches that a user's call makes, on GPUs that are not there: every backend forward, backward
and in decode steps, position rules, packed caches, and swapped models. `launches` runs the cases.

A decode step must not wait for the device: no value asked for, no copy, and nothing compiled that
an earlier step of the same kind has not."""

from __future__ import annotations

import contextlib
from itertools import product

import pytest
import torch
from launches import case, qkv, where
from torch.utils._python_dispatch import _disable_current_modes

import effattn

# name -> specs; each direction that the backend's traits allow
BACKENDS = (
    "dense",
    "block(block=32)",
    "block(block=24, look_back=2)",
    "sliding(window=49)",
    "sliding(window=48, sinks=4)",
    "sliding(window=9, dilation=2)",
    "sliding(window=49, sink_logits=True)",
    "longformer(window=49, global_tokens=3)",
    "longformer(window=49, global_tokens=[0, 5, 90])",
    "strided(stride=32)",
    "fixed(stride=32, summary=2)",
    "longnet(segments=[32, 128], dilations=[1, 4])",
    "s2(block=32)",
    "linformer(k=32, max_length=512)",
    "linformer_blockwise(k=32, max_length=512, block=64)",
    "vq(codes=48, block=32)",
    "linear",
    "linear(feature_map='softmax', decay=0.9)",
    "linear(feature_map='hedgehog')",
    "linear(feature_map='identity', decay=0.8, normalize=False)",
    "gated",
    "gated(delta=True, gate='feature')",
    "hybrid(window=32, sinks=2)",
    "lsh(rounds=2, buckets=8, chunk=16)",
    "topk(window=32, sinks=4, block=16, blocks=3)",
    "topk(window=32, block=1, blocks=16, summary='minmax')",
    "performer(features=64)",
    "performer(features=64, kernel='relu')",
)
EXACT = ("dense", "block(block=32, look_back=1)", "sliding(window=48)")
RULES = (
    "pi(factor=4)",
    "dynamic_ntk(factor=4)",
    "dynamic_yarn",
    "yarn(factor=4)",
    "rerope(window=64)",
    "leaky_rerope(window=64, k=8)",
    "logn",
    "alibi",
    "kerple",
    "sandwich",
    "nope",
)
STEPS = 10
LEARNED = ("kerple",)  # biases whose gradient the kernels do not have
CACHES = ("int8", "int4(group=32, residual=64)", "int2(group=32, first=4)", "fp8")


def made(spec: str) -> torch.nn.Module:
    """The backend, asked to run the kernels, with its parameters on the device."""
    from fake_gpu import moved

    name, options = effattn.specs.parse_spec(spec)
    with (
        _disable_current_modes()
    ):  # its numbers are the host's, and some of its choices are made of them
        backend = effattn.backend(name, **options, impl="auto")
        # parameters that wait for heads are made
        backend(*(torch.zeros(1, h, 300, 64) for h in (8, 2, 2)), causal=backend.traits.causal)
        backend.impl = "triton"
    return moved(backend, where[-1])


def whole(spec: str, causal: bool, rotary: str | None = None) -> None:
    """A whole sequence, and its backward pass."""
    from fake_gpu import backward, undriven

    q, k, v = qkv(grad=True)
    rule = turning(rotary)
    with torch.no_grad() if rotary in LEARNED else torch.enable_grad():
        out = made(spec)(q, k, v, causal=causal, **rule)
    if out.requires_grad:
        with undriven():
            backward(out)


def turning(rotary: str | None) -> dict:
    if rotary is None:
        return {}
    from fake_gpu import moved

    with _disable_current_modes():
        rule = effattn.positions.rule(rotary, length=128, head_dim=64, heads=8)
    return {"rotary": moved(rule, where[-1])}


@torch.no_grad()
def steps(backend, state, rotary: str | None = None, prompt: int = 130) -> None:
    """A prompt, a few tokens at once, and tokens one by one: those wait for nothing."""
    from fake_gpu import watch

    rule = turning(rotary)
    for tokens in (prompt, 3, 1, 1):
        backend(*qkv(tokens, tokens), state=state, **rule)
    with watch() as seen:
        for _ in range(STEPS):
            backend(*qkv(1, 1), state=state, **rule)
    if seen.waits:
        raise RuntimeError(f"a step waits: {seen.waits[:4]}")
    # a cache that fills up may need one more of each kind; hybrid has kernels of three
    if sum(seen.compiled.values()) > (3 if backend.name == "hybrid" else 2):
        raise RuntimeError(f"steps compile {seen.compiled}")


def _backend_cases() -> None:
    for spec in BACKENDS:
        traits = effattn.backends()[effattn.specs.parse_spec(spec)[0]].traits
        both = traits.bidirectional and not any(x in spec for x in ("sinks=", "decay="))
        for causal in (*[True] * traits.causal, *[False] * both):
            case(f"backend {spec}{'' if causal else ' both ways'}", spec, causal)(whole)
        if traits.causal:
            case(f"backend {spec} steps")(
                lambda spec=spec: steps(attn := made(spec), attn.new_state())
            )
    for spec, rule in product(EXACT, RULES):
        case(f"backend {spec} {rule}", spec, True, rule)(whole)
        case(f"backend {spec} {rule} steps")(
            lambda spec=spec, rule=rule: steps(attn := made(spec), attn.new_state(), rule)
        )


# ---- packed caches


def packed_steps(pattern: str, cache: str, rotary: str | None) -> None:
    """A prompt, and steps over a packed cache, during which tokens are packed."""
    from effattn.quant.formats import Format
    from effattn.quant.packed.kind import Packed

    backend = made(pattern)
    kind = Packed(cache, Format.parse(cache).fit(64)[0])
    steps(backend, kind.new_state(backend), rotary, prompt=300)


def _packed_cases() -> None:
    for pattern, cache in product((*EXACT, "sliding(window=48, sinks=4)"), CACHES):
        rules = (None, "yarn(factor=4)") if "sinks" in pattern else (None, "rerope(window=64)")
        for rule in rules:
            case(f"cache {cache} {pattern} {rule or ''}", pattern, cache, rule)(packed_steps)


# ---- models

MODEL = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=512,
)
SWAPS = {
    "dense": dict(pattern="dense"),
    "sliding": dict(pattern="sliding", window=48, sinks=4),
    "block": dict(pattern="block", block=32),
    "by layer": dict(pattern={"0": "dense", "1": "sliding(window=48)"}),
    "linear": dict(pattern="linear"),
    "performer": dict(pattern="performer", features=64),
    "lsh": dict(pattern="lsh", rounds=2, buckets=8, chunk=16),
    "topk": dict(pattern="topk", window=32, block=16, blocks=3),
    "vq": dict(pattern="vq", codes=48, block=32),
    "rerope": dict(positions="rerope(window=64)"),
    "yarn": dict(pattern="dense", positions="yarn(factor=4)"),
    "alibi": dict(positions="alibi"),
    "int8": dict(cache="int8"),
    "int4": dict(pattern="sliding", window=96, sinks=4, cache="int4(group=32, residual=64)"),
    "rerope int4": dict(positions="rerope(window=64)", cache="int4(group=32)"),
}


def model(kind: str = "llama", **options):
    """A tiny random one, bf16, as swap(**options) leaves it, on the device."""
    import transformers
    from fake_gpu import moved

    with _disable_current_modes():
        config = transformers.AutoConfig.for_model(kind, **MODEL)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if options:
            options = dict(options)
            effattn.swap(
                made.eval(), *[options.pop(x) for x in ("pattern",) if x in options], **options
            )
            for layer in made.modules():
                if isinstance(layer, effattn.interface.Backend):
                    layer.impl = "triton"
    return moved(made, where[-1])


@contextlib.contextmanager
def one_document():
    """Answers what transformers and we ask of a whole sequence's position_ids, which have no values
    here: they are those of one document."""
    from transformers import masking_utils

    from effattn.hf import live, packed_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        patch.setattr(masking_utils, "is_tracing", lambda *args: False)
        patch.setattr(live, "is_tracing", lambda *args: False)
        patch.setattr(packed_rows, "find", lambda *args: None)
        yield


def forward(kind: str = "llama", **options) -> None:
    """A training step of a swapped model."""
    from fake_gpu import backward

    made = model(kind, **options).train()
    ids = torch.zeros(2, 200, dtype=torch.int64, device=where[-1])
    with one_document():
        backward(made(input_ids=ids, use_cache=False).logits.float().sum())


@torch.no_grad()
def generation(kind: str = "llama", **options) -> None:
    """A prompt and decode steps of a swapped model, as `generate` makes them, but for the choice of
    tokens."""
    from fake_gpu import watch

    made = model(kind, **options)
    cache = effattn.new_cache(made)

    def step(tokens: int) -> None:
        ids = torch.zeros(2, tokens, dtype=torch.int64, device=where[-1])
        made(input_ids=ids, past_key_values=cache)

    step(130)
    step(1)
    with watch() as seen:
        for _ in range(STEPS):
            step(1)
    if seen.waits:
        raise RuntimeError(f"a step waits: {seen.waits[:4]}")
    if not seen.launches:
        raise RuntimeError("a step launches nothing of ours")


def _model_cases() -> None:
    for name, options in SWAPS.items():
        case(f"model {name} steps", **options)(generation)
        if "cache" not in options:
            case(f"model {name}", **options)(forward)


_backend_cases()
_packed_cases()
_model_cases()
