"""The headlines: which ratios say whether the kernels are good, in the order of their worth.

Beside each stand the target and what was predicted of an H200 before any kernel had run on one:
from instructions, registers and bytes of the machine code that Triton 3.6 makes for sm_90, by hand;
"up to" where `kernels/marks.py` says it of today's kernels, by a model that knows no cache, no
launch and no tail."""

from __future__ import annotations

from dataclasses import dataclass

from bench.case import entry_of

LARGE = "H32/8 D128"


@dataclass(frozen=True)
class Headline:
    """what: the words of the table. of, over: contenders of `case`, whose times are compared: over
    divided by of, so that more is better; over "" is the share of the read bandwidth that `of`
    reaches."""

    what: str
    case: str
    of: str
    over: str
    target: float
    predicted: str = "-"

    def value(self, results: dict) -> float | None:
        """What was measured, of `results` as the benchmark has them."""
        if not self.over:
            return entry_of(results, self.case, self.of, "read_share")
        mine, theirs = (entry_of(results, self.case, who, "ms_p50") for who in (self.of, self.over))
        return theirs / mine if mine and theirs else None


DECODE, LONG = (
    f"decode bfloat16 {b} {LARGE} {t}" for b, t in (("B16", "T16384"), ("B1", "T65536"))
)
PACKED = f"decode packed bfloat16 B8 {LARGE} T32768"
WINDOW = "sliding(window=512)"
FORWARD, TRAINING, DENSE, DENSE_64 = (
    f"{what} {spec} bfloat16 B1 H32/8 D{dim} T16384"
    for what, spec, dim in (
        ("forward", WINDOW, 128),
        ("forward+backward", WINDOW, 128),
        ("forward", "dense", 128),
        ("forward", "dense", 64),
    )
)
SPARSE = "2:4 product bfloat16 4096x14336 rows1"
REROPE = f"forward ReRoPE bfloat16 B1 {LARGE} T16384"
MONARCH = "product bfloat16 4096x4096 rows512"
LINEAR, TRAINED, RETAINED = (
    f"{what} against packages bfloat16 B2 H32/32 D64 T8192"
    for what in ("forward linear", "forward+backward linear", "forward retention")
)
FLA, RETENTION = (
    "flash-linear-attention",
    "linear(feature_map='identity', decay='retnet', normalize=False)",
)
OURS, FLEX = f"effattn {WINDOW}", f"flex_attention {WINDOW}"
FULL, DENSELY = "effattn full", "effattn dense"

HEADLINES = (
    Headline("decode, of the read bandwidth", DECODE, DENSELY, "", 0.8, "0.75 to 0.85"),
    Headline("decode of one row, of the read bandwidth", LONG, DENSELY, "", 0.8, "0.75 to 0.85"),
    Headline("decode against SDPA", DECODE, DENSELY, "SDPA dense", 1.0),
    Headline("decode int8 against bf16", PACKED, "effattn int8", FULL, 1.7, "up to 1.94"),
    Headline("decode int4 against bf16", PACKED, "effattn int4", FULL, 2.6, "up to 2.36"),
    Headline("decode int2 against bf16", PACKED, "effattn int2", FULL, 2.6),
    Headline("decode fp8 against bf16", PACKED, "effattn fp8", FULL, 1.5, "up to 1.66"),
    Headline("window 512 against flex_attention", FORWARD, OURS, FLEX, 1.0, "0.95 to 1.10"),
    Headline("window 512, training", TRAINING, OURS, FLEX, 1.0, "0.75 to 0.90"),
    Headline("dense against SDPA's flash kernel", DENSE, DENSELY, "SDPA-flash dense", 1.0),
    Headline("dense, D64, against it", DENSE_64, DENSELY, "SDPA-flash dense", 1.0, "0.85 to 1.00"),
    Headline(
        "2:4 against dense, one row",
        SPARSE,
        "effattn packed 2:4",
        "torch dense",
        1.4,
        "up to 1.60",
    ),
    Headline("bitmask against dense, one row", SPARSE, "effattn bitmask", "torch dense", 1.4),
    Headline(
        "ReRoPE against our dense",
        REROPE,
        "effattn rerope(window=512)",
        DENSELY,
        1 / 1.15,
        "0.90 to 0.95",
    ),
    Headline("linear against fla", LINEAR, "effattn linear", f"{FLA} linear", 1.0, "1.20 to 1.50"),
    Headline("linear, training", TRAINED, "effattn linear", f"{FLA} linear", 1.0),
    Headline(
        "retention against fla",
        RETAINED,
        f"effattn {RETENTION}",
        f"{FLA} {RETENTION}",
        1.0,
        "0.65 to 0.75",
    ),
    Headline(
        "Monarch, 512 rows", MONARCH, "effattn monarch(blocks=32)", "nn.Linear 4096x4096", 1.0
    ),
)
