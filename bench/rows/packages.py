"""Methods that are no softmax over keys, against the packages that have them: each does the same
work, or less.

On a GPU flash-linear-attention; the others have no kernels of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.attention import ours, peer, race
from bench.case import Ratio, Target

FORWARD, TRAINING = "forward", "forward+backward"
SOURCE = "approximate backends on a CPU: never slower than the known packages"
GPU_SOURCE = "approximate backends on a GPU: as fast as flash-linear-attention"
OWN = (
    "It draws parameters of its own, and is held to its method's dense formula with these, in "
    "fp64, at 512 tokens."
)


@dataclass(frozen=True)
class Method:
    """`specs`: what of ours takes part; the first does what the `packages` do. `tokens`: of the
    forward races, and `trained`, of forward + backward. `faster`: how many times as fast ours is to
    be in training. `tolerance`: of the packages' errors, if the usual one is too strict.
    `efficiency`: of the packages, for the plan."""

    name: str
    specs: tuple[str, ...]
    packages: tuple[str, ...]
    remark: str
    causal: bool = True
    tokens: tuple[int, ...] = (8192, 16384)
    trained: int = 8192
    faster: float = 1.0
    tolerance: float | None = None
    efficiency: float | None = None

    def race(self, what, tokens):
        """The packages and our backend at one length."""
        specs = [spec.format(tokens=tokens) for spec in self.specs]
        theirs = {"tolerance": self.tolerance} | (
            {"efficiency": self.efficiency} if self.efficiency else {}
        )
        raced = [*(peer(who, specs[0], **theirs) for who in self.packages), *map(ours, specs)]
        title = f"{self.name} against packages"
        return race(
            what, "float32", tokens, raced, title=title, remark=self.remark, causal=self.causal
        )

    def races(self, quick):
        """(what, tokens) of all its races."""
        if quick:
            return [(FORWARD, 512), (TRAINING, 512)]
        return [*((FORWARD, tokens) for tokens in self.tokens), (TRAINING, self.trained)]


METHODS = (
    Method(
        "linear",
        ("linear",),
        ("linear-attention-transformer",),
        tokens=(2048,),
        trained=2048,
        faster=2,
        efficiency=0.01,
        remark="As the package's modules call it, with blindspot_size=1: queries see what ours "
        "see. It writes 64 x 64 sums for every token, 1 GB at 8192: so both at 2048. Features are "
        "the package's own "
        "(softmax, exp), held to the dense formula.",
    ),
    Method(
        "linear, peer blind to 64 tokens",
        ("linear",),
        ("linear-attention-transformer(blindspot=64)",),
        remark="With blindspot_size=64 the package's queries see the buckets of 64 tokens before "
        "their own only, "
        "which is half of the work: not the newest 1 to 64 tokens, for which it recommends local "
        "attention beside "
        "it. Ours see all that is not later.",
    ),
    Method(
        "bidirectional linear",
        ("linear",),
        ("linear-attention-transformer",),
        causal=False,
        tokens=(8192,),
        remark="The package's keys are normalised over time (softmax), ours need a denominator.",
    ),
    Method(
        "performer",
        ("performer(features=256)",),
        ("performer-pytorch",),
        tokens=(2048,),
        trained=1024,
        faster=2,
        efficiency=0.015,
        remark=f"{OWN} Causal, performer-pytorch is meant for a CUDA extension; without it, it "
        "writes 256 x 64 sums "
        "for every token and takes 17 s a call at 8192: so both at 2048, and at 1024 with "
        "backward.",
    ),
    Method(
        "bidirectional performer",
        ("performer(features=256)",),
        ("performer-pytorch",),
        causal=False,
        tokens=(8192,),
        remark=OWN,
    ),
    Method(
        "linformer",
        (
            "linformer(k=256, max_length={tokens}, share='layer')",
            "linformer(k=256, max_length={tokens})",
        ),
        ("linformer",),
        causal=False,
        remark=f"{OWN} All its heads share E and F, as with share='layer' of ours; our default "
        "has them per head.",
    ),
    Method(
        "lsh",
        ("lsh(rounds=4, chunk=64, shared_qk=True)", "lsh(rounds=4, chunk=64)"),
        ("reformer-pytorch", "transformers-Reformer"),
        tokens=(8192,),
        tolerance=0.005,
        remark="The packages have q = k (as shared_qk=True of ours) and cut the whole sorted "
        "sequence into chunks, "
        "which later tokens move; ours count chunks inside of buckets. They draw rotations at "
        "every call: they are "
        "held to the paper's dense formula for the buckets that they drew, in fp64, at 512 "
        "tokens; within 0.5 %, "
        "because a token that sees only itself has a score of -5e4 or -1e5, which leaves fp32 few "
        "digits.",
    ),
)
ELU, RETENTION = "linear", "linear(feature_map='identity', decay='retnet', normalize=False)"
LENGTHS = (2048, 8192, 65536)


def cases(device, quick):
    """Our backends against the packages that have the same method."""
    if device == "cpu":
        for method in METHODS:
            yield from (method.race(what, tokens) for what, tokens in method.races(quick))
        return
    for dim in (64,) if quick else (64, 128):
        for tokens in LENGTHS[:1] if quick else LENGTHS:
            for spec in (ELU, RETENTION):
                yield from (_gpu_race(what, tokens, spec, dim) for what in (FORWARD, TRAINING))


def _gpu_race(what, tokens, spec, dim):
    raced = [peer("flash-linear-attention", spec, tolerance=0.01), ours(spec)]
    title = "linear against packages" if spec == ELU else "retention against packages"
    remark = (
        "Inputs are views of (B, T, H, D), as it wants them. It sums keys in bf16: 1 % of "
        "error is let pass."
    )
    return race(
        what,
        "bfloat16",
        tokens,
        raced,
        title=title,
        remark=remark,
        batch=max(1, 16384 // tokens),
        heads=32,
        kv_heads=32,
        dim=dim,
        time_first=True,
    )


def targets(device):
    """At least as fast as the packages are."""
    if device == "cuda":
        for dim in (64, 128):
            for tokens in LENGTHS:
                for spec in (ELU, RETENTION):
                    for what in (FORWARD, TRAINING):
                        case = _gpu_race(what, tokens, spec, dim)
                        said = (
                            f"{case.title}, {what}, against flash-linear-attention, D{dim} "
                            f"T={tokens}"
                        )
                        yield Target(said, _ratio(case), GPU_SOURCE, least=1)
        return
    for method in METHODS:
        for what, tokens in method.races(quick=False):
            case = method.race(what, tokens)
            for number, who in enumerate(method.packages):
                said = f"{method.name}, {what}, against {who}, T={tokens}"
                least = method.faster if what == TRAINING else 1
                yield Target(said, _ratio(case, number), SOURCE, least=least)


def _ratio(case, package=0):
    """The time of a package over that of the first of ours."""
    first = next(one for one in case.contenders if one.ours)
    return Ratio((case.name, case.contenders[package].name), (case.name, first.name))
