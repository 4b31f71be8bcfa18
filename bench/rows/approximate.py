"""Methods that are no softmax over keys: against SDPA, how they grow with the length, and how long
a step of decoding takes after few and after many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.attention import growth, length_name, ours, peer, race
from bench.case import Ratio, Target

TOKENS = 16384
LINEAR, PERFORMER, VQ, LSH, TOPK = (
    "linear",
    "performer(features=256)",
    "vq(codes=512)",
    "lsh(rounds=4, chunk=64)",
    "topk(window=512, block=64, blocks=8)",
)
GATED, DELTA = "gated", "gated(delta=True)"
HYBRID = "hybrid(window=512)"
COMPRESSED = "sliding(window=512, compress=4)"
BLOCKWISE = "linformer_blockwise(k=256)"
FEW, MANY = 1024, 65536  # tokens before a step
SOURCE = "approximate backends on a CPU, B1 H8 D64, fp32"


@dataclass(frozen=True)
class UpTo:
    """The spec of Linformer, made for the length it gets."""

    def __call__(self, tokens):
        return f"linformer(k=256, max_length={tokens})"


LINFORMER = UpTo()
# (spec, causal, how many times as fast as SDPA it is to be)
AGAINST_SDPA = (
    (LINEAR, True, 20),
    (PERFORMER, True, 5),
    (LSH, True, 3),
    (TOPK, True, 6),
    (LINFORMER(TOKENS), False, 12),
)
# (spec, time at 32768 over time at 8192 tokens that it may take); 4 is linear
GROWN = (
    (LINEAR, 4.6),
    (PERFORMER, 4.6),
    (VQ, 4.6),
    (LINFORMER, 4.6),
    (LSH, 5),
    (BLOCKWISE, None),
    (TOPK, 4.9),
    (GATED, 4.6),
    (DELTA, 4.6),
    (HYBRID, 4.6),
    (COMPRESSED, 4.6),
)
STEPS = (LINEAR, PERFORMER, VQ, LSH, TOPK)
FLAT = STEPS[:2]


def cases(device, quick):
    """Growth of the approximate methods, and their races with SDPA."""
    for spec, _ in GROWN:
        yield _growth(spec, device, quick)
    for causal in (True, False):
        yield _race(causal, 1024 if quick else TOKENS, device)
    yield _steps(device, (FEW, 2048) if quick else (FEW, MANY))


def _settings(device):
    return (
        {"dtype": "bfloat16", "heads": 32, "kv_heads": 8}
        if device == "cuda"
        else {"dtype": "float32"}
    )


def _growth(spec, device, quick):
    lengths = (
        (1024, 2048, 4096)
        if quick
        else (16384, 32768, 65536)
        if device == "cuda"
        else (8192, 16384, 32768)
    )
    title = "linformer(k=256, max_length=T)" if spec is LINFORMER else ""
    # every query sees a slot of every earlier block: quadratic, at 1/16 of dense
    time = 2 if spec is BLOCKWISE else 1
    return growth(
        spec, time, 1, lengths, title=title, causal=spec is not LINFORMER, **_settings(device)
    )


def _race(causal, tokens, device):
    specs = [
        spec.replace(str(TOKENS), str(tokens))
        for spec, one_way, _ in AGAINST_SDPA
        if one_way == causal
    ]
    title = "approximate" if causal else "approximate bidirectional"
    raced = [peer("SDPA", "dense"), *map(ours, specs)]
    return race(
        "forward", tokens=tokens, contenders=raced, title=title, causal=causal, **_settings(device)
    )


def _steps(device, lengths):
    """Few and many tokens in one race: they take turns, for steps of a tenth of a millisecond."""
    raced = [
        replace(ours(spec, setup=tokens / 20000), name=_step_name(spec, tokens), tokens=tokens)
        for spec in STEPS
        for tokens in lengths
    ]
    return race(
        "step",
        tokens=max(lengths),
        contenders=raced,
        title="after few and many tokens",
        **_settings(device),
    )


def _step_name(spec, tokens):
    return f"effattn {spec} after {tokens}"


def targets(device):
    """On a CPU: faster than SDPA by so much at `TOKENS`."""
    if device == "cuda":
        return
    for spec, causal, least in AGAINST_SDPA:
        name = _race(causal, TOKENS, device).name
        said = f"{spec} against SDPA, {'causal' if causal else 'bidirectional'}, T={TOKENS}"
        headline = "linear attention is {value}x as fast" if spec == LINEAR else ""
        value = Ratio((name, "SDPA dense"), (name, f"effattn {spec}"))
        yield Target(said, value, SOURCE, least=least, headline=headline)
    for spec, most in GROWN:
        if most:
            name = _growth(spec, device, False).name
            value = Ratio((name, length_name(32768)), (name, length_name(8192)))
            said = "linformer(k=256)" if spec is LINFORMER else spec
            yield Target(f"time, 32768 over 8192 tokens, {said}", value, SOURCE, most=most)
    name = _steps(device, (FEW, MANY)).name
    for spec in FLAT:
        value = Ratio((name, _step_name(spec, MANY)), (name, _step_name(spec, FEW)))
        yield Target(
            f"a step of decoding after {MANY} over one after {FEW} tokens, {spec}",
            value,
            SOURCE,
            most=1.1,
        )
