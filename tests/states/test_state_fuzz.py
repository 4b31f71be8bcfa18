"""Every kind of state against an oracle that keeps everything: each row alone, without its padding,
by the reference.

Chunks of any length, padding on the left, the right and in the middle, views as inputs, rollback,
reordering, selected and repeated rows, inference_mode in between. A failure names its kind and its
seed."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from effattn.errors import Unsupported
from effattn.positions import Rope
from effattn.quant.formats import Format
from effattn.quant.packed.kind import Packed
from effattn.quant.packed.static import StaticState
from effattn.registry import backend
from effattn.states import caches
from effattn.states.full import ROLLBACK

H, HKV, D = 4, 2, 8
ROPE = Rope(100.0 ** (-torch.arange(0, D, 2).double() / D))
LENGTHS = (1, 1, 1, 2, 5, 16, 17, 30)
KINDS = {
    "full": ("dense", ROPE),
    "strided": ("strided(stride=3)", None),
    "ring": ("sliding(window=6)", ROPE),
    "ring with sinks": ("sliding(window=5, sinks=3)", ROPE),
    "ring with many sinks": ("sliding(window=2, sinks=20)", ROPE),
    "dilated ring": ("sliding(window=3, dilation=3)", None),
    "block": ("block(block=7, look_back=1)", ROPE),
    "shifted blocks": ("s2(block=6)", None),
    "summaries": ("fixed(stride=6, summary=2)", None),
    "longnet": ("longnet(segments=[4, 12], dilations=[1, 2])", None),
    "first tokens": ("longformer(window=5, global_tokens=3)", ROPE),
    "chosen tokens": ("longformer(window=5, global_tokens=[1, 9])", ROPE),
    "sums": ("linear", ROPE),
    "fading sums": ("linear(decay='retnet')", None),
    "gated sums": ("gated(delta=True)", ROPE),
    "window and sums": ("hybrid(window=4, sinks=2)", ROPE),
    "random features": ("performer(features=32)", ROPE),
    "buckets": ("lsh(rounds=2, buckets=4, chunk=4)", ROPE),
    "blocks": ("topk(window=4, sinks=2, block=3, blocks=2)", ROPE),
    "blocks of one": ("topk(window=2, block=1, blocks=3, summary='minmax')", None),
    "codes": ("vq(codes=8, block=5)", None),
    "slots": ("linformer_blockwise(k=8, max_length=32, block=8)", None),
}
PACKED = {
    "packed": ("dense", "int8(residual=16, group=16)"),
    "packed, first tokens": ("dense", "int8(residual=0, group=16, first=5)"),
    "packed, first tokens, a long residual": ("dense", "int8(residual=40, group=16, first=20)"),
    "packed before its turn": ("dense", "int8(residual=16, group=16, first=3, pre_rope=True)"),
    "packed ring": ("sliding(window=24)", "int8(residual=16, group=16)"),
    "packed ring with sinks": ("sliding(window=20, sinks=4)", "int8(residual=0, group=16)"),
    "packed ring, all in the residual": (
        "sliding(window=20, sinks=4)",
        "int8(residual=64, group=16)",
    ),
    "packed block": ("block(block=9, look_back=1)", "int8(residual=16, group=16)"),
    "static": ("dense", "int8(residual=16, group=16)"),
    "static, first tokens": ("dense", "int8(residual=0, group=16, first=5)"),
}
# other caches of what these patterns see: exact, where they forget nothing
CACHES = {
    "paged": ("dense", "paged(page=4)"),
    "evict, before any goes": ("dense", "evict(policy='norm', keep=999)"),
    "paged strides": ("strided(stride=3)", "paged(page=16)"),
}
QUICK, SLOW = 7, 70  # cases of each kind; with 33 kinds about 230 and 2,200
# of int8 keys and values: a step is 2 max|x| / 255, about 0.03; one key too many or too few gives
# 0.1
BUDGET = 0.06


class Subject:
    """A backend with its state, and its oracle."""

    def __init__(self, kind: str):
        spec, self.rotary = KINDS.get(kind) or ((PACKED | CACHES)[kind][0], ROPE)
        self.packed = kind in PACKED
        self.backend = backend(spec)
        self.dtype = torch.float32 if self.packed else torch.float64
        self.dim = 16 if self.packed else D
        if self.packed:
            self.rotary = Rope(100.0 ** (-torch.arange(0, self.dim, 2).double() / self.dim))
            format = Format.parse(PACKED[kind][1]).fit(self.dim)[0]
            if kind.startswith("static"):
                self.state, self.rotary = StaticState(format, 1024), None
            else:
                self.state = Packed(PACKED[kind][1], format).new_state(self.backend)
                turned = format.pre_rope or self.backend.farthest is not None
                self.rotary = self.rotary if turned else None
        elif kind in CACHES:
            self.state = caches.parse(CACHES[kind][1]).new_state(self.backend)
            self.rotary = None if self.state.packed else ROPE  # evict: rotated already
        else:
            self.state = self.backend.new_state()
        some = [torch.randn(1, heads, 3, self.dim, dtype=self.dtype) for heads in (H, HKV, HKV)]
        with torch.no_grad():
            self.backend(*some)  # what depends on the inputs' shapes exists from now on
        self.truth = copy.deepcopy(self.backend)
        self.truth.impl = "reference"

    def draw(self, batch: int, tokens: int, dice: random.Random):
        """q, k and v in storages of every sort."""
        return [self._laid(batch, heads, tokens, dice.randrange(6)) for heads in (H, HKV, HKV)]

    def _laid(self, batch: int, heads: int, tokens: int, how: int) -> torch.Tensor:
        if how == 0:
            return torch.randn(batch, heads, tokens, self.dim, dtype=self.dtype)
        if how == 1:  # as a projection gives them
            return torch.randn(batch, tokens, heads, self.dim, dtype=self.dtype).transpose(1, 2)
        if how == 2:  # as a fused projection does
            return torch.randn(batch, tokens, heads, 3 * self.dim, dtype=self.dtype).transpose(
                1, 2
            )[..., self.dim : -self.dim]
        if how == 3:  # numbers of a head that do not lie beside each other
            return torch.randn(batch, heads, self.dim, tokens, dtype=self.dtype).mT
        if how == 4:
            return torch.randn(batch, heads, tokens, 2 * self.dim, dtype=self.dtype)[..., ::2]
        return torch.randn(batch, 1, tokens, self.dim, dtype=self.dtype).expand(-1, heads, -1, -1)

    def expected(self, q, k, v, real, tokens: int) -> list[torch.Tensor]:
        """For each row its outputs (1, H, real queries, D), of the last `tokens`: the row alone,
        without padding.
        """
        outs = []
        for row in range(len(q)):
            keys = real[row].nonzero()[:, 0]
            queries = int(real[row, real.shape[1] - tokens :].sum())
            if not queries:
                outs.append(q[:1, :, :0])
                continue
            own = [x[row : row + 1, :, keys] for x in (q, k, v)]
            outs.append(self.truth(*own, rotary=self.rotary)[:, :, len(keys) - queries :])
        return outs


def padding(batch: int, tokens: int, side: str, dice: random.Random) -> torch.Tensor:
    """(B, tokens) bool. Rows are padded differently, some of them not at all."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        size = dice.choice([0, dice.randint(0, tokens)])
        if side == "left":
            mask[row, :size] = False
        elif side == "right":
            mask[row, tokens - size :] = False
        elif side == "middle":
            start = dice.randint(0, tokens)
            mask[row, start : start + size] = False
    return mask


def cropped(state, n: int) -> bool:
    """Whether `crop(n)` works; where it does not, it says what would."""
    try:
        state.check_crop(n)
    except ValueError as error:
        if "valid are 0 and" not in str(error):
            raise
        return False
    return True


def play(kind: str, seed: int) -> None:
    """One case: a random sequence of moves."""
    dice = random.Random(f"{kind} {seed}")
    torch.manual_seed(dice.randrange(2**31))
    subject = Subject(kind)
    state, batch, highest = subject.state, 3, 0
    sides = dice.choice(
        [("none",), ("left",), ("right",), ("none", "none", "right"), ("none", "left", "middle")]
    )
    past = [
        torch.zeros(batch, heads, 0, subject.dim, dtype=subject.dtype) for heads in (H, HKV, HKV)
    ]
    real = torch.ones(batch, 0, dtype=torch.bool)
    moves = [
        "append",
        *dice.choices(["append", "append", "append", "crop", "rows", "reset"], k=6),
        "append",
    ]
    for move in moves:
        if move == "append":
            tokens = dice.choice(LENGTHS)
            side = dice.choice(sides) if sides != ("left",) or not real.shape[1] else "none"
            new = subject.draw(batch, tokens, dice)
            real = torch.cat([real, padding(batch, tokens, side, dice)], dim=1)
            past = [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]
            given = None if real.all() and dice.random() < 0.5 else real.clone()
            mode = torch.inference_mode if dice.random() < 0.3 else torch.no_grad
            with mode():
                out = subject.backend(*new, padding_mask=given, state=state, rotary=subject.rotary)
            highest = max(highest, real.shape[1])
            asked = real[:, real.shape[1] - tokens :]
            assert not out.isnan().any()
            for row, want in enumerate(subject.expected(*past, real, tokens)):
                got = out[row : row + 1, :, asked[row]]
                if subject.packed:
                    assert (got - want).abs().max() < BUDGET if got.numel() else True
                else:
                    torch.testing.assert_close(got, want)
        elif move == "crop" and real.shape[1]:
            n = max(0, real.shape[1] - dice.randint(0, ROLLBACK))
            must = not subject.packed and n >= highest - ROLLBACK
            if must or cropped(state, n):
                state.crop(n)
                past, real = [x[:, :, :n] for x in past], real[:, :n]
                highest = 0 if n == 0 else highest
        elif move == "rows" and real.shape[1]:
            if dice.random() < 0.5:
                index = torch.tensor(dice.choices(range(batch), k=batch))
                state.reorder(index)
            elif batch < 5 and dice.random() < 0.5:
                index = torch.arange(batch).repeat_interleave(2)
                state.repeat(2)
            else:
                index = torch.tensor(dice.choices(range(batch), k=dice.randint(1, 3)))
                state.select(index)
            batch = len(index)
            past, real = [x[index] for x in past], real[index]
        elif move == "reset":
            state.reset()
            past, real, highest = [x[:, :, :0] for x in past], real[:, :0], 0
        assert int(state.seq_len) == real.shape[1]


def cases(kind: str, seeds: range) -> None:
    for seed in seeds:
        try:
            play(kind, seed)
        except (AssertionError, ValueError, RuntimeError, Unsupported, IndexError) as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error


@pytest.mark.parametrize("kind", [*KINDS, *PACKED, *CACHES])
def test_a_row_is_what_it_is_alone(kind):
    cases(kind, range(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *PACKED, *CACHES])
def test_many_rows_are_what_they_are_alone(kind):
    cases(kind, range(QUICK, QUICK + SLOW))
