"""Exact patterns over whole sequences, forward and backward: against SDPA, compiled flex_attention,
local-attention and transformers' Longformer."""

from __future__ import annotations

from bench.attention import ours, peer, race
from bench.case import Ratio, Target

DENSE, WINDOW, WIDE = "dense", "sliding(window=512)", "sliding(window=4096)"
BLOCK, LOOKING_BACK = "block(block=512)", "block(block=256, look_back=1)"
LONGFORMER = "longformer(window=513, global_tokens=1)"
FORWARD, TRAINING = "forward", "forward+backward"
SOURCE = "exact patterns on a CPU, B1 H8 D64, window 512"
GPU_SOURCE = "exact patterns on a GPU, bf16, GQA 4:1"
LONGEST = 16384  # tokens beyond which dense attention takes 10 s a call on a CPU
LONGEST_LOCAL = {FORWARD: 16384, TRAINING: 4096}  # and the same of local-attention
LONGEST_FLEX_TRAINED = 1024  # it compiles, and then has no backward on CPUs: one row says so
GPU = {"heads": 32, "kv_heads": 8}


def cases(device, quick):
    """Whole sequences: exact patterns, forward and backward."""
    yield from _gpu(quick) if device == "cuda" else _cpu(quick)


def _cpu(quick):
    lengths = {
        (FORWARD, "float32"): (1024, 4096, 16384, 32768),
        (FORWARD, "bfloat16"): (4096, 16384),
        (TRAINING, "float32"): (1024, 4096, 16384),
    }
    for (what, dtype), all_lengths in lengths.items():
        for tokens in (1024,) if quick else all_lengths:
            yield race(what, dtype, tokens, _raced(what, tokens))
    for tokens in (1024,) if quick else (4096, 16384):
        raced = [peer("transformers-Longformer", LONGFORMER), ours(LONGFORMER)]
        yield race(FORWARD, "float32", tokens, raced, title="bidirectional", causal=False)


def _raced(what, tokens):
    dense = [peer("SDPA", DENSE)] * (tokens <= LONGEST)
    local = [peer("local-attention", WINDOW)] * (tokens <= LONGEST_LOCAL[what])
    flex = [peer("flex_attention", WINDOW)] * (what == FORWARD or tokens <= LONGEST_FLEX_TRAINED)
    return [*dense, *flex, *local, ours(WINDOW), ours(BLOCK), ours(LOOKING_BACK)]


def _gpu(quick):
    for dim in (128,) if quick else (64, 128):
        for tokens in (4096,) if quick else (1024, 4096, 16384, 65536):
            for what in (FORWARD, TRAINING):
                for spec, window in ((DENSE, 0), (WINDOW, 512), (WIDE, 4096)):
                    if window < tokens:
                        yield _gpu_race(what, tokens, spec, dim)


def _gpu_race(what, tokens, spec, dim, raced=True):
    dense = [peer(f"SDPA-{name}", DENSE) for name in ("flash", "cudnn", "efficient")]
    batch = max(1, 16384 // tokens)
    contenders = [*dense, peer("flex_attention", spec), ours(spec)] if raced else []
    return race(what, "bfloat16", tokens, contenders, title=spec, batch=batch, dim=dim, **GPU)


def targets(device):
    """Against SDPA and flex_attention."""
    return _gpu_targets() if device == "cuda" else _cpu_targets()


def _cpu_targets():
    def against(who, tokens, dtype="float32", what=FORWARD):
        name = race(what, dtype, tokens, ()).name
        return Ratio((name, who), (name, f"effattn {WINDOW}"))

    sdpa, flex = f"SDPA {DENSE}", f"flex_attention {WINDOW}"
    yield Target(
        "window 512 against SDPA's causal attention, T=16384",
        against(sdpa, 16384),
        SOURCE,
        least=10,
        headline="a window of 512 is {value}x as fast as SDPA's causal attention at 16k tokens",
    )
    yield Target(
        "window 512 against compiled flex_attention, T=4096", against(flex, 4096), SOURCE, least=1
    )
    yield Target(
        "window 512 against compiled flex_attention, T=16384",
        against(flex, 16384),
        SOURCE,
        least=1,
        headline="{value}x as fast as compiled flex_attention",
    )
    for tokens in (4096, 16384):
        yield Target(
            f"window 512 against compiled flex_attention, T={tokens}, bf16",
            against(flex, tokens, "bfloat16"),
            SOURCE,
            least=2,
        )
    yield Target(
        "training, window 512 against SDPA, T=16384",
        against(sdpa, 16384, what=TRAINING),
        SOURCE,
        least=6,
        headline="{value}x as fast in training",
    )


def _gpu_targets():
    for what in (FORWARD, TRAINING):
        for dim in (64, 128):
            for tokens in (4096, 16384, 65536):
                for spec, window in ((WINDOW, 512), (WIDE, 4096)):
                    if window < tokens:
                        name = _gpu_race(what, tokens, spec, dim, raced=False).name
                        value = Ratio((name, f"flex_attention {spec}"), (name, f"effattn {spec}"))
                        said = (
                            f"{what}, window {window} against compiled flex_attention, D{dim} "
                            f"T={tokens}"
                        )
                        yield Target(said, value, GPU_SOURCE, least=1)
