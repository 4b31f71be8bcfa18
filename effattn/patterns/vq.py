"""Transformer-VQ (arXiv:2309.16354): keys become words of a codebook, attention to them is exact
and linear in time.

B: rows; Hq, Hkv: query and key/value heads; T, Tq: tokens, queries; D, Dv: of a key, of a value; C:
`codes` words of a codebook; N: blocks of queries.

    sum_j exp(q.w(k_j)) v_j  =  sum_c exp(q.w_c) sums_c,  sums_c = sum over j with code c of v_j

what is near is read token by token, so that keys get gradients, the rest code by code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from effattn.interface import Backend, Call, Cost, Shape, Traits
from effattn.kernels import decode, flash, vq
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern
from effattn.kernels.merge import merge
from effattn.kmeans import kmeans
from effattn.patterns.exact import check_size
from effattn.registry import register
from effattn.states.base import State
from effattn.states.full import FullState
from effattn.states.summaries import CodeState


@register("vq")
class VQ(Backend):
    """Softmax attention to k's nearest words of a codebook of `codes` words for each K/V head;
    values are as they are.

    The result is exactly that of dense attention to the quantized keys. All tokens of one code have
    one score, so what lies behind is read as codes, counts and sums of values: a query costs
    O(codes), and so does the state.

    Codebook: a buffer (Hkv, codes, D) float32, made at the first call of random N(0, 1) words, by a
    generator of its own (`seed`). That is of use for keys that look so only: `calibrate(keys)` fits
    it, and `effattn.swap(model, "vq", calibration=tokens)` does that for every layer (a swap that
    does not warns).
    `update(keys)` moves it as training goes on; it is never changed otherwise. Gradients: q's and
    v's are exact. k's go straight through the quantization, from the queries of a key's own block
    of `block` tokens and the next one (bidirectional: of its own); behind, only the codes connect
    them, as in the paper's code. `block` changes nothing else. `commitment_loss(keys)` is the
    paper's eq. 9, for training."""

    traits = Traits(
        exact=False, causal=True, bidirectional=True, learned=True, state="counts and sums per code"
    )
    implementations = vq.IMPLEMENTATIONS
    per_kv_head = ("codebook", "usage")
    straight_through = ("k",)  # whose gradient is not the function's slope

    def __init__(self, codes: int = 512, block: int = 256, seed: int = 0, impl: str = "auto"):
        super().__init__(impl)
        self.chosen_impl = vq.choose(impl)
        self.codes = check_size("vq", "codes", codes)
        self.block = check_size("vq", "block", block)
        self.seed = seed
        self.register_buffer("codebook", None)
        # (Hkv, codes): about how many keys of an update have each
        self.register_buffer("usage", None)

    def extra_repr(self) -> str:
        return f"codes={self.codes}, block={self.block}, {super().extra_repr()}"

    # ---- the codebook

    def check_call(self, q, k, v, causal, extras):
        self._prepare(k)

    def _prepare(self, k: Tensor) -> None:
        """A random codebook if there is none. ValueError if there is one, for other keys than k."""
        shape = (k.shape[1], self.codes, k.shape[3])
        if self.codebook is None:
            draw = torch.Generator().manual_seed(self.seed)
            self.codebook = torch.randn(shape, generator=draw).to(k.device)
            self.usage = torch.ones(shape[:2], device=k.device)
        if self.codebook.shape != shape:
            heads, _, dim = self.codebook.shape
            raise ValueError(
                f"k: expected {heads} heads of size {dim}, as the codebook has, got {shape[0]} of "
                f"size {shape[2]}"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        for name in self.per_kv_head:
            given = state_dict.get(prefix + name)
            if given is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(given))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def calibrate(
        self, keys: Tensor, padding_mask: Tensor | None = None, iterations: int = 10
    ) -> None:
        """Fits the codebook to keys (B, Hkv, T, D), as attention sees them (rotated): k-means++,
        then `iterations` of k-means. padding_mask (B, T) bool. ValueError for fewer keys than
        codes."""
        rows = _by_head(keys, padding_mask)
        if rows.shape[1] < self.codes:
            raise ValueError(
                f"vq: codes: got {self.codes} for {rows.shape[1]} keys, the codebook is larger "
                f"than the data; valid are more keys or codes <= {rows.shape[1]}"
            )
        self._prepare(keys)
        words, usage = kmeans(
            rows, self.codes, iterations, torch.Generator().manual_seed(self.seed)
        )
        self.codebook.copy_(words)
        self.usage.copy_(usage)

    @torch.no_grad()
    def update(self, keys: Tensor, padding_mask: Tensor | None = None, decay: float = 0.99) -> None:
        """One step of the moving average (eq. 10) towards keys (B, Hkv, T, D); words that are not
        used stay.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"vq: decay: got {decay!r}, valid is 0 to 1")
        self._prepare(keys)
        rows = _by_head(keys, padding_mask)[None]
        sums, counts = vq.summarise(
            rows, vq.nearest(rows, self.codebook), words=self.codes, impl="torch"
        )
        usage = decay * self.usage + (1 - decay) * counts[0, :, 0]
        moved = (
            decay * self.usage[..., None] * self.codebook + (1 - decay) * sums[0, :, 0]
        ) / usage[..., None]
        self.codebook.copy_(torch.where(usage[..., None] > 1e-6, moved, self.codebook))
        self.usage.copy_(usage)

    def commitment_loss(self, keys: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The mean square distance of keys (B, Hkv, T, D) from their words, float32; its gradient
        goes to the keys.
        """
        self._prepare(keys)
        rows = _by_head(keys, padding_mask)[None]
        return (
            (rows - self._words(vq.nearest(rows, self.codebook, self.impl), rows)).square().mean()
        )

    def _words(self, codes: Tensor, like: Tensor) -> Tensor:
        """codes (B, Hkv, T) -> their words (B, Hkv, T, D)."""
        heads = torch.arange(codes.shape[1], device=codes.device)[:, None]
        return self.codebook.to(like.dtype)[heads, codes]

    # ---- attention

    def new_state(self) -> State:
        return FullState() if self.impl == "reference" else CodeState()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        layout, total = call.layout, call.layout.tokens(k.shape[2])
        impl = self.runs(vq.choose(self.impl, q.device))
        if impl == "reference":
            return self._reference(q, k, v, call)
        codes = vq.nearest(k, self.codebook, impl)
        # the straight-through estimator: the word's value, the key's gradient
        words = self._words(codes, k)
        words = words + (k - k.detach()) if k.requires_grad else words
        state, first = call.state, total - q.shape[2]
        if state is not None and state.counts is None:
            shape = (*k.shape[:2], self.codes)
            state.counts = torch.zeros(shape, dtype=torch.int32, device=k.device)
            state.sums = v.new_zeros(
                *shape, v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)
            )
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        few = state is not None and q.shape[2] <= decode.MOST_QUERIES and not learning
        options = dict(causal=call.causal, scale=call.scale, impl=impl, lse=True)
        if few:  # all that is held, and the codes of the rest
            near = decode.attention(q, words, v, Pattern(), layout, **options)
            behind, size = (state.sums[:, :, None], state.counts[:, :, None]), None
        else:
            # blocks by tokens' numbers, padding counted: they decide nothing but where k's
            # gradients come from
            blocks = Blocks(size=self.block, look_back=int(call.causal))
            near = flash.attention(
                q, words, v, blocks, Layout(tail=layout.tail, mask=layout.mask), **options
            )
            behind, size = (
                self._behind(v, codes, layout, first, call.causal, state, impl),
                self.block,
            )
        far = vq.read(
            q,
            self.codebook.to(q.dtype),
            *behind,
            scale=call.scale,
            size=size,
            first=first,
            impl=impl,
        )
        if state is not None:
            self._fold(state, v, codes, layout.mask, impl)
        out, _ = merge([near, far])
        if call.causal or layout.start is None:
            return out
        real = layout.query_positions(q.shape[2], k.shape[2], q.device) >= 0
        return torch.where(real[:, None, :, None], out, 0.0)

    def _behind(
        self, v, codes, layout: Layout, first: int, causal: bool, state: CodeState | None, impl: str
    ):
        """Sums (B, Hkv, N, codes, Dv) and counts of what the N blocks of queries do not see
        directly.
        """
        parts = vq.summarise(
            v,
            codes,
            words=self.codes,
            real=layout.mask,
            size=self.block,
            first=layout.tail,
            impl=impl,
        )
        skipped = first // self.block - layout.tail // self.block  # blocks without queries
        old = (None, None) if state is None else (state.sums, state.counts)
        found = []
        for x, more in zip(parts, old, strict=True):
            same = [0, 0] * (x.ndim - 3)
            # A running sum over blocks: causal, of all but the last two (a query sees its own block
            # and the one before directly); else of all before and all after.
            if causal:
                behind = pad(
                    x[:, :, : max(x.shape[2] - 2, 0)], [*same, min(x.shape[2], 2), 0]
                ).cumsum_(dim=2)
            else:
                before, after = (
                    x[:, :, :-1].cumsum(dim=2, dtype=x.dtype),
                    x[:, :, 1:].flip(2).cumsum(2, dtype=x.dtype),
                )
                behind = pad(before, [*same, 1, 0]) + pad(after.flip(2), [*same, 0, 1])
            behind = behind[:, :, skipped:]
            found.append(behind if more is None else behind + more[:, :, None])
        return found

    def _fold(
        self, state: CodeState, v: Tensor, codes: Tensor, mask: Tensor | None, impl: str
    ) -> None:
        """Adds the tokens that the state is about to let go to its counts and sums."""
        leaving = v.shape[2] - state.held(state.total)
        if leaving > 0:
            real = None if mask is None else mask[:, :leaving]
            some = leaving > decode.MOST_QUERIES  # a few are no work for a kernel
            sums, counts = vq.summarise(
                v[:, :, :leaving],
                codes[:, :, :leaving],
                words=self.codes,
                real=real,
                impl=impl if some else "torch",
            )
            state.sums, state.counts = state.sums + sums[:, :, 0], state.counts + counts[:, :, 0]
        state.let_go()

    def _reference(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        from effattn.kernels.vq.reference import attention

        queries, keys = q.shape[2], k.shape[2]
        i = call.layout.query_positions(queries, keys, q.device)[:, :, None]
        j = call.layout.key_positions(keys, k.device)[:, None]
        visible = (i >= 0) & (j >= 0) & ((j <= i) if call.causal else True)
        number = torch.arange(keys, device=k.device)
        apart = number[keys - queries :, None] // self.block - number // self.block
        direct = (apart == 0) | (apart == 1) if call.causal else apart == 0
        return attention(q, k, v, self.codebook, visible, direct, call.scale)

    def cost(self, shape: Shape) -> Cost:
        """Finding the codes of new keys, and two products with as many codes as a query can see at
        most; a cached call reads the counts and sums. Backward: the scores again and three products
        more; codes are not found again."""
        first, wide = shape.keys - shape.queries, max(4, shape.itemsize)
        seen = (
            torch.arange(first, shape.keys) + 1
            if shape.causal
            else torch.full((shape.queries,), shape.keys)
        )
        pairs = shape.batch * shape.heads * int(seen.clamp(max=self.codes).sum())
        token, new = shape.kv_bytes // shape.keys, shape.queries if shape.causal else shape.keys
        heads = shape.batch * shape.kv_heads
        codebook = 4 * shape.kv_heads * self.codes * shape.head_dim
        summary = heads * self.codes * (4 + wide * shape.value_dim)
        held = CodeState().held(first) * token if shape.causal else 0
        past = held + (summary if shape.causal and first else 0)
        if shape.backward:
            return Cost(
                flops=2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + new * token
                + past
                + codebook
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        return Cost(
            flops=2 * pairs * (shape.head_dim + shape.value_dim)
            + 2 * heads * new * self.codes * shape.head_dim,
            read_bytes=shape.query_bytes + new * token + past + codebook,
            write_bytes=shape.output_bytes,
            state_bytes=summary + CodeState().held(shape.keys) * token if shape.causal else 0,
        )


def _by_head(keys: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, Hkv, T, D) -> (Hkv, N, D) float32 or better, without padding."""
    if keys.ndim != 4 or (
        padding_mask is not None and padding_mask.shape != (keys.shape[0], keys.shape[2])
    ):
        got = tuple(keys.shape), None if padding_mask is None else tuple(padding_mask.shape)
        raise ValueError(
            f"keys, padding_mask: expected (B, Hkv, T, D) and (B, T), got {got[0]} and {got[1]}"
        )
    rows = keys.to(torch.promote_types(keys.dtype, torch.float32)).transpose(0, 1)
    return rows.flatten(1, 2) if padding_mask is None else rows[:, padding_mask]
