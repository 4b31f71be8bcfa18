"""Linformer (arXiv:2006.04768): keys and values are projected along time to a fixed number of
slots.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); E, F (Hkv or 1, K, tokens): the projections
of keys and of values to K slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from effattn.errors import Unsupported, check_choice
from effattn.interface import Backend, Call, Cost, Shape, Traits
from effattn.kernels import flash, linformer
from effattn.kernels.flash.pattern import Layout, Pattern, Window
from effattn.kernels.merge import merge
from effattn.patterns.exact import check_size, keys_back
from effattn.registry import register

SHARES = ("head", "layer", "kv", "across")
INITS = ("pool", "gaussian")


class Projected(Backend):
    """Base of the methods that project along time: the parameters E, for keys, and F, for values.

    Both are (Hkv, slots, tokens) float32 for share="head" and (1, slots, tokens) for "layer"; for
    "kv" and "across" F is E, and for "across" `effattn.swap` gives all layers of the same spec one
    E. With "head" they are made at the first call, or at once when `kv_heads` is given."""

    implementations = linformer.IMPLEMENTATIONS

    def __init__(
        self,
        slots: int,
        tokens: int,
        share: str,
        init: str,
        seed: int,
        kv_heads: int | None,
        impl: str,
    ):
        super().__init__(impl)
        self.chosen_impl = linformer.choose(impl)
        self.slots, self.tokens = slots, tokens
        self.share = check_choice(f"{self.name}: share", share, SHARES)
        self.init = check_choice(f"{self.name}: init", init, INITS)
        self.seed = seed
        heads = kv_heads if share == "head" else 1
        names = ("E", "F") if share in ("head", "layer") else ("E",)
        for name in names:
            setattr(
                self,
                name,
                UninitializedParameter() if heads is None else self._initial(name, heads),
            )

    @property
    def tied(self) -> tuple[str, ...]:
        """Names of the parameters that all layers of a swapped model have in common."""
        return ("E",) if self.share == "across" else ()

    @property
    def per_kv_head(self) -> tuple[str, ...]:
        """Names of the parameters whose first size is the number of K/V heads."""
        return ("E", "F") if self.share == "head" else ()

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """(E, F), which may be one."""
        return self.E, self.F if self.share in ("head", "layer") else self.E

    def extra_repr(self) -> str:
        return f"share={self.share!r}, {super().extra_repr()}"

    def _initial(self, name: str, heads: int) -> nn.Parameter:
        if self.init == "pool":
            weight = pooling(self.slots, self.tokens).expand(heads, -1, -1).clone()
        else:
            # N(0, 1/k), as in the paper's proofs; E and F are drawn apart, of seeds that no two
            # share
            draw = torch.Generator().manual_seed(self.seed * 2 + (name == "F"))
            weight = torch.randn(heads, self.slots, self.tokens, generator=draw) * self.slots**-0.5
        return nn.Parameter(weight)

    def check_call(self, q, k, v, causal, extras):
        heads = k.shape[1]
        for name in ("E", "F"):
            weight = self._parameters.get(name)
            if weight is not None and is_lazy(weight):
                setattr(self, name, nn.Parameter(self._initial(name, heads).to(k.device)))
        if len(self.E) not in (1, heads):
            raise ValueError(f"k: expected {len(self.E)} heads, as many as E has, got {heads}")

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        for name in ("E", "F"):
            given, own = state_dict.get(prefix + name), self._parameters.get(name)
            if given is not None and own is not None and is_lazy(own):
                own.materialize(given.shape, device=given.device, dtype=given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weight_bytes(self, kv_heads: int, tokens: int) -> int:
        """Bytes of the first `tokens` columns of E and F, in float32."""
        heads, kinds = kv_heads if self.share == "head" else 1, len(set(map(id, self.weights)))
        return 4 * kinds * heads * self.slots * tokens


def pooling(slots: int, tokens: int) -> Tensor:
    """(slots, tokens): row i averages the tokens p with p * slots // tokens == i, a segment of
    neighbours.
    """
    owner = torch.arange(tokens) * slots // tokens
    weight = (owner == torch.arange(slots)[:, None]).float()
    return weight / weight.sum(dim=1, keepdim=True)


@register("linformer")
class Linformer(Projected):
    """softmax(scale q (E k)^T) (F v) with learned E and F (`k`, `max_length`); column p is for
    position p.

    Bidirectional only, since a slot mixes all tokens: `linformer_blockwise` is the causal variant.
    A sequence of T < max_length tokens takes the first T columns (padding is left out before E); a
    longer one is refused. A slot whose row of E is zero on all of a sequence's tokens takes no part
    in it, like a masked key.

    share: "head" (E and F per K/V head), "layer" (one E and F for all heads), "kv" (one matrix for
    both and all heads), "across" (that one matrix for all layers of a swap). init: "pool", the
    default, averages max_length / k neighbours a slot: with k = max_length that is exact attention,
    and below it a pretrained model starts from a blurred but ordered view of its own keys and
    values, where the paper's "gaussian" (N(0, 1/k), by a generator of its own, of `seed`) starts
    from noise. Pooled to k slots in max_length, T tokens feed about T k / max_length of them:
    choose max_length near the lengths you have. With fewer tokens than slots, nothing is saved.
    Scores: the mean of w keys has about w^-0.5 of their spread, so the softmax is flatter than the
    parent's until E is trained; no temperature is added, since E can learn it.

    window: beside the slots each query sees so many keys around itself (odd), exactly, in one
    softmax, where a slot counts as the max_length / k tokens that it stands for. With pooled slots
    that is LongT5's transient global attention (arXiv:2112.07916, section 3.1), of means of keys
    and values in the place of its normalised sums of tokens."""

    traits = Traits(exact=False, causal=False, bidirectional=True, learned=True, state="none")

    def __init__(
        self,
        k: int = 256,
        max_length: int = 4096,
        share: str = "head",
        init: str = "pool",
        seed: int = 0,
        kv_heads: int | None = None,
        impl: str = "auto",
        window: int | None = None,
    ):
        self.k, self.max_length = check_slots("linformer", k, max_length)
        super().__init__(k, max_length, share, init, seed, kv_heads, impl)
        self.window = None if window is None else check_size("linformer", "window", window)
        if self.window is not None and self.window % 2 == 0:
            raise ValueError(
                f"linformer: window: got {window}, a bidirectional window is odd; valid is "
                f"{self.window - 1} or {self.window + 1}"
            )

    def extra_repr(self) -> str:
        window = "" if self.window is None else f"window={self.window}, "
        return f"k={self.k}, max_length={self.max_length}, {window}{super().extra_repr()}"

    def _check(self, q, k, v, causal, *others):
        # before the general check, which could not say what to use instead
        if causal:
            raise Unsupported(
                "linformer: causal=True is not possible, E mixes future tokens into every slot; "
                "valid are causal=False and the backend 'linformer_blockwise', which projects "
                "finished blocks only"
            )
        super()._check(q, k, v, causal, *others)

    def check_call(self, q, k, v, causal, extras):
        if k.shape[2] > self.max_length:
            raise ValueError(
                f"k: got {k.shape[2]} tokens, linformer(max_length={self.max_length}) projects at "
                "most that many"
            )
        super().check_call(q, k, v, causal, extras)

    def new_state(self):
        raise Unsupported(
            "linformer: it cannot decode, every new token changes all slots; valid is "
            "'linformer_blockwise'"
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        E, F = self.weights
        start, mask = call.layout.start, call.layout.mask
        impl = self.runs(linformer.choose(self.impl, q.device))
        if impl == "reference":
            from effattn.kernels.linformer.reference import linformer as by_definition

            real = (
                torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
                if mask is None
                else mask
            )
            return by_definition(q, k, v, E, F, real, call.scale, self.window)
        slots_k, slots_v = (linformer.project(x, w, start, mask, impl) for x, w in ((k, E), (v, F)))
        fed = fed_slots(E, k.shape[2], start, mask)
        # Only the kernels' positions are concerned: every query comes at or after the first slot.
        layout = Layout(mask=fed, tail=max(0, q.shape[2] - self.k) if impl == "triton" else 0)
        how = {"causal": False, "scale": call.scale, "impl": impl}
        if self.window is None:
            out = flash.attention(q, slots_k, slots_v, Pattern(), layout, **how)
        else:
            far, lse = flash.attention(q, slots_k, slots_v, Pattern(), layout, lse=True, **how)
            back = keys_back(self.window, causal=False)
            near = Window(back=back, ahead=back)
            own = flash.attention(q, k, v, near, call.layout, lse=True, **how)
            out, _ = merge([own, (far, lse + math.log(self.max_length / self.k))])
        if start is None:
            return out
        real = call.layout.query_positions(q.shape[2], k.shape[2], q.device) >= 0
        return torch.where(real[:, None, :, None], out, 0.0)

    def cost(self, shape: Shape) -> Cost:
        """Two products with E and F, two with the slots (of pooled ones, those that so many tokens
        feed at first) and the window; E and F are read in float32. Backward: those twice, and the
        scores again."""
        both = shape.head_dim + shape.value_dim
        projecting = 2 * shape.batch * shape.kv_heads * self.k * shape.keys * both
        fed = self.k if self.init != "pool" else -(-shape.keys * self.k // self.max_length)
        pairs = shape.queries * fed + (0 if self.window is None else self._near(shape))
        attending = 2 * shape.batch * shape.heads * pairs
        weights = self.weight_bytes(shape.kv_heads, shape.keys)
        if shape.backward:
            slots = shape.kv_bytes // shape.keys * self.k
            return Cost(
                flops=2 * projecting + attending * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + shape.kv_bytes
                + slots
                + weights
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes + weights,
            )
        return Cost(
            flops=projecting + attending * both,
            read_bytes=shape.query_bytes + shape.kv_bytes + weights,
            write_bytes=shape.output_bytes,
        )

    def _near(self, shape: Shape) -> int:
        """Pairs of a query and a key in its window, in a head."""
        assert self.window is not None
        i, half = torch.arange(shape.keys - shape.queries, shape.keys), self.window // 2
        return int(((i + half).clamp(max=shape.keys - 1) - (i - half).clamp(min=0) + 1).sum())


def check_slots(backend: str, k: int, max_length: int) -> tuple[int, int]:
    """Both, checked: 1 <= k <= max_length."""
    check_size(backend, "max_length", max_length)
    if check_size(backend, "k", k) > max_length:
        raise ValueError(
            f"{backend}: k: got {k} slots for max_length={max_length} tokens; valid is 1 to "
            f"{max_length}"
        )
    return k, max_length


@torch.no_grad()
def fed_slots(E: Tensor, tokens: int, start: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(1 or B, K) bool: slots with a weight other than 0 for one of the row's real tokens, in any
    head. None: all. E (Hkv or 1, K, at least `tokens`); start (B,), mask (B, tokens): as in
    `Layout`.
    """
    if mask is None:
        columns = E[:, :, :tokens]
        # a slot that no token feeds is a key of zeros, which would take its share of the softmax;
        # two reductions are 5x as fast as != 0 and any()
        fed = ((columns.amax(dim=-1) > 0) | (columns.amin(dim=-1) < 0)).any(dim=0)[None]
        # elsewhere, looking means waiting
        known = fed.device.type == "cpu" and not torch.compiler.is_compiling()
        return None if known and fed.all() else fed
    # column p of E belongs to position p, so a row's mask is looked up at start + p
    number = torch.arange(tokens, device=mask.device) + (0 if start is None else start[:, None])
    real = mask.gather(1, number.clamp(max=tokens - 1).expand_as(mask)) & (number < tokens)
    weighs = (E[:, :, :tokens] != 0).any(dim=0)
    return real.float() @ weighs.float().mT > 0
