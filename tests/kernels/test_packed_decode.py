"""Attention over packed caches against the definition in fp64 over the unpacked numbers: plain
torch, and the Triton kernel in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

from effattn.kernels.decode import packed_tiles, packed_torch
from effattn.kernels.decode.packed import PackedCache, attention
from effattn.kernels.decode.turn import Turn
from effattn.kernels.flash import Bias, Blocks, Pattern, Window
from effattn.kernels.pack import AXES, KINDS, Coding, Pages, pack, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT4, INT2 = Coding("int4", "channel", 16), Coding("int2", "token", 16)


def made(
    k=INT4,
    v=INT2,
    *,
    queries=1,
    packed=64,
    rest=21,
    slots=0,
    dim=32,
    value_dim=32,
    start=None,
    ring=False,
    masked=False,
    static=False,
    dtype=torch.float32,
    seed=0,
):
    """q and a cache of 2 rows, 4 query heads, 2 K/V heads."""
    draw = torch.Generator().manual_seed(seed)

    def random(heads, tokens, width):
        return torch.randn(2, heads, tokens, width, generator=draw).to(DEVICE)

    total = slots + packed + rest
    first = [random(2, slots, width).to(dtype) if slots else None for width in (dim, value_dim)]
    cache = PackedCache(
        pack(random(2, packed, dim), k, "torch"),
        pack(random(2, packed, value_dim), v, "torch"),
        random(2, rest, dim).to(dtype),
        random(2, rest, value_dim).to(dtype),
        total,
        *first,
        packed_from=slots,
    )
    if start:
        cache.start = torch.tensor(start, device=DEVICE)
    if ring:
        cache.packed_numbers = torch.arange(slots, slots + packed, device=DEVICE).roll(16)
        cache.packed_numbers[3] = -1
        cache.rest_numbers = torch.arange(total - rest, total, device=DEVICE).flip(0)
    if static:
        cache.total = torch.tensor(total, device=DEVICE)
    if masked:
        cache.mask = (torch.rand(2, total, generator=draw) > 0.3).to(DEVICE)
    return (2 * random(4, queries, dim)).to(dtype), cache


def error(got, want):
    return (
        (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    ).item()


def on_cpu(x):
    if isinstance(x, Bias):
        return Bias(x.kind, x.params.cpu())
    if isinstance(x, Turn):
        return Turn(
            x.inv_freq.cpu(),
            x.interleaved,
            x.scaling,
            x.window,
            x.slow,
            None if x.q_far is None else x.q_far.cpu(),
        )
    return x.cpu() if isinstance(x, torch.Tensor) else x


def check(q, cache, pattern=None, impl="torch", **options):
    """fp32: both outputs right, and exactly 0 and -inf where nothing is seen."""
    here = {name: on_cpu(value) for name, value in vars(cache).items()} | {
        side: getattr(cache, side).map(torch.Tensor.cpu) for side in "kv"
    }
    want, want_lse = attention(
        q.cpu(),
        PackedCache(**here),
        pattern,
        impl="reference",
        lse=True,
        **{n: on_cpu(x) for n, x in options.items()},
    )
    out, lse = (x.cpu() for x in attention(q, cache, pattern, impl=impl, lse=True, **options))
    blind = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind)
    assert (out[blind] == 0).all()
    assert error(out, want) < 1e-5
    assert (lse - want_lse)[~blind].abs().max() < 1e-4
    return out


@pytest.fixture
def small(monkeypatch):
    """Several tiles, spans and blocks of queries even here."""
    monkeypatch.setattr(packed_tiles, "TILE", 1024)
    for name, value in (
        ("SCORES", 300),
        ("MANY", 300),
        ("SHORTEST", 16),
        ("USUAL", 5),
    ):
        monkeypatch.setattr(packed_torch, name, value)


SIDES = [Coding(kind, axis, 16, kind == "int8") for kind, axis in itertools.product(KINDS, AXES)]


@pytest.mark.parametrize("k", SIDES, ids=str)
def test_every_pair_of_codings(k, small):
    for v in SIDES:
        check(*made(k, v))


PATTERNS = [
    None,
    Window(back=30),
    Window(back=50, first=4),
    Blocks(size=16),
    Pattern(first=3),
    Window(back=10, first=30),
    Blocks(size=32, look_back=1, shifted=True),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("queries", [1, 20])
def test_patterns_slots_padding_and_rings(pattern, queries, small):
    for slots, start, ring in itertools.product((0, 5), (None, (0, 37)), (False, True)):
        q, cache = made(queries=queries, slots=slots, start=start, ring=ring)
        check(q, cache, pattern)
    check(*made(queries=queries, ring=True, static=True, masked=True), pattern, causal=False)


def far(q, frequencies=16, **settings):
    return Turn(
        1 / 100 ** (torch.arange(frequencies, device=DEVICE) / frequencies),
        window=20,
        q_far=q.flip(0),
        **settings,
    )


def test_keys_that_turn_first_queries_and_softcap(small):
    for slots, start in itertools.product((5, 0), (None, (0, 37))):
        q, cache = made(queries=9, slots=slots, start=start)
        check(q, cache, turn=far(q, 8, slow=4.0), softcap=5.0)
        check(q, cache, turn=far(q, 8, interleaved=True, scaling=1.2))
        if slots:
            check(
                q,
                cache,
                Window(back=40, first=4),
                turn=far(q),
                q_first=q.flip(1),
            )
            check(q, cache, Pattern(first=4), q_first=q.flip(1), scale=0.1)


@pytest.mark.parametrize("name", ["MANY", "USUAL"])
def test_one_walk_or_many_give_the_same(name, monkeypatch):
    q, cache = made(queries=20, packed=256)
    want = attention(q, cache, impl="torch")
    monkeypatch.setattr(packed_torch, name, 16 if name == "MANY" else 2**20)
    assert error(attention(q, cache, impl="torch"), want) < 1e-5


@pytest.mark.parametrize("queries", [1, 20])
def test_pages_are_one_cache(queries, small):
    for k, v in itertools.product((SIDES[0], INT4), (SIDES[1], SIDES[2])):
        q, cache = made(k, v, queries=queries, packed=96, slots=5)
        for turn, pattern in (
            (None, None),
            (None, Window(back=70)),
            (far(q), None),
        ):
            want = attention(q, cache, pattern, turn=turn, impl="torch", lse=True)
            for cuts in ((0, 48, 96), (0, 16, 80, 96)):
                k_pages, v_pages = (
                    Pages([codes[low:high] for low, high in itertools.pairwise(cuts)])
                    for codes in (cache.k, cache.v)
                )
                paged = replace(cache, k=k_pages, v=v_pages)
                assert (paged.keys, paged.nbytes) == (cache.keys, cache.nbytes)
                for got, right in zip(
                    attention(q, paged, pattern, turn=turn, impl="torch", lse=True),
                    want,
                    strict=True,
                ):
                    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cache: got Pages, valid with 'reference' are Codes"):
        attention(q, paged, impl="reference")


def test_nothing_of_the_caches_size_is_made():
    """fp32 copies of K and V would be 8 MiB each; a tile is 1/16 of one here."""
    packed_tile, packed_tiles.TILE = packed_tiles.TILE, 2**17
    try:
        q, cache = made(Coding("int4", "channel", 64), Coding("int4", "token", 32), packed=16384)
        with torch.profiler.profile(profile_memory=True) as profile:
            attention(q, cache, impl="torch")
    finally:
        packed_tiles.TILE = packed_tile
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 2**17 * 4
    assert unpack(cache.k, impl="torch").nbytes == 2**23


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_codes_are_multiplied_as_they_are(axis):
    """Of a tile's size are the copy that makes numbers of codes, and products: no other pass. Keys
    with a scale a token (k_axis="token") do take others."""
    q, cache = made(Coding("int8", axis, 32), Coding("int8", "token", 32), packed=1024)
    with torch.profiler.profile(record_shapes=True) as profile:
        attention(q, cache, impl="torch")
    over = [
        event.name
        for event in profile.events()
        if event.name.rstrip("_") in ("aten::mul", "aten::add", "aten::addcmul", "aten::sum")
        and any(math.prod(shape) >= 1024 * 32 for shape in event.input_shapes)
    ]
    assert bool(over) == (axis == "token")


def test_a_compiled_step_is_one_graph():
    """Lengths as tensors: the same graph serves every step."""
    q, cache = made(ring=True, static=True, packed=32, slots=3)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(q, total):
        cache.total = total
        return attention(q, cache, Window(back=30), impl="torch")

    run = torch.compile(step, fullgraph=True, backend=backend, dynamic=False)
    for back in (0, 1, 7):
        total = cache.total.clone() - back
        assert torch.equal(run(q, total), step(q, total))
    assert len(graphs) == 1


# the last ones are wide enough for two bytes at once, with one, two and four groups a token
TRITON = [
    dict(k=INT4, v=INT2),
    dict(k=Coding("int8", "token", 16, True), v=Coding("fp8", "channel", 32)),
    dict(k=Coding("fp8", "channel", 64), v=Coding("int4", "token", 32, True), value_dim=64),
    dict(
        k=Coding("int2", "token", 12),
        v=Coding("int8", "channel", 16),
        dim=24,
        rest=1,
    ),
    dict(k=Coding("int8", "channel", 32, True), v=Coding("int8", "token", 64, True), value_dim=64),
    dict(k=Coding("int4", "channel", 32), v=Coding("int4", "token", 64), dim=128, value_dim=128),
    dict(k=Coding("int2", "token", 64), v=Coding("int2", "token", 32), dim=128, value_dim=128),
    dict(
        k=Coding("fp8", "token", 64),
        v=Coding("fp8", "token", 128),
        dim=128,
        packed=51,
        value_dim=128,
    ),
    dict(k=Coding("int4", "token", 40), v=Coding("int4", "channel", 64), dim=80, value_dim=80),
]


@pytest.mark.parametrize("settings", TRITON, ids=lambda s: f"{s['k'].kind} {s['v'].kind}")
def test_the_kernel_reads_every_coding(settings):
    pytest.importorskip("triton")
    check(*made(**settings), impl="triton")


def shifted_in_pairs(asm, constraints, args, dtype, is_pure, pack):
    """What the kernel's two instructions do to two 16-bit words that share a register."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    assert (constraints, dtype, pack) == ("=r,r", tl.uint16, 2)
    name, by = re.fullmatch(r"(shr|shl)\.b32 \$0, \$1, \D*(\d+)\D*;", asm).groups()
    words = numpy.ascontiguousarray(args[0].handle.data)
    pairs = words.reshape(-1).view(numpy.uint32)
    moved = pairs >> int(by) if name == "shr" else pairs << int(by)
    data = moved.view(numpy.uint16).reshape(words.shape)
    return tl.tensor(TensorHandle(data, dtype), args[0].type)


@pytest.mark.skipif(DEVICE == "cuda", reason="the instructions themselves run there")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_registers_that_are_shifted_two_words_at_once(kind, dtype, monkeypatch):
    """As on an NVIDIA GPU, with the instructions acted out: what comes in from the neighbour is
    masked. The same numbers as without."""
    pytest.importorskip("triton")
    import triton.language as tl

    from effattn.kernels.decode import packed_triton

    k, v = Coding(kind, "channel", 32, kind == "int8"), Coding(kind, "token", 64, kind == "int8")
    q, cache = made(k, v, dim=128, value_dim=128, dtype=dtype)
    want = attention(q, cache, impl="triton")
    calls = []

    def acted(*args, **options):
        calls.append(args[0])
        return shifted_in_pairs(*args, **options)

    monkeypatch.setattr(tl, "inline_asm_elementwise", acted)
    in_pairs = functools.partial(packed_triton.code, pairs=True)
    monkeypatch.setattr(packed_triton, "code", in_pairs)
    assert torch.equal(attention(q, cache, impl="triton"), want)
    assert calls


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_eight_bits_of_any_size_in_bfloat16(kind, size):
    """They are multiplied in fp16, which cannot hold such numbers: scales are made 1 at most."""
    pytest.importorskip("triton")
    symmetric = kind == "int8"
    k, v = Coding(kind, "channel", 32, symmetric), Coding(kind, "token", 64, symmetric)
    q, cache = made(k, v, dim=64, value_dim=64, rest=1, dtype=torch.bfloat16)
    want = attention(q, cache, impl="triton").double()
    cache.k.scale *= size
    cache.k_rest *= size
    cache.v.scale *= size
    cache.v_rest *= size
    q /= size
    out = attention(q, cache, impl="triton").double() / size
    assert error(out, want) < 1e-6


BIASES = {
    "alibi": (4, 1),
    "kerple_log": (4, 2),
    "kerple_power": (1, 2),
    "table": (4, 30),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", BIASES)
def test_distances_add_to_scores(kind, impl, small):
    if impl == "triton":
        pytest.importorskip("triton")
    bias = Bias(
        kind, torch.rand(*BIASES[kind], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    )
    check(*made(), impl=impl, bias=bias)
    q, cache = made(slots=5, queries=3, start=(0, 37))
    check(
        q,
        cache,
        Window(back=50, first=4),
        impl,
        q_first=q.flip(1),
        softcap=5.0,
        bias=bias,
    )
    q, cache = made(slots=5, queries=3, ring=True, masked=True)
    check(q, cache, Blocks(size=32, look_back=1, shifted=True), impl, bias=bias)
    turn = Turn(torch.rand(16, device=DEVICE))
    check(*made(queries=2), impl=impl, turn=turn, bias=bias)


def test_the_kernel_does_everything():
    pytest.importorskip("triton")
    q, cache = made(slots=5, queries=3, start=(0, 37))
    check(
        q,
        cache,
        Window(back=50, first=4),
        "triton",
        q_first=q.flip(1),
        softcap=5.0,
    )
    check(
        *made(slots=5, queries=3, ring=True, static=True, masked=True),
        Blocks(size=32, look_back=1, shifted=True),
        "triton",
    )
    q, cache = made(slots=5, queries=2)
    check(q, cache, None, "triton", turn=far(q, slow=4.0))
    q, cache = made(
        Coding("int2", "token", 32),
        slots=5,
        queries=2,
        start=(0, 37),
    )
    check(
        q,
        cache,
        Window(back=50, first=4),
        "triton",
        turn=far(q, 8),
        q_first=q.flip(1),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_in_half_precision_is_as_exact_as_torch(dtype):
    """Against plain torch in that dtype over the unpacked numbers, which rounds them too."""
    pytest.importorskip("triton")
    for k, v in (
        (INT4, Coding("int4", "token", 32)),
        (Coding("fp8", "channel", 32), Coding("int8", "token", 32, True)),
    ):
        q, cache = made(k, v, queries=2, packed=128, dtype=dtype)
        want = attention(q.cpu().double(), _widened(cache), impl="reference")
        keys, values = (
            torch.cat([unpack(x, dtype, "torch"), rest], dim=2).repeat_interleave(2, dim=1)
            for x, rest in ((cache.k, cache.k_rest), (cache.v, cache.v_rest))
        )
        hidden = torch.ones(2, keys.shape[2], dtype=torch.bool, device=DEVICE).triu(
            keys.shape[2] - 1
        )
        plain = (q @ keys.mT * 32**-0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values
        out = attention(q, cache, impl="triton")
        assert error(out.cpu(), want) <= 2 * error(plain.cpu(), want)
        assert error(out.cpu(), want) < 0.005


def _widened(cache):
    k, v = (x.map(torch.Tensor.cpu) for x in (cache.k, cache.v))
    return PackedCache(k, v, cache.k_rest.cpu().double(), cache.v_rest.cpu().double(), cache.total)


def test_what_cannot_be_done_is_said():
    q, cache = made(slots=2)
    with pytest.raises(ValueError, match=r"pattern.first = 3, but the cache holds 2"):
        attention(q, cache, Pattern(first=3), q_first=q)
    with pytest.raises(ValueError, match=r"bias.params: got 3 heads, valid are 1 and 4"):
        attention(q, cache, bias=Bias("alibi", torch.ones(3, 1, device=DEVICE)))
    with pytest.raises(ValueError, match=r"turn\.window: got a bias too"):
        attention(
            q,
            cache,
            turn=far(q),
            bias=Bias("alibi", torch.ones(4, 1, device=DEVICE)),
        )
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"float64.*impl='torch'"):
        attention(q.double(), cache, impl="triton")
    with pytest.raises(ValueError, match=r"interleaved.*impl='torch'"):
        attention(q, cache, turn=far(q, interleaved=True), impl="triton")
    q, cache = made(v=Coding("int8", "token", 1))
    with pytest.raises(ValueError, match="v has groups of 1 per token"):
        attention(q, cache, impl="triton")
