"""Every kernel, with every option that its Python entry can pass, launched on a GPU that is not
there; and every launch that a user's call makes: backends forward, backward and in decode steps,
packed caches, swapped models.

    python tests/kernels/launches.py [how names begin, by comma] [depth] [sm_90,gfx942]

runs the cases and prints JSON: what failed. A case is a function without arguments; it fails by
raising."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

CASES: dict[str, Callable[[], None]] = {}
where: list[torch.device] = []  # the device of the case that runs
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def case(name: str, *args, **options):
    """Adds a call of the function below it as a case."""

    def add(run):
        assert name not in CASES, name
        CASES[name] = lambda: run(*args, **options)
        return run

    return add


def tensor(*shape: int, dtype=BF16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, device=where[-1], dtype=dtype, requires_grad=grad)


def qkv(queries=200, keys=200, dim=64, value_dim=None, dtype=BF16, heads=(8, 2), grad=False):
    """q, k, v of two rows; tokens outside of heads, as in a model."""
    sizes = ((heads[0], queries, dim), (heads[1], keys, dim), (heads[1], keys, value_dim or dim))
    return [tensor(2, t, h, d, dtype=dtype, grad=grad).transpose(1, 2) for h, t, d in sizes]


def padding(keys: int = 200) -> torch.Tensor:
    return torch.ones(2, keys, dtype=torch.bool, device=where[-1])


# ---- flash


def flash(pattern=None, layout=None, *, backward=True, sizes=None, rules=None, **options) -> None:
    """One call of the flash kernels and its backward pass. rules: made from q and k."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.flash import attention

    q, k, v = qkv(**(sizes or {}), grad=backward)
    options |= rules(q, k) if rules else {}
    out, lse = attention(q, k, v, pattern, layout and layout(), impl="triton", lse=True, **options)
    if backward:
        run_backward(out)
        run_backward(lse)


def _flash_cases() -> None:
    from effattn.kernels.flash import Bias, Blocks, Dropout, Far, Layout, Pattern, Window
    from effattn.kernels.flash.pattern import layout_of

    patterns = {
        "full": Pattern(),
        "window": Window(back=32),
        "sinks": Window(back=32, first=4),
        "ahead": Window(back=9, ahead=9),
        "blocks": Blocks(size=32, look_back=1),
        "shifted": Blocks(size=32, shifted=True),
    }
    for name, pattern in patterns.items():
        causal = name != "ahead"
        case(f"flash {name}", pattern, causal=causal)(flash)
        case(f"flash {name} padded", pattern, lambda: layout_of(padding()), causal=causal)(flash)
    case("flash both ways", causal=False)(flash)
    # what Triton specialises on: types, widths that are no powers of two, strides that are no
    # multiples of 16, sizes of 1
    for dtype, dim in product((BF16, FP16, FP32), (16, 64, 80, 128, 256)):
        sizes = dict(dim=dim, value_dim=dim // 2 if dim == 80 else dim, dtype=dtype)
        case(f"flash {NAMES[dtype]} {dim}", sizes=sizes)(flash)
    for queries, keys in ((1, 1), (1, 200), (17, 33), (4096, 4096)):
        case(f"flash {queries} of {keys}", sizes=dict(queries=queries, keys=keys))(flash)
    case("flash one head", sizes=dict(heads=(1, 1)))(flash)
    case("flash softcap", softcap=30.0)(flash)
    case(
        "flash softcap sinks padded", patterns["sinks"], lambda: layout_of(padding()), softcap=30.0
    )(flash)
    case("flash slots", patterns["sinks"], lambda: Layout(slots=4, tail=50))(flash)

    def first(q, k):
        return {"q_first": torch.empty_like(q).requires_grad_()}

    case("flash q_first", patterns["sinks"], rules=first)(flash)
    for layout in ("", " padded"):
        held = (lambda: layout_of(padding())) if layout else None

        def far(q, k):
            return {"far": Far(torch.empty_like(q), torch.empty_like(k), window=48)}

        def drop(q, k, rows=2 if layout else 1):
            numbers = torch.zeros(rows, k.shape[2], dtype=torch.int32, device=k.device)
            return {"drop": Dropout(0.1, numbers.new_zeros(q.shape[:3]), numbers)}

        case(f"flash dropout{layout}", layout=held, rules=drop)(flash)
        case(f"flash dropout sinks{layout}", patterns["sinks"], held, rules=drop)(flash)
        case(f"flash far{layout}", layout=held, rules=far)(flash)
        case(f"flash far window{layout}", Window(back=100), held, rules=far)(flash)
        for kind, numbers in (("alibi", 1), ("kerple_log", 2), ("kerple_power", 2), ("table", 9)):

            def bias(q, k, kind=kind, numbers=numbers):
                return {"bias": Bias(kind, tensor(q.shape[1], numbers, dtype=FP32))}

            case(f"flash {kind}{layout}", layout=held, rules=bias)(flash)
            if not layout:
                case(f"flash {kind} softcap", rules=bias, softcap=9.0)(flash)


# ---- decode


def decode(pattern=None, layout=None, *, sizes=None, rules=None, **options) -> None:
    """One call of the decode kernels."""
    from effattn.kernels.decode import attention

    q, k, v = qkv(**{"queries": 1, **(sizes or {})})
    options |= rules(q, k) if rules else {}
    with torch.no_grad():
        attention(q, k, v, pattern, layout and layout(), impl="triton", lse=True, **options)


def turned(q, far: bool, **options):
    from effattn.kernels.decode import Turn

    more = {"window": 48, "q_far": torch.empty_like(q)} if far else {}
    return {"turn": Turn(tensor(q.shape[3] // 2, dtype=FP32), **more, **options)}


def _decode_cases() -> None:
    from effattn.kernels.flash import Bias, Blocks, Layout, Pattern, Window
    from effattn.kernels.flash.pattern import layout_of

    patterns = {
        "full": Pattern(),
        "window": Window(back=32),
        "sinks": Window(back=32, first=4),
        "blocks": Blocks(size=32, look_back=1),
    }

    def ring(slots: int = 0, padded: bool = False):
        mask = padding() if padded else None
        at = torch.arange(slots, device=where[-1]) if slots else None
        start = torch.zeros(2, dtype=torch.int64, device=where[-1]) if padded else None
        number = torch.arange(200 - slots, device=where[-1])
        return Layout(slots, 0, start, mask, at, number, 5000)

    layouts = {
        "": None,
        " padded": lambda: layout_of(padding()),
        " ring": ring,
        " ring and slots": lambda: ring(4),
        " padded ring": lambda: ring(4, padded=True),
        " slots": lambda: Layout(slots=4, tail=50),
    }
    for (name, pattern), (more, layout) in product(patterns.items(), layouts.items()):
        case(f"decode {name}{more}", pattern, layout)(decode)
    for dtype, dim in product((BF16, FP16, FP32), (16, 64, 80, 128, 256)):
        sizes = dict(dim=dim, value_dim=dim // 2 if dim == 80 else dim, dtype=dtype)
        case(f"decode {NAMES[dtype]} {dim}", sizes=sizes)(decode)
    for queries, keys in ((1, 1), (3, 40), (16, 200), (1, 65536)):
        case(f"decode {queries} of {keys}", sizes=dict(queries=queries, keys=keys))(decode)
    case("decode softcap", softcap=30.0)(decode)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        counts = lambda q, k, dtype=dtype: {  # noqa: E731
            "counts": tensor(1, 1, 1, k.shape[2], dtype=dtype)
        }
        case(f"decode counts {dtype}", rules=counts)(decode)
    first = lambda q, k: {"q_first": torch.empty_like(q)}  # noqa: E731
    case("decode q_first", patterns["sinks"], rules=first)(decode)
    for kind, numbers in (("alibi", 1), ("kerple_log", 2), ("kerple_power", 2), ("table", 9)):

        def bias(q, k, kind=kind, numbers=numbers):
            return {"bias": Bias(kind, tensor(q.shape[1], numbers, dtype=FP32))}

        case(f"decode {kind}", rules=bias)(decode)
        case(f"decode {kind} turned", rules=lambda q, k, b=bias: b(q, k) | turned(q, False))(decode)
    for name, far, options in (
        ("turn", False, {}),
        ("interleaved", False, {"interleaved": True}),
        ("scaled", False, {"scaling": 1.2}),
        ("rerope", True, {}),
        ("leaky rerope", True, {"slow": 8.0}),
    ):
        rule = lambda q, k, far=far, options=options: turned(q, far, **options)  # noqa: E731
        for more, layout in layouts.items():
            case(f"decode {name}{more}", layout=layout, rules=rule)(decode)
    partly = lambda q, k: turned(q[..., :32], False)  # noqa: E731
    case("decode partial turn", rules=partly)(decode)
    both = lambda q, k: turned(q, False) | first(q, k)  # noqa: E731
    case("decode turned q_first", patterns["sinks"], rules=both)(decode)


# ---- latents


def latent(
    pattern=None,
    layout=None,
    *,
    sizes=(8, 2, 64, 96),
    dtype=BF16,
    queries=1,
    rules=None,
    bias=True,
    **options,
) -> None:
    """One call of the kernels over latents. sizes: Hq, Hkv, D, r."""
    from effattn.kernels.latent import Maps, attention

    heads, kv_heads, dim, rank = sizes
    q = tensor(2, queries, heads, dim, dtype=dtype).transpose(1, 2)
    c = tensor(2, 200, rank, dtype=dtype)
    weights = [tensor(kv_heads, dim, rank, dtype=dtype) for _ in range(2)]
    biases = [tensor(kv_heads, dim, dtype=dtype) for _ in range(2 * bias)]
    options |= rules(q, None) if rules else {}
    with torch.no_grad():
        attention(
            q, c, Maps(*weights, *biases), pattern, layout and layout(), impl="triton", **options
        )


def _latent_cases() -> None:
    from effattn.kernels.flash import Bias, Blocks, Layout, Window
    from effattn.kernels.flash.pattern import layout_of

    def ring(slots: int = 4):
        at = torch.arange(slots, device=where[-1])
        return Layout(slots, 0, None, None, at, torch.arange(196, device=where[-1]), 5000)

    def bias(q, k):
        return {"bias": Bias("alibi", tensor(q.shape[1], 1, dtype=FP32))}

    turn = lambda q, k: turned(q, False)  # noqa: E731
    wide = dict(sizes=(8, 2, 64, 600))
    for name, pattern, layout in (
        ("full", None, None),
        ("sinks", Window(back=32, first=4), None),
        ("blocks padded", Blocks(size=32), lambda: layout_of(padding())),
        ("ring", None, ring),
    ):
        case(f"latent {name}", pattern, layout, rules=turn)(latent)
        case(f"latent {name} absorbed", pattern, layout)(latent)
        case(f"latent {name} absorbed, wide", pattern, layout, **wide)(latent)
    for dtype, dim in product((BF16, FP16, FP32), (16, 80, 128, 256)):
        sizes = (32, 8, dim, 512)
        case(f"latent {NAMES[dtype]} {dim}", sizes=sizes, dtype=dtype, rules=turn)(latent)
    case("latent odd rank", sizes=(9, 3, 64, 11), rules=turn, bias=False)(latent)
    case("latent 16 queries", queries=16, rules=turn, softcap=30.0)(latent)
    case("latent 16 queries, wide", queries=16, **wide)(latent)
    case("latent partial turn", rules=lambda q, k: turned(q[..., :32], False))(latent)
    case("latent rerope", rules=lambda q, k: turned(q, True))(latent)
    case("latent leaky rerope", rules=lambda q, k: turned(q, True, slow=8.0))(latent)
    case("latent alibi", rules=bias)(latent)
    case("latent alibi, wide", rules=bias, **wide)(latent)
    case("latent alibi turned", rules=lambda q, k: bias(q, k) | turned(q, False))(latent)
    first = lambda q, k: {"q_first": torch.empty_like(q)} | turned(q, False)  # noqa: E731
    case("latent q_first", Window(back=32, first=4), rules=first)(latent)


# ---- packed caches


def packed(
    k_coding,
    v_coding,
    pattern=None,
    *,
    queries=1,
    slots=0,
    dim=64,
    dtype=BF16,
    ring=False,
    static=False,
    padded=False,
    rules=None,
    **options,
) -> None:
    """One call over a packed cache, which is packed here."""
    from effattn.kernels.decode.packed import PackedCache, attention
    from effattn.kernels.pack import pack, unpack

    def kv(tokens):
        return tensor(2, 2, tokens, dim, dtype=dtype)

    codes = [pack(kv(256), coding, "triton") for coding in (k_coding, v_coding)]
    unpack(codes[0], dtype, "triton")
    first = (kv(slots), kv(slots)) if slots else (None, None)
    total = slots + 256 + 40
    cache = PackedCache(*codes, kv(40), kv(40), total, *first, packed_from=slots)
    if ring or static:
        cache.packed_numbers = torch.arange(256, device=where[-1])
        cache.rest_numbers = torch.arange(40, device=where[-1])
    if static:
        cache.total = torch.zeros((), dtype=torch.int64, device=where[-1])
    if padded:
        cache.start = torch.zeros(2, dtype=torch.int64, device=where[-1])
        cache.mask = padding(total)
    q = tensor(2, 8, queries, dim, dtype=dtype)
    options |= rules(q) if rules else {}
    attention(q, cache, pattern, impl="triton", lse=True, **options)


def _packed_cases() -> None:
    from effattn.kernels.flash import Bias, Blocks, Window
    from effattn.kernels.pack import AXES, KINDS, Coding

    for kind, axis, symmetric in product(KINDS, AXES, (False, True)):
        coding = Coding(kind, axis, 32, symmetric)
        name = f"packed {kind} {axis}{' symmetric' if symmetric else ''}"
        case(name, coding, coding)(packed)
        case(f"{name}, 3 queries", coding, coding, queries=3, dim=128)(packed)
    k, v = Coding("int4", "channel", 64), Coding("int2", "token", 32)
    for dtype, dim in product((BF16, FP16, FP32), (32, 64, 128, 256)):
        case(f"packed {NAMES[dtype]} {dim}", k, v, dim=dim, dtype=dtype)(packed)
    patterns = {"window": Window(back=99, first=4), "blocks": Blocks(size=64, look_back=1)}
    for name, pattern in patterns.items():
        case(f"packed {name}", k, v, pattern, slots=4)(packed)
        case(f"packed {name} padded", k, v, pattern, slots=4, padded=True)(packed)
    case("packed ring", k, v, patterns["window"], ring=True, slots=4)(packed)
    case("packed static", k, v, static=True)(packed)
    case("packed softcap", k, v, softcap=30.0)(packed)
    first = lambda q: {"q_first": torch.empty_like(q)}  # noqa: E731
    case("packed q_first", k, v, patterns["window"], slots=4, rules=first)(packed)
    bias = lambda q: {"bias": Bias("alibi", tensor(8, 1, dtype=FP32))}  # noqa: E731
    case("packed alibi", k, v, rules=bias)(packed)
    for name, far, options in (
        ("turn", False, {}),
        ("rerope", True, {}),
        ("leaky rerope", True, {"slow": 8.0}),
    ):
        rule = lambda q, far=far, options=options: turned(q, far, **options)  # noqa: E731
        case(f"packed {name}", k, v, rules=rule)(packed)


# ---- the other kernels


def linear(
    feature_map,
    *,
    sizes=None,
    directed=False,
    padded=False,
    decayed=False,
    before=False,
    backward=True,
    few=False,
    **options,
) -> None:
    """One call of linear attention and its backward pass, or few queries over a state."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.linear import Memory, attention, fold

    q, k, v = qkv(**(sizes or {}), grad=backward)
    dim, features = q.shape[3], 128 if directed else q.shape[3]
    options |= {"directions": tensor(features, dim, dtype=FP32)} if directed else {}
    options |= {"mask": padding(k.shape[2])} if padded else {}
    options |= {"decay": tensor(2, dtype=FP32)} if decayed else {}
    normalized = options.get("normalize", True)
    if before:
        sums = tensor(2, 2, features, v.shape[3], dtype=FP32, grad=backward)
        norms = tensor(2, 2, features, dtype=FP32, grad=backward) if normalized else None
        top = tensor(2, 2, dtype=FP32) if feature_map == "favor" else None
        options["memory"] = Memory(sums, norms, top)
    out, memory = attention(
        q, k, v, feature_map, impl="triton", keep=backward and before, **options
    )
    if backward:
        run_backward(out)
        if memory is not None:
            run_backward(memory.sums)
    if options.pop("causal", True):
        fold(k.detach(), v.detach(), feature_map, impl="triton", **options)


def _linear_cases() -> None:
    from effattn.kernels.linear import MAPS

    for name, map in MAPS.items():
        plain = dict(directed=map.directed, normalize=not map.signed)
        case(f"linear {name}", name, **plain)(linear)
        case(f"linear {name} both ways", name, causal=False, **plain)(linear)
        case(f"linear {name} padded", name, padded=True, before=True, **plain)(linear)
        if not map.weighs:
            case(f"linear {name} decay", name, decayed=True, before=True, **plain)(linear)
        few = dict(sizes=dict(queries=1, keys=1), backward=False, before=True)
        case(f"linear {name} step", name, **few, **plain)(linear)
        few["sizes"] = dict(queries=5, keys=9)
        case(f"linear {name} steps padded", name, padded=True, **few, **plain)(linear)
    for dtype, dim in product((BF16, FP16, FP32), (16, 80, 128, 256)):
        case(f"linear {NAMES[dtype]} {dim}", "elu", sizes=dict(dim=dim, dtype=dtype))(linear)
    case("linear more keys", "elu", sizes=dict(queries=70, keys=200))(linear)


def lsh(causal=True, shared=False, padded=False, sizes=None) -> None:
    """LSH attention and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels import lsh as kernel

    q, k, v = qkv(**(sizes or {"heads": (2, 2) if shared else (8, 2)}), grad=True)
    rule = kernel.Rule(rounds=2, buckets=8, chunk=16, shared_qk=shared)
    rotations = tensor(2, q.shape[3], 4, dtype=FP32)
    bucket = kernel.hash_tokens(k.detach(), rotations)
    mine = bucket if shared else kernel.hash_tokens(q.detach(), rotations)
    rank, _ = kernel.new_ranks(bucket, rule.buckets)
    code = torch.where(bucket < rule.buckets, rule.code(bucket, rank), kernel.NO_KEY)
    real = padding() if padded else None
    places = kernel.places_of(rule, mine, bucket, code, causal, real)
    run_backward(kernel.attention(q, k, v, places, impl="triton"))


def ragged(counts=(200, 3, 0, 50), queries=1, dim=64, dtype=BF16, **options):
    """Two stored rows of two heads, each of which two rows have."""
    from effattn.kernels import ragged as kernel

    k, v = (tensor(sum(counts), dim, dtype=dtype) for _ in "kv")
    begin = torch.tensor([0, *counts], device=where[-1]).cumsum(0)
    of = torch.tensor([0, 1], device=where[-1])
    kept = kernel.Ragged(k, v, begin, of, counts, (0, 1), (dim, dim), dtype).repeat(2)
    q = tensor(4, queries, 8, dim, dtype=dtype).transpose(1, 2)
    with torch.no_grad():
        kernel.attention(q, kept, scale=0.1, impl="triton", **options)


def topk(window=32, block=16, blocks=3, padded=False, sizes=None) -> None:
    """Attention to chosen blocks and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels import topk as kernel

    q, k, v = qkv(**(sizes or {}), grad=True)
    rule = kernel.Rule(window=window, sinks=4, block=block, blocks=blocks)
    at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[None]
    at = at.repeat(2, 1) if padded else at
    chosen = kernel.select(rule, q.detach(), kernel.summarise(rule, k.detach()), at)
    out, lse = kernel.attention(q, k, v, rule, chosen, at, impl="triton")
    run_backward(out)
    run_backward(lse)


def gated(gate="head", delta=False, padded=False, memory=False, sizes=None) -> None:
    """Gated linear attention, with what follows of its sums."""
    from effattn.kernels import gated as kernel

    q, k, v = qkv(**(sizes or {}))
    width = {"head": 1, "feature": k.shape[3], None: 0}[gate]
    options = dict(
        log_decay=tensor(*k.shape[:3], width, dtype=torch.float32) if gate else None,
        beta=tensor(*k.shape[:3], dtype=torch.float32) if delta else None,
        normalize=not delta,
        mask=padding(k.shape[2]) if padded else None,
        impl="triton",
    )
    held = kernel.fold(k, v, **options) if memory else None
    kernel.attention(q, k, v, memory=held, keep=memory, **options)


def vq(size=None, dtype=BF16, dim=64, padded=False) -> None:
    """The three kernels of codebook attention, and their backward passes."""
    from fake_gpu import backward as run_backward

    from effattn.kernels import vq as kernel

    q, k, v = qkv(dim=dim, dtype=dtype, grad=True)
    codebook = tensor(2, 48, dim, dtype=dtype)
    codes = kernel.nearest(k, codebook, "triton")
    real = padding() if padded else None
    sums, counts = kernel.summarise(v, codes, words=48, real=real, size=size, impl="triton")
    out, lse = kernel.read(q, codebook, sums, counts, scale=0.1, size=size, impl="triton")
    run_backward(out)
    run_backward(lse)


def linformer(shared=False, padded=False, dtype=BF16, dim=64, tokens=200) -> None:
    """Linformer's projection along time, and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.flash import attention as flash_attention
    from effattn.kernels.linformer import Earlier, project

    x = qkv(keys=tokens, dim=dim, dtype=dtype, grad=True)[1]
    weight = tensor(1 if shared else 2, 32, 4096, dtype=FP32, grad=True)
    start = torch.zeros(2, dtype=torch.int64, device=where[-1]) if padded else None
    mask = padding(tokens) if padded else None
    slots = project(x, weight, start, mask, "triton")
    run_backward(slots)
    # the slots of the blocks before one's own
    q = qkv(queries=tokens, dim=dim, dtype=dtype)[0]
    earlier = Earlier(size=-(-tokens // 8), slots=4)
    flash_attention(q, slots, slots, earlier, causal=False, impl="triton", lse=True)


def monarch(rows=100, blocks=8, inputs=512, outputs=512, rank=1, bias=True, dtype=BF16) -> None:
    """A Monarch product and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.monarch import linear

    x = tensor(2, rows, inputs, dtype=dtype, grad=True)
    right = tensor(blocks, blocks * rank, -(-inputs // blocks), dtype=dtype, grad=True)
    left = tensor(blocks, -(-outputs // blocks), blocks * rank, dtype=dtype, grad=True)
    added = tensor(outputs, dtype=dtype, grad=True) if bias else None
    run_backward(linear(x, right, left, added, out_features=outputs, impl="triton"))


def sparse(rows=1, bias=True, dtype=BF16, sizes=(512, 256)) -> None:
    """A 2:4 product and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.sparse24 import Packed, linear

    outputs, inputs = sizes
    packed = Packed(
        tensor(outputs, 2, inputs // 4, dtype=dtype),
        tensor(outputs, inputs // 8, dtype=torch.uint8),
    )
    x = tensor(rows, inputs, dtype=dtype, grad=True)
    added = tensor(outputs, dtype=dtype, grad=True) if bias else None
    run_backward(linear(x, packed, added, impl="triton"))


def bitmask(rows=1, bias=True, dtype=BF16, sizes=(512, 256)) -> None:
    """A bitmask's product and its backward pass."""
    from fake_gpu import backward as run_backward

    from effattn.kernels.bitmask import Packed, linear, segments

    outputs, inputs = sizes
    packed = Packed(
        tensor(outputs * inputs // 2, dtype=dtype),
        tensor(outputs, inputs // 8, dtype=torch.uint8),
        tensor(outputs, segments(inputs), dtype=torch.int32),
    )
    x = tensor(rows, inputs, dtype=dtype, grad=True)
    added = tensor(outputs, dtype=dtype, grad=True) if bias else None
    run_backward(linear(x, packed, added, impl="triton"))


def bandwidth(elements: int) -> None:
    """The yardsticks."""
    from effattn.kernels import bandwidth as kernel

    x, y = tensor(elements, dtype=FP32), tensor(elements, dtype=FP32)
    kernel.copy(x, y, "triton")
    kernel.read(x, "triton")
    kernel.write(y, 1.0, "triton")
    kernel.launch(where[-1], "triton")


def _other_cases() -> None:
    for causal, shared, padded in product((True, False), repeat=3):
        name = f"lsh{' causal' * causal}{' shared' * shared}{' padded' * padded}"
        case(name, causal, shared, padded)(lsh)
    for dtype, dim in product((BF16, FP16, FP32), (64, 128, 256)):
        case(f"lsh {NAMES[dtype]} {dim}", sizes=dict(dtype=dtype, dim=dim))(lsh)
        case(f"topk {NAMES[dtype]} {dim}", sizes=dict(dtype=dtype, dim=dim))(topk)
        case(f"vq {NAMES[dtype]} {dim}", dtype=dtype, dim=dim)(vq)
        case(f"linformer {NAMES[dtype]} {dim}", dtype=dtype, dim=dim)(linformer)
    for block in (1, 8, 64, 100):
        case(f"topk blocks of {block}", block=block, padded=block == 8)(topk)
    for dtype, dim in product((BF16, FP16, FP32), (16, 64, 80, 128, 256)):
        case(f"ragged {NAMES[dtype]} {dim}", dim=dim, dtype=dtype)(ragged)
    for queries in (7, 40):
        case(f"ragged {queries}", queries=queries)(ragged)
    case("ragged softcap", softcap=30.0)(ragged)
    case("ragged nothing", (0, 0, 0, 0))(ragged)
    for dtype, dim in ((BF16, 128), (torch.float16, 64), (torch.float32, 64)):
        for gate, delta in (("head", False), ("feature", True)):
            sizes = dict(dtype=dtype, dim=dim)
            case(f"gated {NAMES[dtype]} {dim} {gate}", gate=gate, delta=delta, sizes=sizes)(gated)
    case("gated wide", gate="feature", memory=True, sizes=dict(dim=256))(gated)
    case("gated no gate", gate=None, delta=True, padded=True)(gated)
    case("gated step", delta=True, memory=True, sizes=dict(queries=1, keys=31))(gated)
    case("topk one head each", sizes=dict(heads=(2, 2)))(topk)
    case("topk chunk", sizes=dict(queries=33, keys=200))(topk)
    case("topk no block", block=300)(topk)
    case("vq blocks padded", 64, padded=True)(vq)
    for shared, padded in product((True, False), repeat=2):
        name = f"linformer{' shared' * shared}{' padded' * padded}"
        case(name, shared, padded)(linformer)
    case("linformer long", tokens=4096)(linformer)
    for dtype, rows, rank in product((BF16, FP16, FP32), (1, 40, 300), (1, 4)):
        case(f"monarch {NAMES[dtype]} {rows} of rank {rank}", rows, rank=rank, dtype=dtype)(monarch)
    case("monarch of odd sizes", blocks=5, inputs=99, outputs=77, bias=False)(monarch)
    case("monarch wide", inputs=4096, outputs=11008)(monarch)
    for dtype, rows in product((BF16, FP16, FP32), (1, 16)):
        case(f"2:4 {NAMES[dtype]} {rows}", rows, dtype=dtype)(sparse)
    case("2:4 without bias", bias=False)(sparse)
    for dtype, rows in product((BF16, FP16, FP32), (1, 16, 40, 100)):
        case(f"bitmask {NAMES[dtype]} {rows}", rows, dtype=dtype)(bitmask)
    case("bitmask without bias", bias=False)(bitmask)
    case("bitmask of odd sizes", sizes=(77, 1048))(bitmask)
    case("bitmask wide", sizes=(1024, 14336))(bitmask)
    for elements in (1, 1000, 2**28):
        case(f"bandwidth {elements}", elements)(bandwidth)


_flash_cases()
_decode_cases()
_latent_cases()
_packed_cases()
_linear_cases()
_other_cases()


def main(parts: str = "", depth: str = "front", arches: str = "") -> None:
    """Runs the cases whose names begin with one of `parts`; prints what came of it as JSON."""
    import fake_gpu
    import user_launches  # adds cases
    import user_steps

    assert user_launches
    assert user_steps
    fake_gpu.install(depth)
    begin, failed, count = time.perf_counter(), {}, 0
    with fake_gpu.tensors(), fake_gpu.watch() as seen:
        for arch in arches.split(",") if arches else fake_gpu.DEVICES:
            with fake_gpu.on(arch) as device:
                where.append(device)
                for name, run in CASES.items():
                    if name.startswith(tuple(parts.split(","))):
                        count += 1
                        try:
                            run()
                        except Exception as error:  # of any kind: it is what came of this case
                            while error.__cause__ is not None:
                                error = error.__cause__
                            failed[f"{name}, {arch}"] = f"{type(error).__name__}: {error}"[-600:]
    seconds = round(time.perf_counter() - begin, 1)
    print(
        json.dumps(
            {
                "cases": count,
                "failed": failed,
                "seconds": seconds,
                "launches": seen.launches,
                "compiled": seen.compiled,
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from launches import main  # this file once, by its name

    main(*sys.argv[1:])
