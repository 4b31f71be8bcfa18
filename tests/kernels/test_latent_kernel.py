"""Attention over latents against its definition: every layout, rule and dtype, and what is not
made."""

from __future__ import annotations

import pytest
import torch

from effattn.kernels import decode, latent
from effattn.kernels.decode.turn import Turn
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern, Window
from effattn.kernels.latent import Maps, torch_impl
from effattn.kernels.latent.packed import PackedLatents, pack_rows, width
from effattn.kernels.latent.reference import attention as reference
from effattn.kernels.pack import Coding

BATCH, HEADS, KV_HEADS, SIZE, RANK, TOKENS = 2, 6, 2, 8, 11, 300
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.01])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def maps_of(bias: bool = True, norm=None) -> Maps:
    biases = (draw(KV_HEADS, SIZE, seed=3), draw(KV_HEADS, 5, seed=4)) if bias else (None, None)
    return Maps(
        draw(
            KV_HEADS,
            SIZE,
            RANK,
            seed=1,
        )
        / 3,
        draw(KV_HEADS, 5, RANK, seed=2) / 3,
        *biases,
        norm,
    )


def inputs(queries: int):
    return draw(
        BATCH,
        HEADS,
        queries,
        SIZE,
        seed=5,
    ), draw(BATCH, TOKENS, RANK, seed=6)


def padded() -> Layout:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, :40] = False
    return Layout(start=torch.tensor([0, 40]), mask=mask)


def ring() -> Layout:
    """Three first tokens, and a ring of the newest ones that begins anywhere."""
    number = torch.arange(TOKENS - 3).roll(50) + 500
    return Layout(slots=3, ring=number, total=500 + TOKENS - 3)


TURNS = {
    "none": None,
    "halves": Turn(FREQUENCIES),
    "interleaved": Turn(FREQUENCIES, interleaved=True, scaling=1.3),
    "partial": Turn(FREQUENCIES[:2]),
}


@pytest.fixture(autouse=True, params=["many tiles", "one tile"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(torch_impl, "TILE", 64 * KV_HEADS * SIZE)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("pattern", [Pattern(), Window(back=70), Blocks(size=32), Window(2, 70)])
@pytest.mark.parametrize("layout", [Layout, padded, ring])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_definition(turn, pattern, layout, queries):
    (q, c), maps, layout = inputs(queries), maps_of(), layout()
    out = latent.attention(
        q,
        c,
        maps,
        pattern,
        layout,
        turn=TURNS[turn],
        scale=0.4,
    )
    exact = reference(
        q,
        c,
        maps,
        pattern,
        layout,
        turn=TURNS[turn],
        scale=0.4,
    )
    torch.testing.assert_close(
        out,
        exact,
        rtol=1e-9,
        atol=1e-9,
    )


def test_log_sum_exps_and_softcaps_are_those_of_expanded_keys():
    (q, c), maps, turn = inputs(2), maps_of(), Turn(FREQUENCIES)
    given = dict(
        turn=turn,
        scale=0.5,
        softcap=3.0,
        lse=True,
    )
    out, lse = latent.attention(
        q,
        c,
        maps,
        **given,
    )
    whole, sums = decode.attention(
        q,
        maps.keys(c),
        maps.values(c),
        impl="torch",
        **given,
    )
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, sums)


def test_keys_go_through_their_norm():
    def norm(k):
        return k / k.norm(dim=-1, keepdim=True)

    (q, c), maps = inputs(1), maps_of(norm=norm)
    for turn in (None, Turn(FREQUENCIES)):
        out = latent.attention(
            q,
            c,
            maps,
            turn=turn,
            scale=0.5,
        )
        exact = reference(
            q,
            c,
            maps,
            Pattern(),
            Layout(),
            turn=turn,
            scale=0.5,
        )
        torch.testing.assert_close(
            out,
            exact,
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("slow", [float("inf"), 4.0])
def test_far_pairs_are_those_of_expanded_keys(queries, slow):
    (q, c), maps = inputs(queries), maps_of()
    turn = Turn(
        FREQUENCIES,
        window=50,
        slow=slow,
        q_far=draw(*q.shape, seed=8),
    )
    out = latent.attention(
        q,
        c,
        maps,
        turn=turn,
    )
    whole = decode.attention(
        q,
        maps.keys(c),
        maps.values(c),
        turn=turn,
        impl="torch",
    )
    torch.testing.assert_close(
        out,
        whole,
        rtol=1e-9,
        atol=1e-9,
    )


def test_far_tokens_are_read_as_latents_alone(monkeypatch):
    """ReRoPE beyond its window, and NoPE at any distance: no key is made of those tokens."""
    (q, c), maps, made = inputs(1), maps_of(), []
    linear = torch.nn.functional.linear

    def counted(x, *given):
        made.append(x.shape[1])
        return linear(x, *given)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    latent.attention(
        q,
        c,
        maps,
        turn=Turn(FREQUENCIES, window=50, q_far=q),
    )
    assert sum(made) == 50
    made.clear()
    latent.attention(q, c, maps)
    assert not made


def test_a_query_that_sees_nothing_gives_zero():
    (q, c), maps, layout = inputs(1), maps_of(), padded()
    layout = Layout(start=torch.tensor([0, TOKENS]), mask=layout.mask.clone().fill_(False))
    out, lse = latent.attention(
        q,
        c,
        maps,
        layout=layout,
        turn=Turn(FREQUENCIES),
        lse=True,
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_expanded_keys(dtype):
    (q, c), maps, turn = inputs(1), maps_of(), Turn(FREQUENCIES)
    exact = reference(
        q,
        c,
        maps,
        Pattern(),
        Layout(),
        turn=turn,
        scale=SIZE**-0.5,
    )
    low = Maps(*(x.to(dtype) for x in (maps.key, maps.value, maps.key_bias, maps.value_bias)))
    q, c = q.to(dtype), c.to(dtype)
    out = latent.attention(
        q,
        c,
        low,
        turn=turn,
    )
    plain = decode.attention(
        q,
        low.keys(c),
        low.values(c),
        turn=turn,
        impl="torch",
    )
    assert (out.double() - exact).norm() < 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()


def test_ranks_that_do_not_fit_are_refused():
    (q, c), maps = inputs(1), maps_of()
    with pytest.raises(ValueError, match=r"c: got \(2, 300, 7\), valid is \(rows, tokens, 11\)"):
        latent.attention(q, c[..., :7], maps)


def test_unknown_implementations_are_refused():
    (q, c), maps = inputs(1), maps_of()
    with pytest.raises(ValueError, match="impl: got 'reference', valid are 'auto', 'torch'"):
        latent.attention(
            q,
            c,
            maps,
            impl="reference",
        )


@pytest.mark.parametrize("turn", ["none", "halves"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rank", [8, 24])
def test_packed_latents_are_what_their_bytes_mean(turn, kind, rank):
    """Rows of bytes as a state holds them, read a tile at a time."""
    symmetric = kind != "int4"
    coding = Coding(kind, "token", 8 if symmetric else 4, symmetric)
    maps = Maps(
        draw(KV_HEADS, SIZE, rank, seed=1) / 3,
        draw(KV_HEADS, 5, rank, seed=2) / 3,
    )
    q, c = draw(BATCH, HEADS, 1, SIZE, seed=5), draw(BATCH, TOKENS, rank, seed=6)
    rows = pack_rows(c[:, None], coding)[:, 0]
    assert rows.shape == (BATCH, TOKENS, width(coding, rank))
    assert rows.dtype == torch.uint8
    packed = PackedLatents(rows, rank, coding, c.dtype)
    meant = packed.unpacked()
    assert 0 < (meant - c).norm() < (0.02 if kind == "int8" else 0.2) * c.norm()
    given = dict(turn=TURNS[turn], layout=padded())
    found = latent.attention(q, packed, maps, **given)
    torch.testing.assert_close(found, latent.attention(q, meant, maps, **given))


def test_no_step_unpacks_all_latents(monkeypatch):
    monkeypatch.setattr(torch_impl, "TILE", 64 * KV_HEADS * SIZE)
    coding, unpacked = Coding("int8", "token", 8, True), []
    packed = PackedLatents(pack_rows(draw(1, 1, 3000, 8), coding)[:, 0], 8, coding, torch.float64)
    plain = PackedLatents.unpacked
    monkeypatch.setattr(
        PackedLatents,
        "unpacked",
        lambda self: unpacked.append(self.shape[1]) or plain(self),
    )
    maps = Maps(draw(KV_HEADS, SIZE, 8), draw(KV_HEADS, SIZE, 8))
    for turn in (None, TURNS["halves"]):
        latent.attention(draw(1, HEADS, 1, SIZE), packed, maps, turn=turn)
    assert max(unpacked) <= 128
