"""The Triton kernels over latents against the definition: every layout, rule, rank and dtype.

In the interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from effattn.kernels import decode, latent
from effattn.kernels.decode.turn import Turn
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern, Window
from effattn.kernels.flash.rules import Bias
from effattn.kernels.latent import Maps
from effattn.kernels.latent.reference import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, KV_HEADS, SIZE, TOKENS = 2, 6, 2, 8, 90
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.01])


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        *shape,
        generator=generator,
        dtype=torch.float64,
    )
    return drawn.to(DEVICE, dtype)


def maps_of(rank: int, dtype=torch.float32, bias: bool = True, norm=None) -> Maps:
    biases = [
        draw(
            KV_HEADS,
            size,
            seed=3 + size,
            dtype=dtype,
        )
        for size in (SIZE, 5)
    ]
    weights = [
        draw(
            KV_HEADS,
            size,
            rank,
            seed=size,
            dtype=dtype,
        )
        / rank
        for size in (SIZE, 5)
    ]
    return Maps(
        *weights,
        *(biases if bias else (None, None)),
        norm,
    )


def inputs(queries: int, rank: int, dtype=torch.float32):
    q = draw(
        BATCH,
        HEADS,
        queries,
        SIZE,
        seed=5,
        dtype=dtype,
    )
    return q, draw(
        BATCH,
        TOKENS,
        rank,
        seed=6,
        dtype=dtype,
    )


def doubled(maps: Maps) -> Maps:
    both = (maps.key, maps.value, maps.key_bias, maps.value_bias)
    return Maps(*(None if x is None else x.double() for x in both), maps.key_norm)


def layouts(name: str) -> Layout:
    if name == "padded":
        mask = torch.ones(
            BATCH,
            TOKENS,
            dtype=torch.bool,
            device=DEVICE,
        )
        mask[1, :40] = False
        return Layout(start=torch.tensor([0, 40], device=DEVICE), mask=mask)
    if name == "ring":  # three first tokens, and the newest ones, which begin anywhere
        number = torch.arange(TOKENS - 3, device=DEVICE).roll(50) + 500
        return Layout(
            slots=3,
            ring=number,
            total=500 + TOKENS - 3,
        )
    return Layout()


TURNS = {
    "none": None,
    "halves": Turn(FREQUENCIES),
    "interleaved": Turn(
        FREQUENCIES,
        interleaved=True,
        scaling=1.3,
    ),
    "partial": Turn(FREQUENCIES[:2]),
}
PATTERNS = {
    "full": Pattern(),
    "window": Window(back=30),
    "blocks": Blocks(size=32),
    "sinks": Window(2, 30),
}


@pytest.mark.parametrize(
    ("turn", "pattern", "layout", "queries", "rank"),
    [
        ("none", "full", "plain", 1, 11),
        ("none", "window", "padded", 3, 11),
        ("none", "full", "ring", 1, 11),
        ("none", "full", "plain", 1, 300),  # wider than the decode kernel's
        ("none", "sinks", "padded", 3, 300),
        ("halves", "full", "plain", 1, 11),
        ("halves", "full", "plain", 1, 150),  # several pieces of a latent
        ("halves", "sinks", "plain", 3, 11),
        ("halves", "sinks", "padded", 1, 11),
        ("interleaved", "window", "plain", 3, 11),
        ("interleaved", "blocks", "padded", 1, 11),
        ("interleaved", "full", "ring", 3, 11),
        ("partial", "full", "plain", 1, 11),
        ("partial", "sinks", "ring", 1, 11),
    ],
)
def test_the_definition(turn, pattern, layout, queries, rank):
    (q, c), maps, held = inputs(queries, rank), maps_of(rank), layouts(layout)
    given = dict(turn=TURNS[turn], scale=0.4)
    out = latent.attention(
        q,
        c,
        maps,
        PATTERNS[pattern],
        held,
        impl="triton",
        **given,
    )
    exact = reference(
        q,
        c,
        doubled(maps),
        PATTERNS[pattern],
        held,
        **given,
    )
    torch.testing.assert_close(
        out.double(),
        exact,
        rtol=1e-5,
        atol=1e-5,
    )


def alibi() -> Bias:
    return Bias("alibi", torch.tensor([[0.1 * (h + 1)] for h in range(HEADS)], device=DEVICE))


def unit(k: torch.Tensor) -> torch.Tensor:
    return k / k.norm(dim=-1, keepdim=True)


RULES = {
    "softcap": lambda q: dict(turn=TURNS["halves"], softcap=3.0),
    "softcap, nothing turns": lambda q: dict(softcap=3.0),
    "bias": lambda q: dict(bias=alibi()),
    "bias and turn": lambda q: dict(bias=alibi(), turn=TURNS["halves"]),
    "first": lambda q: dict(q_first=draw(*q.shape, seed=8), turn=TURNS["partial"]),
    "first, nothing turns": lambda q: dict(q_first=draw(*q.shape, seed=8)),
    "far": lambda q: dict(
        turn=Turn(
            FREQUENCIES,
            window=30,
            q_far=draw(*q.shape, seed=8),
        )
    ),
    "slow": lambda q: dict(
        turn=Turn(
            FREQUENCIES,
            window=30,
            slow=4.0,
            q_far=q,
        )
    ),
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_those_of_expanded_keys(rule, queries):
    (q, c), maps = inputs(queries, 11), maps_of(11)
    given = RULES[rule](q) | dict(scale=0.5, lse=True)
    pattern = PATTERNS["sinks"] if "first" in rule else PATTERNS["full"]
    out, lse = latent.attention(
        q,
        c,
        maps,
        pattern,
        impl="triton",
        **given,
    )
    whole, sums = decode.attention(
        q,
        maps.keys(c),
        maps.values(c),
        pattern,
        impl="torch",
        **given,
    )
    torch.testing.assert_close(
        out,
        whole,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        lse,
        sums.to(lse),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("rank", [11, 300])
def test_biases_by_distance_over_any_rank(rank):
    (q, c), maps = inputs(2, rank), maps_of(rank)
    out = latent.attention(
        q,
        c,
        maps,
        bias=alibi(),
        impl="triton",
    )
    whole = decode.attention(
        q,
        maps.keys(c),
        maps.values(c),
        bias=alibi(),
        impl="torch",
    )
    torch.testing.assert_close(
        out,
        whole,
        rtol=1e-4,
        atol=1e-5,
    )


def test_keys_go_through_their_norm():
    (q, c), maps = inputs(1, 11), maps_of(11, norm=unit)
    out = latent.attention(
        q,
        c,
        maps,
        turn=TURNS["halves"],
        scale=0.5,
        impl="triton",
    )
    exact = reference(
        q,
        c,
        doubled(maps),
        Pattern(),
        Layout(),
        turn=TURNS["halves"],
        scale=0.5,
    )
    torch.testing.assert_close(
        out.double(),
        exact,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("turn", ["none", "halves"])
def test_strides_are_free(turn):
    """Latents as a state holds them, a part of a longer buffer; queries with heads inside."""
    (q, c), maps = inputs(2, 11), maps_of(11)
    held = c.new_full((BATCH, TOKENS + 30, 20), torch.nan)
    held[:, 7 : 7 + TOKENS, :11] = c
    inside = q.transpose(1, 2).contiguous().transpose(1, 2)
    given = dict(turn=TURNS[turn], impl="triton")
    out = latent.attention(
        inside,
        held[:, 7 : 7 + TOKENS, :11],
        maps,
        **given,
    )
    torch.testing.assert_close(
        out,
        latent.attention(
            q,
            c,
            maps,
            **given,
        ),
    )


def test_a_query_that_sees_nothing_gives_zero():
    (q, c), maps, held = inputs(1, 11), maps_of(11), layouts("padded")
    start = torch.tensor([0, TOKENS], device=DEVICE)
    held = Layout(start=start, mask=torch.zeros_like(held.mask))
    for turn in TURNS.values():
        given = dict(
            layout=held,
            turn=turn,
            lse=True,
            impl="triton",
        )
        out, lse = latent.attention(
            q,
            c,
            maps,
            **given,
        )
        assert not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("turn", ["none", "halves", "partial"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_expanded_keys(turn, dtype):
    (q, c), low = (
        inputs(
            1,
            24,
            dtype,
        ),
        maps_of(24, dtype),
    )
    exact = reference(
        q,
        c,
        doubled(low),
        Pattern(),
        Layout(),
        turn=TURNS[turn],
        scale=SIZE**-0.5,
    )
    out = latent.attention(
        q,
        c,
        low,
        turn=TURNS[turn],
        impl="triton",
    )
    plain = decode.attention(
        q,
        low.keys(c),
        low.values(c),
        turn=TURNS[turn],
        impl="torch",
    )
    assert (out.double() - exact).norm() < 2 * (plain.double() - exact).norm()


def test_what_the_kernels_lack_is_refused():
    (q, c), maps = inputs(1, 11), maps_of(11)
    with pytest.raises(ValueError, match=r"got torch\.float64 with heads of 8"):
        latent.attention(
            q.double(),
            c.double(),
            maps,
            impl="triton",
        )
    with pytest.raises(ValueError, match="no gradients"):
        latent.attention(
            q.requires_grad_(),
            c,
            maps,
            impl="triton",
        )
