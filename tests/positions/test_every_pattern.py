"""Position rules with every exact pattern, and with sinks: the definition, pair by pair."""

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.kernels.flash.reference import rotary_scores
from effattn.positions.registry import rule
from effattn.surgery.swapping import swap

T, DIM, TRAINED = 40, 8, 16
RULES = [
    "rerope(window=5)",
    "leaky_rerope(window=5, k=3)",
    "alibi",
    "rope+alibi",
    "kerple",
    "kerple(kind='power')",
    "sandwich",
    "t5",
    "xpos",
    "dynamic_ntk(factor=2)",
    "dynamic_yarn",
    "logn",
]
SINKS = "sliding(window=9, sinks=3)"
PATTERNS = [
    "strided(stride=7)",
    "fixed(stride=6, summary=2)",
    "longnet(segments=[8, 24], dilations=[1, 3])",
    "sliding(window=5, dilation=3)",
    "sliding(window=[4, None])",
    "longformer(window=6, global_tokens=[0, 13])",
]


def made(spec):
    found = rule(spec, head_dim=DIM, heads=4, length=TRAINED)
    if found.learned is not None:
        with torch.no_grad():
            found.learned.add_(0.1 * torch.rand_like(found.learned))
    return found.double() if found.learned is not None else found


def qkv(tokens=T):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, tokens, DIM, generator=generator).double() for h in (4, 2, 2)]


def by_hand(spec, found, q, k, v):
    """Every pair's score by the rule's formula at the distance that it is shown to be at, softmax
    over what `sees` says."""
    attn, tokens = effattn.backend(spec), q.shape[2]
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    distance, length, stands = i - j, tokens, i.expand(tokens, tokens)
    if attn.farthest is not None:
        # the place in a cache of sinks and window
        sink = (j < attn.sinks) & (i - j >= attn.window)
        stands = torch.where(sink, i.clamp(max=attn.farthest), i)
        distance = stands - j
        length = min(tokens, attn.farthest + 1)
    if found.turns:
        angles, scaling = found.rotation.frequencies(found.trained, length)
        far = found.far
        clip = {} if far is None else {"window": far.window, "slow": far.slow}
        if found.spec == "xpos":
            dims = torch.arange(0, DIM, 2).double()
            zeta = (dims + 0.4 * DIM) / (1.4 * DIM)
            fade = zeta.repeat(2) ** (distance.double()[..., None] / 512)
            pairs = q[:, :, :, None] * fade
            scores = torch.stack(
                [
                    rotary_scores(
                        pairs[:, :, :, n], k[:, :, n : n + 1], distance[:, n : n + 1], angles
                    )
                    for n in range(tokens)
                ],
                dim=-1,
            )[..., 0, :]
        else:
            scores = rotary_scores(q, k, distance, angles, **clip) * scaling**2
    else:
        scores = q @ k.mT
    if found.scale is not None:
        scores = scores * found.scale.factors(stands, found.trained)
    scores = scores * DIM**-0.5
    if found.bias is not None:
        scores = (
            scores + found.bias.bias(found.trained, 64, found.learned).values(distance).double()
        )
    h = torch.arange(4)[:, None, None]
    counts = attn.sees(i, j, h, 4, True)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * counts
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("pattern", [SINKS, *PATTERNS])
def test_pair_by_pair(pattern, spec):
    found, given = made(spec), qkv()
    true = by_hand(pattern, found, *given)
    attn, learning = effattn.backend(pattern), [x.requires_grad_() for x in qkv()]
    weights = torch.linspace(-1, 1, true.numel(), dtype=torch.float64).view_as(true)
    out = attn(*learning, rotary=found)
    for got in (attn(*given, rotary=found), out):
        assert (got - true).norm() < 1e-6 * true.norm()
    learned = [] if found.learned is None else [found.learned]
    grads = torch.autograd.grad((out * weights).sum(), [*learning, *learned])
    truth = by_hand(pattern, found, *learning)
    for x, y in zip(
        grads, torch.autograd.grad((truth * weights).sum(), [*learning, *learned]), strict=True
    ):
        assert (x - y).norm() < 1e-5 * y.norm()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["rerope(window=5)", "alibi", "rope+alibi", "xpos", "logn"])
@pytest.mark.parametrize("pattern", [SINKS, *PATTERNS])
def test_a_state_gives_the_same_in_steps_and_chunks(pattern, spec):
    found, (q, k, v) = made(spec), qkv()
    attn = effattn.backend(pattern)
    whole = attn(q, k, v, rotary=found)
    for cuts in ((21, 22, 23, 40), (3, 20, 39, 40), (1, 2, 37, 40)):
        state, outs, low = attn.new_state(), [], 0
        for high in cuts:
            part = (x[:, :, low:high] for x in (q, k, v))
            outs.append(attn(*part, state=state, rotary=found))
            low = high
        assert (torch.cat(outs, dim=2) - whole).norm() < 1e-6 * whole.norm()


@torch.no_grad()
@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("pattern", [SINKS, "fixed(stride=6)", "strided(stride=7)"])
def test_padding_changes_nothing(pattern, spec):
    found, (q, k, v), attn = made(spec), qkv(), effattn.backend(pattern)
    for low, high in ((0, 7), (T - 6, T)):
        mask = torch.ones(2, T, dtype=torch.bool)
        mask[0, low:high] = False
        out = attn(q, k, v, rotary=found, padding_mask=mask)
        real = mask[0]
        alone = attn(*(x[:1, :, real] for x in (q, k, v)), rotary=found)
        assert (out[:1, :, real] - alone).norm() < 1e-6 * alone.norm()
        whole = attn(q[1:], k[1:], v[1:], rotary=found)
        assert (out[1:] - whole).norm() < 1e-6 * whole.norm()


@torch.no_grad()
def test_far_along_a_text_a_cache_of_sinks_is_all_that_counts():
    """A long sequence's last output is that of sinks and window alone, as a text of their own."""
    attn, (q, k, v) = effattn.backend(SINKS), qkv()
    kept = [*range(3), *range(T - 9, T)]
    for spec in ("rerope(window=5)", "alibi", "dynamic_ntk(factor=2)"):
        found = made(spec)
        out = attn(q, k, v, rotary=found)[:, :, -1]
        short = attn(*(x[:, :, kept] for x in (q, k, v)), rotary=found)[:, :, -1]
        assert (out - short).norm() < 1e-6 * short.norm()


def test_dropout_and_a_logit_beside_a_rule_and_sinks():
    found, given = made("rerope(window=5)"), qkv()
    outs = []
    for impl in ("torch", "reference"):
        torch.manual_seed(1)
        attn = effattn.backend(SINKS, impl=impl)
        outs.append(attn(*given, rotary=found, dropout=0.4, sink_logits=torch.ones(4).double()))
    assert (outs[0] - outs[1]).norm() < 1e-6 * outs[1].norm()


@torch.no_grad()
def test_live_models_generate_as_they_score():

    tokens = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(3))
    for pattern, spec in ((SINKS, "rerope(window=5)"), ("fixed(stride=6)", "alibi")):
        model = swap(tiny("llama"), pattern, positions=spec).eval()
        got = model.generate(tokens, max_new_tokens=6, do_sample=False)
        again = model(got[:, :-1], use_cache=False).logits.argmax(-1)
        assert torch.equal(again[:, 29:], got[:, 30:])


def test_what_stays_refused():
    given, found = qkv(), made("rerope(window=5)")
    attn = effattn.backend(SINKS)
    with pytest.raises(Unsupported, match="static cache; valid are a full cache"):
        attn(*given, rotary=found, state=attn.static_state(64))


@pytest.mark.interpreted
def test_triton_has_sinks_under_rules_and_no_parts():
    given = [x.float() for x in qkv()]
    for spec in ("rerope(window=5)", "alibi"):
        found = made(spec)
        true = effattn.backend(SINKS, impl="reference")(*given, rotary=found)
        got = effattn.backend(SINKS, impl="triton")(*given, rotary=found)
        assert (got - true).norm() < 1e-5 * true.norm()
        with pytest.raises(Unsupported, match="'triton' has no scores pair by pair"):
            effattn.backend("strided(stride=7)", impl="triton")(*given, rotary=found)
