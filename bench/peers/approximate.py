"""Attention in linear time by the packages that have it: performer-pytorch, linformer,
reformer-pytorch, linear-attention-transformer, transformers' Reformer and flash-linear-attention.

Most draw parameters of their own, so none of our backends says what is right: they come as
`Defined`, with their method's dense formula for the parameters that were drawn."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bench.case import Absent, Call, Defined
from bench.peers.windows import Given


def _same_heads(case) -> None:
    if case.heads != case.kv_heads:
        raise Absent("it has as many key as query heads")


def _weighted(weights: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """sum_j w_ij v_j and sum_j w_ij, of the keys that are not later if causal."""
    weights = weights.tril() if causal else weights
    return weights @ v, weights.sum(dim=-1, keepdim=True)


def performer(attn, case, inputs) -> Call:
    """FAVOR+. Causal, it runs its plain torch version unless pytorch-fast-transformers is there."""
    from performer_pytorch import FastAttention

    _same_heads(case)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which version it has
        run = FastAttention(case.dim, nb_features=attn.features, causal=case.causal)
    run = run.to(inputs[0].device, inputs[0].dtype)

    def features(x: Tensor, over: tuple[int, ...]) -> Tensor:
        x = x * case.dim**-0.25
        exponent = x @ run.projection_matrix.to(x).mT
        top = exponent.amax(dim=over, keepdim=True).detach()
        return torch.exp(exponent - x.square().sum(dim=-1, keepdim=True) / 2 - top) + 1e-4

    def definition(q, k, v):
        q, k = features(q, (-1,)), features(k, (-1, -2))
        out, norm = _weighted(q @ k.mT, v, case.causal)
        # Its features are smaller by features ** 0.5: so is what it adds to the causal denominator.
        return out / (
            norm + 1e-6 * attn.features**0.5 * q.sum(dim=-1, keepdim=True) if case.causal else norm
        )

    return Defined(run, definition)


def linformer(attn, case, inputs) -> Call:
    """LinformerSelfAttention without its projections of hidden states; all heads share E and F."""
    from linformer import LinformerSelfAttention

    _same_heads(case)
    if case.causal:
        raise Absent("it is bidirectional")
    layer = LinformerSelfAttention(
        case.heads * case.dim, inputs[1].shape[2], k=attn.k, heads=case.heads
    )
    layer.to_q, layer.to_k, layer.to_v, layer.to_out = Given(), Given(), Given(), nn.Identity()
    layer = layer.to(inputs[0].device, inputs[0].dtype)

    def call(q, k, v):
        layer.to_q.value, layer.to_k.value, layer.to_v.value = (
            x.transpose(1, 2).flatten(2) for x in (q, k, v)
        )
        out = layer(layer.to_k.value)
        return out.unflatten(-1, (case.heads, case.dim)).transpose(1, 2)

    def definition(q, k, v):
        k, v = layer.proj_k.detach().to(k).mT @ k, layer.proj_v.detach().to(v).mT @ v
        return torch.softmax(case.dim**-0.5 * q @ k.mT, dim=-1) @ v

    return Defined(call, definition)


def linear(attn, case, inputs, bucket: int = 1) -> Call:
    """Softmaxed queries, exponentials of keys. Causal, its modules have buckets of one token
    (`blindspot_size`): a query sees all that is not later, and a D x D sum for every token is
    written to memory."""
    from linear_attention_transformer.linear_attention_transformer import (
        causal_linear_attn,
        linear_attn,
    )

    _same_heads(case)

    def call(q, k, v):
        return (
            causal_linear_attn(q, k, v, bucket_size=bucket) if case.causal else linear_attn(q, k, v)
        )

    def definition(q, k, v):
        q = torch.softmax(q, dim=-1) * case.dim**-0.5
        if not case.causal:
            return q @ torch.softmax(k, dim=-2).mT @ v
        at = torch.arange(k.shape[2], device=k.device) // bucket
        seen = at[:, None] >= at if bucket == 1 else at[:, None] > at
        out, norm = _weighted((q @ k.exp().mT) * seen, v, causal=False)
        return out / norm.clamp(min=1e-3)

    return Defined(call, definition)


def linear_with_blind_spot(attn, case, inputs) -> Call:
    """In buckets of 64 tokens a query sees those before its own only: it is blind to the newest 1
    to 64 tokens.
    """
    if not case.causal:
        raise Absent("buckets are for causal attention")
    return linear(attn, case, inputs, bucket=64)


def reformer(attn, case, inputs) -> Call:
    """LSHAttention, in which queries are the keys: k is not used. It hashes anew at every call."""
    from reformer_pytorch import LSHAttention

    _same_heads(case)
    rule, last = attn.rule, SimpleNamespace(buckets=None)
    run = LSHAttention(bucket_size=rule.chunk, n_hashes=rule.rounds, causal=case.causal)

    def call(q, k, v):
        out, _, last.buckets = run(q.flatten(0, 1), v.flatten(0, 1))
        return out.unflatten(0, q.shape[:2])

    def definition(q, k, v):
        scores = q @ nn.functional.normalize(q, dim=-1).mT * case.dim**-0.5
        buckets = last.buckets.reshape(*q.shape[:2], rule.rounds, -1)
        return sorted_chunks(scores, v, buckets, rule.chunk, case.causal, itself=-5e4)

    return Defined(call, definition)


def transformers_reformer(attn, case, inputs) -> Call:
    """LSHSelfAttention with its projections replaced by q and v themselves: queries are the keys, k
    is not used.
    """
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    from transformers.utils import logging

    _same_heads(case)
    rule, last = attn.rule, SimpleNamespace(buckets=None)
    config = ReformerConfig(
        attention_head_size=case.dim,
        num_attention_heads=case.heads,
        hidden_size=case.heads * case.dim,
        num_hashes=rule.rounds,
        lsh_attn_chunk_length=rule.chunk,
        is_decoder=case.causal,
        num_buckets=None,
        lsh_attention_probs_dropout_prob=0.0,
    )
    layer = LSHSelfAttention(config).to(inputs[0].device, inputs[0].dtype).eval()
    layer.query_key, layer.value = Given(), Given()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells which number of buckets it chose
    layer._set_num_buckets(inputs[0].shape[2])
    logging.set_verbosity(before)

    def call(q, k, v):
        layer.query_key.value, layer.value.value = (x.transpose(1, 2).flatten(2) for x in (q, v))
        out = layer(layer.value.value)
        last.buckets = out.buckets
        return out.hidden_states.unflatten(-1, (case.heads, case.dim)).transpose(1, 2)

    def definition(q, k, v):
        size = torch.rsqrt(q.square().mean(dim=-1, keepdim=True) + 1e-6)
        scores = q @ (q * size * case.dim**-0.5).mT
        return sorted_chunks(scores, v, last.buckets, rule.chunk, case.causal, itself=-1e5)

    return Defined(call, definition)


def sorted_chunks(
    scores: Tensor, v: Tensor, buckets: Tensor, chunk: int, causal: bool, itself: float
) -> Tensor:
    """The Reformer paper's attention, densely. scores (B, H, T, T), v (B, H, T, D), buckets (B, H,
    rounds, T) int64, of which no two rounds share one.

    All rounds, one behind the other, are sorted by bucket, then by position, and cut into chunks: a
    query sees its own and the one before (of the first, the last). `itself` is the score of a token
    with itself. Rounds are weighted with the sums of their exponentials."""
    tokens, rounds = scores.shape[-1], buckets.shape[2]
    at = torch.arange(tokens, device=v.device)
    scores = scores.masked_fill(at[:, None] == at, itself)
    scores = scores.masked_fill(at[:, None] < at, -torch.inf) if causal else scores
    order = (buckets * tokens + at).flatten(2).argsort(dim=-1)
    # of each token's chunk, by round
    number = (order.argsort(dim=-1) // chunk).unflatten(2, (rounds, tokens))
    outs, sums = [], []
    for own in number.unbind(2):
        own = own[..., None]
        before = (own - 1) % (rounds * tokens // chunk)
        seen = sum(
            (other[..., None, :] == own).int() + (other[..., None, :] == before)
            for other in number.unbind(2)
        )
        logits = scores + seen.to(v.dtype).log()
        outs.append(torch.softmax(logits, dim=-1) @ v)
        sums.append(torch.logsumexp(logits, dim=-1, keepdim=True))
    return (torch.stack(outs) * torch.softmax(torch.stack(sums), dim=0)).sum(dim=0)


def flash_linear(attn, case, inputs) -> Call:
    """chunk_linear_attn, and chunk_simple_gla (which is retention) where there is a decay; features
    by torch before.
    """
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    _same_heads(case)
    if not case.causal:
        raise Absent("it is causal")
    if attn.map not in ("elu", "identity") or (attn.decay is not None and attn.normalize):
        raise Absent("raced with elu + 1, and without features; with decay it has no denominator")
    decay = attn.kernel_options(inputs[1]).get("decay")
    decay = None if decay is None else decay.float().log()
    scale = 1.0 if attn.normalize else case.dim**-0.5

    def call(q, k, v):
        if attn.map == "elu":
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if decay is None:
            out, _ = chunk_linear_attn(q, k, v, scale=scale, normalize=attn.normalize)
        else:
            out, _ = chunk_simple_gla(q, k, v, g_gamma=decay, scale=scale)
        return out.transpose(1, 2)

    return call
