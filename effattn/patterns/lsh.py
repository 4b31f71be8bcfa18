"""Reformer's LSH attention (arXiv:2001.04451), made causal-safe: chunks are counted inside of fixed
buckets.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); R: rounds; bucket (B, H, R, T) int64,
`code` (B, Hkv, R, T): a key's bucket and rank there in one number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.interface import Backend, Call, Cost, Shape, Traits
from effattn.kernels import lsh
from effattn.kernels.flash.pattern import layout_of
from effattn.patterns.exact import check_size
from effattn.registry import register
from effattn.states.buckets import BucketState
from effattn.states.full import FullState


@register("lsh")
class LSH(Backend):
    """A query attends to keys that hash as it does, in any of several rounds, and always to its
    own.

    In each round a token falls into one of `buckets` by argmax([xR; -xR]). A key's rank is how many
    keys of its bucket are older, its chunk is rank // chunk. A query is in the chunk of the newest
    key of its bucket that is not later than itself, and sees the keys of that chunk and of the one
    before, of its bucket, that are not later than itself: chunk to 2 chunk of them a round, once
    there are so many. (The paper cuts the whole sorted sequence into chunks, whose borders later
    tokens move; and its number of buckets follows the length.) Without causality it sees the chunk
    behind too. What several rounds show counts once, so that more rounds and longer chunks end in
    exact attention.

    shared_qk False: q and k are hashed each for itself. True: as in the paper, a query is hashed as
    its key is, keys are normalised to a mean square of 1, and a token sees its own key only where
    it sees no other; for models in which q and k are one, so not with fewer K/V heads than query
    heads.

    rotations (rounds, D, buckets / 2): the matrices R, a buffer, drawn at the first call from a
    generator of their own, seeded with `seed`, and rounded so that a model's change to half
    precision moves no bucket. All heads share them."""

    traits = Traits(
        exact=False, causal=True, bidirectional=True, learned=False, state="rings by bucket"
    )
    implementations = lsh.IMPLEMENTATIONS

    def __init__(
        self,
        rounds: int = 4,
        buckets: int = 32,
        chunk: int = 64,
        shared_qk: bool = False,
        seed: int = 0,
        impl: str = "auto",
    ):
        super().__init__(impl)
        self.chosen_impl = lsh.choose(impl)
        check_size("lsh", "rounds", rounds)
        check_size("lsh", "chunk", chunk)
        if check_size("lsh", "buckets", buckets, least=2) % 2:
            raise ValueError(
                f"lsh: buckets: got {buckets}, they come in opposite pairs; valid is "
                f"{buckets - 1} or {buckets + 1}"
            )
        if not isinstance(shared_qk, bool):
            raise ValueError(f"lsh: shared_qk: got {shared_qk!r}, valid are True and False")
        self.seed = check_size("lsh", "seed", seed, least=0)
        self.rule = lsh.Rule(rounds, buckets, chunk, shared_qk)
        self.register_buffer("rotations", None)

    def extra_repr(self) -> str:
        rule = self.rule
        parts = [f"rounds={rule.rounds}, buckets={rule.buckets}, chunk={rule.chunk}"]
        parts += ["shared_qk=True"] if rule.shared_qk else []
        parts += [f"seed={self.seed}"] if self.seed else []
        return ", ".join([*parts, super().extra_repr()])

    def check_call(self, q, k, v, causal, extras):
        if self.rule.shared_qk and q.shape[1] != k.shape[1]:
            raise Unsupported(
                f"lsh: shared_qk=True needs a key for every query, got {q.shape[1]} heads of q "
                f"and {k.shape[1]} of k; valid is shared_qk=False"
            )
        self._draw(q.shape[3], q.device)
        if self.rotations.shape[1] != q.shape[3]:
            raise ValueError(
                f"q: got heads of {q.shape[3]}, lsh's rotations are for "
                f"{self.rotations.shape[1]}, as in its first call; valid is a backend for each "
                "size"
            )

    @torch.no_grad()
    def _draw(self, dim: int, device: torch.device) -> None:
        if self.rotations is None:
            shape = (self.rule.rounds, dim, self.rule.buckets // 2)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
            # numbers that fp32, fp16 and bf16 hold alike: a cast of the model moves no bucket
            self.rotations = drawn.half().bfloat16().float().to(device)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # What is made at the first call has to be there before it can be loaded.
        given = state_dict.get(prefix + "rotations")
        if given is not None and self.rotations is None:
            self.rotations = torch.empty_like(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, q, k, v, causal, padding_mask, state, *others) -> None:
        super()._check(q, k, v, causal, padding_mask, state, *others)
        if not isinstance(state, BucketState):
            return
        if not causal:
            raise Unsupported(
                "lsh: state: got one with causal=False, where later tokens change the past; valid "
                "is None"
            )
        if q.shape[2] > k.shape[2]:
            raise ValueError(
                f"q: got {q.shape[2]} tokens, with a state valid are at most the {k.shape[2]} new "
                "keys"
            )

    def run(self, q, k, v, causal, padding_mask, state, scale, rotary, extras):
        """As `Backend.run`; but a state holds rotated keys, since their buckets are told from
        those.
        """
        if isinstance(state, BucketState) and rotary is not None:
            total, layout = state.seq_len + k.shape[2], layout_of(padding_mask)
            at = (layout.query_positions(x.shape[2], total, x.device).clamp(min=0) for x in (q, k))
            q, k = rotary(q, k, *(x if padding_mask is not None else x[0] for x in at))
            rotary = None
        return super().run(q, k, v, causal, padding_mask, state, scale, rotary, extras)

    def hash(self, x: Tensor) -> Tensor:
        """The buckets of x (B, H, T, D), int64 (B, H, rounds, T)."""
        return lsh.hash_tokens(x, self.rotations)

    def new_state(self) -> FullState:
        return FullState() if self.impl == "reference" else BucketState(self.rule, self.hash)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        impl = self.runs(lsh.choose(self.impl, q.device))
        layout, rule, queries = call.layout, self.rule, q.shape[2]
        real = layout.mask
        if call.state is not None:  # which has hashed the keys, and knows where they lie
            bucket, code, past, seen = layout.bucket, layout.code, layout.past, layout.seen
        else:
            bucket, past, seen = self.hash(k), None, None
            if real is not None:
                bucket = torch.where(real[:, None, None], bucket, rule.buckets)
            rank, _ = lsh.new_ranks(bucket, rule.buckets)
            code = torch.where(bucket < rule.buckets, rule.code(bucket, rank), lsh.NO_KEY)
        own_bucket = bucket[..., bucket.shape[3] - queries :]
        query_bucket = own_bucket if rule.shared_qk else self.hash(q)
        if impl == "reference":
            from effattn.kernels.lsh.reference import attention

            # the reference takes as many queries as keys; what is put before is not read
            query_bucket = torch.nn.functional.pad(query_bucket, (bucket.shape[3] - queries, 0))
            return attention(
                q, k, v, rule, query_bucket, bucket, causal=call.causal, scale=call.scale, real=real
            )
        if seen is not None:
            real = None if real is None else real[:, -queries:]
            return lsh.attention_few(
                q, k, v, query_bucket, seen, scale=call.scale, real=real, impl=impl
            )
        places = lsh.places_of(rule, query_bucket, bucket, code, call.causal, real, past)
        return lsh.attention(q, k, v, places, scale=call.scale, impl=impl)

    def cost(self, shape: Shape) -> Cost:
        """For buckets that fill evenly: hashing, and two products over the pairs of all rounds;
        every tensor moved once, of the keys in a cached call only those that are seen. Backward: as
        in the exact patterns, no hashing."""
        rule, new = self.rule, shape.queries if shape.causal else shape.keys
        i = torch.arange(shape.keys - shape.queries, shape.keys)
        # a bucket of n keys shows its last chunk, full or not, and the one before
        if shape.causal:
            filled = i // rule.buckets + 1
            seen = filled - ((filled - 1) // rule.chunk - 1).clamp(min=0) * rule.chunk
            pairs = torch.minimum(rule.rounds * seen, i + 1)
        else:
            seen = min(-(-shape.keys // rule.buckets), 3 * rule.chunk)
            pairs = torch.full_like(i, min(rule.rounds * seen, shape.keys))
        pairs = shape.batch * shape.heads * int(pairs.sum())
        group = shape.heads // shape.kv_heads
        keys = min(shape.keys, new + pairs // (shape.batch * shape.heads) * group)
        token = shape.batch * shape.kv_heads * (shape.head_dim + shape.value_dim) * shape.itemsize
        if shape.backward:
            return Cost(
                flops=2 * pairs * (3 * shape.head_dim + 2 * shape.value_dim),
                read_bytes=shape.query_bytes
                + keys * token
                + 2 * shape.output_bytes
                + shape.lse_bytes,
                write_bytes=shape.query_bytes + shape.kv_bytes,
            )
        hashed = shape.batch * (
            shape.kv_heads * new + (0 if rule.shared_qk else shape.heads * shape.queries)
        )
        held = BucketState.size(
            rule, shape.keys, (shape.head_dim + shape.value_dim) * shape.itemsize
        )
        return Cost(
            flops=2 * pairs * (shape.head_dim + shape.value_dim)
            + hashed * shape.head_dim * rule.rounds * rule.buckets,
            read_bytes=shape.query_bytes + keys * token,
            write_bytes=shape.output_bytes,
            state_bytes=shape.batch * shape.kv_heads * held,
        )
