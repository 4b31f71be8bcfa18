"""The cache axis: a format is one entry of a table, a kind is one class, and nothing else knows it.

Both are made here, used through `swap` and `generate`, and gone afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import tiny

from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.quant.formats import FORMATS, Numbers
from effattn.quant.packed.static import StaticState
from effattn.registry import backend
from effattn.specs import parse_spec
from effattn.states import caches
from effattn.states.full import RingState
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
NAMES = [
    "full",
    "evict",
    "paged",
    "int8",
    "int4",
    "int2",
    "fp8",
]  # every cache of this version: a row for each

# name -> a spec of it, and whether it has a static form
ROWS = {
    "evict": ("evict(policy='norm', keep=24, recent=8)", False),
    "paged": ("paged(page=16)", False),
    "int8": ("int8(group=16, residual=16)", True),
    "int4": ("int4(group=16, residual=16)", True),
    "int2": ("int2(group=16, residual=16)", True),
    "fp8": ("fp8(group=16, residual=16)", True),
}


def model_of():
    return tiny("llama", dtype=torch.float32, head_dim=32, num_hidden_layers=2)


def generate(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.fixture
def newest(monkeypatch):
    """A kind that keeps the newest tokens of a layer that sees all: `newest(keep=...)`."""
    monkeypatch.setattr(caches, "_KINDS", [*caches._KINDS])
    caches.kinds()

    @caches.register
    @dataclass(frozen=True)
    class Newest(caches.LayerCache):
        keep: int
        spec: str
        said: str = ""

        name = "newest"

        @classmethod
        def parse(cls, spec):
            return cls(**parse_spec(spec)[1], spec=spec)

        def refuses(self, backend, *, rotary, device):
            return None if backend.name == "dense" else f"newest: not with {backend.name}"

        def hold(self, own, backend):
            return RingState(self.keep)

        def bytes_per_token(self, heads):
            return 4 * heads.kv_heads * (heads.head_dim + heads.value_dim)

    return Newest


@pytest.fixture
def int8_small(monkeypatch):
    """A format: int8 in groups of 16 by default."""
    monkeypatch.setitem(FORMATS, "int8_small", Numbers("int8", group=16, symmetric=True))


def test_every_cache_has_a_row():
    assert [caches.FULL, *caches.kinds()] == NAMES == [caches.FULL, *ROWS]


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_what_every_cache_keeps(name):
    """It reads its own spec, fits, holds tokens, and has the static form that its row says."""
    spec, has_static = ROWS[name]
    attn = backend("dense")
    cache = caches.parse(spec).fit(Sizes)
    assert str(cache) == spec
    assert cache == caches.parse(spec).fit(Sizes)
    assert cache.bytes_per_token(Sizes) > 0
    if cache.refuses(attn, rotary=True, device=torch.device("cpu")) is None:
        state = cache.new_state(attn)
        assert state.owner == attn.signature
        state.append(*(torch.randn(1, 2, 70, 32) for _ in "kv"))
        assert state.seq_len == 70
        out = attn(*(torch.randn(1, heads, 1, 32) for heads in (4, 2, 2)), state=state)
        assert (state.seq_len, out.shape) == (71, (1, 4, 1, 32))
    assert (cache.static_state(64) is not None) is has_static


class Sizes:
    """Of a layer's keys and values."""

    kv_heads, head_dim, value_dim = 2, 32, 32


@torch.no_grad()
def test_a_kind_is_one_class(newest, tmp_path):
    model, plain = model_of(), model_of()
    assert torch.equal(generate(swap(model, cache="newest(keep=64)")), generate(plain))
    assert [layer["cache"] for layer in describe(model).layers] == ["newest(keep=64)"] * 2
    assert [type(layer.state) for layer in new_cache(model).layers] == [RingState] * 2
    save(model, tmp_path / "out")
    assert active(load(tmp_path / "out")).caches == {0: "newest(keep=64)", 1: "newest(keep=64)"}
    with pytest.raises(Unsupported, match="layers 0, 1: newest: not with linear"):
        swap(model, "linear")
    # a window of the same size, which a pattern of its own computes
    swap(model, cache={"0-": "newest(keep=8)"})
    cache, steps = new_cache(model), IDS.split(1, dim=1)
    logits = torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)
    assert (
        max(layer.nbytes for layer in cache.layers)
        < plain(IDS).past_key_values.layers[0].keys.nbytes * 2
    )
    assert not torch.allclose(logits, plain(IDS).logits, atol=1e-3)
    restore(model)
    assert torch.equal(generate(model), generate(plain))


@torch.no_grad()
def test_a_format_is_one_entry(int8_small):
    a, b = (
        swap(model_of(), cache="int8_small(residual=0)"),
        swap(model_of(), cache="int8(group=16, residual=0)"),
    )
    assert torch.equal(generate(a), generate(b))
    assert [layer["cache"] for layer in describe(a).layers] == ["int8_small(residual=0)"] * 2
    assert type(caches.parse("int8_small").fit(Sizes).static_state(9)) is StaticState
    with pytest.raises(ValueError, match=r"got 'int8_smal' .did you mean 'int8_small'"):
        swap(model_of(), cache="int8_smal")


def test_both_are_gone():
    assert [caches.FULL, *caches.kinds()] == NAMES
    with pytest.raises(
        ValueError, match="valid are 'full', 'evict', 'paged', 'int8', 'int4', 'int2', 'fp8'"
    ):
        swap(model_of(), cache="newest(keep=8)")


def test_a_name_is_one_kind_only(newest):
    caches.register(type("Twin", (newest,), {}))
    with pytest.raises(ValueError, match="cache 'newest' is registered already"):
        caches.kinds()
