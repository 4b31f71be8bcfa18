"""Decoding: one new query over a given cache, against SDPA and flex_attention; and whole steps with
a growing state, against plain transformers' cache."""

from __future__ import annotations

from bench.attention import ours, peer, race
from bench.case import Entry, Ratio, Target

PATTERNS = (
    "dense",
    "sliding(window=512)",
    "sliding(window=512, sinks=4)",
    "block(block=512)",
    "longformer(window=512, global_tokens=4)",
    "strided(stride=128)",
    "fixed(stride=128)",
    "s2(block=512)",
    "longnet(segments=[512, 2048], dilations=[1, 4])",
)
COLD = ((1, 65536), (16, 4096), (16, 16384))  # (batch, tokens) on a GPU


def cases(device, quick):
    """One new token over a cache that is not in the processor's own."""
    if device == "cuda":
        for batch, tokens in COLD[1:2] if quick else COLD:
            raced = [peer("SDPA", "dense"), peer("flex_attention", "dense"), ours("dense")]
            yield race(
                "decode", "bfloat16", tokens, raced, batch=batch, heads=32, kv_heads=8, dim=128
            )
    else:
        for kv_heads in (8, 2):
            for tokens in (1024, 2048) if quick else (1024, 4096, 16384, 32768):
                raced = [peer("SDPA", "dense"), ours("dense")]
                yield race("decode", "float32", tokens, raced, batch=4, kv_heads=kv_heads)
    sizes = {"heads": 32, "kv_heads": 8, "dim": 128} if device == "cuda" else {"kv_heads": 2}
    for tokens in (1024, 2048) if quick else (1024, 4096, 16384, 32768):
        raced = [peer("DynamicCache+SDPA", "dense"), *map(ours, PATTERNS)]
        yield race(
            "step", "bfloat16" if device == "cuda" else "float32", tokens, raced, batch=4, **sizes
        )


def targets(device):
    """Against SDPA, and how much of the bandwidth is reached."""
    if device == "cuda":
        for batch, tokens in COLD:
            name = race(
                "decode", "bfloat16", tokens, (), batch=batch, heads=32, kv_heads=8, dim=128
            ).name
            yield Target(
                f"decode reads K and V, B{batch} T={tokens}: share of the measured read bandwidth",
                Entry((name, "effattn dense"), "read_share"),
                "exact patterns on a GPU, bf16, GQA 4:1",
                least=0.8,
                unit="",
            )
        return
    for kv_heads in (8, 2):
        name = race("decode", "float32", 16384, (), batch=4, kv_heads=kv_heads).name
        yield Target(
            f"one query over a cache of 16384, 8 query and {kv_heads} K/V heads, against SDPA",
            Ratio((name, "SDPA dense"), (name, "effattn dense")),
            "our own",
            least=1,
        )
