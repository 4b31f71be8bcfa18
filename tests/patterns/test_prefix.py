"""The prefix of a prefix-LM: its definition by hand, padding, states, live models, what is
refused."""

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.positions.registry import rule
from effattn.surgery.swapping import swap

T = 24
LENGTHS = torch.tensor([7, 19])


def qkv(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, T, 8, generator=generator).double() for h in (4, 2, 2)]


def by_hand(q, k, v, lengths, bias=None):
    """(out, weights) pair by pair: a key that is not later, or one of the prefix for a query of
    it."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        place = torch.arange(T)
        scores = scores + bias.values(place[:, None] - place).double()
    for row, length in enumerate(lengths.tolist()):
        for i in range(T):
            for j in range(i + 1, T):
                if j >= length:
                    scores[row, :, i, j] = -torch.inf
    return scores.softmax(dim=-1) @ v


def run(attn, q, k, v, **call):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attn(*inputs, **call)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)


def close(got, true, bound=1e-12):
    for x, y in zip(got, true, strict=True):
        assert (x - y).norm() <= bound * y.norm()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_definition_by_hand(impl):
    attn, given = effattn.backend("dense", impl=impl), qkv()
    true = run(by_hand, *given, lengths=LENGTHS)
    close(run(attn, *given, prefix=LENGTHS), true)
    mask = torch.arange(T) < LENGTHS[:, None]
    close(run(attn, *given, prefix=mask), true)
    close(run(attn, *given, prefix=LENGTHS * 0), run(attn, *given))
    whole = run(attn, *given, prefix=torch.tensor([T, T]))
    close(whole, run(attn, *given, causal=False))


def test_no_gradients_few_tokens_views_and_precisions():
    attn, (q, k, v) = effattn.backend("dense"), qkv()
    true = by_hand(q, k, v, LENGTHS)
    laid = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    close([attn(*laid, prefix=LENGTHS)], [true])
    half = attn(*(x.bfloat16() for x in laid), prefix=LENGTHS)
    assert half.dtype == torch.bfloat16
    assert (half - true).norm() < 0.01 * true.norm()
    few = attn(q[:, :, :9], k[:, :, :9], v[:, :, :9], prefix=torch.tensor([5, 9]))
    part = run(attn, q[:, :, :9], k[:, :, :9], v[:, :, :9], prefix=torch.tensor([5, 9]))[0]
    close([few], [part])


@pytest.mark.parametrize("pad", [slice(0, 5), slice(T - 5, T), slice(3, 8)])
def test_padding_changes_nothing(pad):
    attn, (q, k, v) = effattn.backend("dense"), qkv()
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, pad] = False
    spec = rule("rope", head_dim=8, heads=4, length=64)
    for more in ({}, {"rotary": spec}):
        out = run(attn, q, k, v, prefix=LENGTHS, padding_mask=mask, **more)[0]
        real = mask[0].nonzero()[:, 0]
        alone = attn(*(x[:1, :, real] for x in (q, k, v)), prefix=LENGTHS[:1], **more)
        close([out[:1, :, real]], [alone])
        close([out[1:]], [attn(q, k, v, prefix=LENGTHS, **more)[1:]])


def test_biases_and_dropout_and_a_logit():
    bias = rule("alibi", head_dim=8, heads=4, length=64)
    given = qkv()
    truth = [effattn.backend("dense", impl=impl) for impl in ("torch", "reference")]
    close(*[run(one, *given, prefix=LENGTHS, rotary=bias) for one in truth])
    logits = torch.randn(4)
    close(*[run(one, *given, prefix=LENGTHS, sink_logits=logits) for one in truth])
    found = []
    for one in truth:
        torch.manual_seed(2)
        found.append(run(one, *given, prefix=LENGTHS, dropout=0.3))
    close(*found)


def test_a_prompt_with_a_state_and_steps_after_it():
    attn, (q, k, v) = effattn.backend("dense"), qkv()
    true = by_hand(q, k, v, LENGTHS)
    state, at = attn.new_state(), 20
    prompt = attn(*(x[:, :, :at] for x in (q, k, v)), state=state, prefix=LENGTHS)
    steps = [attn(*(x[:, :, t : t + 1] for x in (q, k, v)), state=state) for t in range(at, T)]
    close([torch.cat([prompt, *steps], dim=2)], [true])
    with pytest.raises(Unsupported, match=r"prefix: got it with 24 tokens in the state"):
        attn(*(x[:, :, :1] for x in (q, k, v)), state=state, prefix=LENGTHS * 0)
    assert state.seq_len == T


def test_a_live_model_by_row_with_its_cache_and_gradients():
    model = swap(tiny("llama"), "dense").eval()
    tokens = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths, near = torch.tensor([4, 12]), {"atol": 2e-6, "rtol": 1e-4}  # fp32 in the model
    plain, out = model(tokens).logits, model(tokens, prefix_lengths=lengths).logits
    assert not torch.allclose(plain[1, :11], out[1, :11], atol=1e-3)
    # a token of a prefix depends on a later one of it, and on nothing behind it
    other = tokens.clone()
    other[0, 3], other[0, 4:] = 95, 95
    moved = model(other, prefix_lengths=lengths).logits
    assert (moved[0, 0] - out[0, 0]).abs().max() > 1e-4
    other[0, 3] = tokens[0, 3]
    torch.testing.assert_close(
        model(other, prefix_lengths=lengths).logits[0, :4], out[0, :4], **near
    )
    # a padded row is what it is without its padding
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    padded = model(tokens, attention_mask=mask, prefix_lengths=lengths).logits[0, 5:]
    alone = model(tokens[:1, 5:], prefix_lengths=lengths[:1]).logits[0]
    torch.testing.assert_close(padded, alone, **near)
    # the cache goes on where the prompt ended
    cache = new_cache(model)
    first = model(tokens[:, :10], prefix_lengths=lengths.clamp(max=10), past_key_values=cache)
    rest = model(tokens[:, 10:], past_key_values=cache).logits
    whole = model(tokens, prefix_lengths=lengths.clamp(max=10)).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, **near)
    model.train()(tokens, labels=tokens, prefix_lengths=lengths).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, "causal=False, where everything"),
        ({"documents": torch.zeros(2, T, dtype=torch.long)}, "documents; valid is one sequence"),
        ({"rotary": "rerope(window=4)"}, "'rerope.window=4.', which are defined for causal"),
        ({"prefix": torch.tensor([3, T + 1])}, r"lengths \[3, 25\], valid are 0 to each row's"),
        ({"prefix": torch.tensor([-1, 3])}, "valid are 0 to each row's real tokens"),
        ({"prefix": torch.tensor([3])}, r" torch.int64 \(1,\), valid are lengths \(2,\)"),
        ({"prefix": torch.tensor([3.0, 4.0])}, "torch.float32"),
        ({"prefix": 3}, " 3, valid are lengths"),
        ({"prefix": torch.arange(T).expand(2, T) > 3}, "valid are the first real tokens"),
    ],
)
def test_what_is_refused(change, message):
    if "rotary" in change:
        change = {"rotary": rule(change["rotary"], head_dim=8, heads=4, length=64)}
    with pytest.raises(ValueError, match=rf"prefix: got.*{message}"):
        effattn.backend("dense")(*qkv(), **{"prefix": LENGTHS} | change)


def test_other_patterns_and_layers_refuse():
    with pytest.raises(ValueError, match="sliding: argument: got 'prefix'"):
        effattn.backend("sliding", window=4)(*qkv(), prefix=LENGTHS)
    tokens = torch.randint(1, 96, (2, 12))
    for pattern in ("sliding(window=4)", {"1": "dense"}, "linear"):
        model = swap(tiny("llama"), pattern)
        with pytest.raises(Unsupported, match=r"layer 0: .*prefix_lengths"):
            model(tokens, prefix_lengths=torch.tensor([3, 4]))
    model = swap(tiny("llama"), "dense", cache="int8")
    with pytest.raises(Unsupported, match="packed keys"):
        model(tokens, prefix_lengths=torch.tensor([3, 4]))


@pytest.mark.interpreted
def test_triton_sees_the_same():
    given = qkv()
    true = run(by_hand, *given, lengths=LENGTHS)
    single = [x.float() for x in given]
    got = run(effattn.backend("dense", impl="triton"), *single, prefix=LENGTHS)
    close([x.double() for x in got], true, 2e-6)
