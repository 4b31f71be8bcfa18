"""How every exact pattern grows with the length, beside what it declares. Strides are square roots
of the length: that is what makes the sparse transformer's patterns grow with the power of 1.5."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.attention import growth, length_name
from bench.case import Ratio, Target

LINEAR = (
    "sliding(window=512)",
    "sliding(window=512, sinks=4)",
    "sliding(window=256, dilation=4)",
    "block(block=512)",
    "block(block=256, look_back=1)",
    "longformer(window=512, global_tokens=4)",
    "longnet(segments=[512, 2048], dilations=[1, 4])",
    "s2(block=512)",
)
TRAINED = ("sliding(window=512)", "block(block=512)")
TRAINING = "forward+backward"
MOST = 4.6  # from 8192 to 32768 tokens: 4 is linear


def cases(device, quick):
    """Each pattern at growing lengths, forward, and the trained ones backward."""
    for spec in LINEAR:
        yield _linear(spec, device, quick)
    for spec in TRAINED:
        yield _linear(spec, device, quick, TRAINING)
    settings = _settings(device)
    dense = (
        (512, 1024, 2048)
        if quick
        else (8192, 16384, 32768)
        if device == "cuda"
        else (2048, 4096, 8192)
    )
    yield growth("dense", 2, 1, dense, **settings)
    squares = (
        (256, 576, 1024)
        if quick
        else (16384, 25600, 36864, 65536)
        if device == "cuda"
        else (4096, 9216, 16384)
    )
    for name in ("strided", "fixed"):
        yield growth(Rooted(name), 1.5, 1, squares, title=f"{name}(stride=sqrt(T))", **settings)


@dataclass(frozen=True)
class Rooted:
    """The spec of `name` at each length, with its stride."""

    name: str

    def __call__(self, tokens):
        return f"{self.name}(stride={math.isqrt(tokens)})"


def _linear(spec, device, quick, what="forward"):
    lengths = (
        (1024, 2048, 4096)
        if quick
        else (16384, 32768, 65536)
        if device == "cuda"
        else (8192, 16384, 32768)
    )
    return growth(spec, 1, 1, lengths, what, **_settings(device))


def _settings(device):
    return {"dtype": "bfloat16", "heads": 32, "kv_heads": 8, "dim": 128} if device == "cuda" else {}


def targets(device):
    """On a CPU: the time of exact patterns grows no faster than their pairs."""
    if device == "cuda":
        return
    source = "exact patterns: at most 4.6 from 8192 to 32768 tokens"
    for what, specs in (("forward", LINEAR), (TRAINING, TRAINED)):
        for spec in specs:
            name = _linear(spec, device, False, what).name
            few, many = (name, length_name(8192)), (name, length_name(32768))
            if what == "forward":
                yield Target(
                    f"time, 32768 over 8192 tokens, {spec}", Ratio(many, few), source, most=MOST
                )
            if spec in TRAINED:
                said = f"peak memory, 32768 over 8192 tokens, {spec}, {what}"
                yield Target(
                    said,
                    Ratio(many, few, "peak_bytes"),
                    "exact patterns: memory is linear",
                    most=MOST,
                )
