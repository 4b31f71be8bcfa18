"""Caches of which each head keeps its own tokens: against a list of what was kept, and attention
over those alone; bytes, beams, padding, speculation, models."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from effattn import embedded
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.registry import backend
from effattn.states.caches import parse
from effattn.surgery.checkpoint import load, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

H, HKV, D = 4, 2, 8
GROUP = H // HKV


class Oracle:
    """One row without padding: everything that came, and for each K/V head the numbers of the
    tokens that it has. Slow, one head and token at a time."""

    def __init__(self, rule):
        self.rule, self.total, self.since = rule, 0, 0
        self.q, self.k, self.v = (torch.zeros(n, 0, D).double() for n in (H, HKV, HKV))
        self.has = [[] for _ in range(HKV)]

    def step(self, q, k, v):
        """q (H, T, D), k, v (HKV, T, D) -> (H, T, D); then tokens go."""
        new = q.shape[1]
        self.q, self.k, self.v = (
            torch.cat([old, x], dim=1)
            for old, x in zip((self.q, self.k, self.v), (q, k, v))  # noqa: B905
        )
        out = torch.zeros(H, new, D).double()
        for t in range(new):
            for h in range(H):
                own = [*self.has[h // GROUP], *range(self.total, self.total + t + 1)]
                shares = (self.k[h // GROUP, own] @ q[h, t] * D**-0.5).softmax(dim=0)
                out[h, t] = shares @ self.v[h // GROUP, own]
        for own in self.has:
            own += range(self.total, self.total + new)
        self.total += new
        self.since += new
        rule = self.rule
        if new > 16 or (rule.every is not None and self.since >= rule.every):
            self.since = 0
            self.forget(min(new, self.total) if new > 16 else None)
        return out

    def forget(self, queries):
        rule = self.rule
        most = rule.keep if type(rule.keep) is int else int(self.total * rule.keep)
        most = min(self.total, max(most, rule.sinks + rule.recent))
        if sum(map(len, self.has)) <= HKV * most:
            return
        newest = [*range(max(0, self.total - rule.recent), self.total)]
        newest = [t for t in newest if t in self.has[0] and all(t in own for own in self.has)]
        ranked = []  # (the higher the better, head, token)
        for head, own in enumerate(self.has):
            scores = self.scores(head, own, queries)
            old = [t for t in own if t not in newest]
            sinks = old[: rule.sinks]
            order = sorted(old, key=lambda t: (t not in sinks, -scores[t], t))
            sure = order[: int((most - len(newest)) * rule.floor)] if rule.adaptive else []
            ranked += [
                ((t in sinks or t in sure, scores[t]), head, t, at) for at, t in enumerate(order)
            ]
        left = most - len(newest)
        if rule.adaptive:
            stay = sorted(ranked, key=lambda one: one[0], reverse=True)[: left * HKV]
        else:
            stay = [one for one in ranked if one[3] < left]
        kept = [sorted(one[2] for one in stay if one[1] == head) for head in range(HKV)]
        self.has = [[*own, *newest] for own in kept]

    def scores(self, head, own, queries):
        """token -> score."""
        name = self.rule.policy.name
        if name == "norm":
            return {t: -float(self.k[head, t].norm()) for t in own}
        if name == "streaming":
            return {t: float(t) for t in own}
        return self.looked_at(head, own, queries)

    def looked_at(self, head, own, queries):
        """SnapKV's, by loops."""
        policy = self.rule.policy
        window = min(policy.window, queries or policy.window)
        asking = [*range(self.total - window, self.total)]
        mass = dict.fromkeys(own, 0.0)
        for h in range(head * GROUP, (head + 1) * GROUP):
            for i in asking:
                seen = [t for t in own if t <= i]
                shares = (self.k[head, seen] @ self.q[h, i] * D**-0.5).softmax(dim=0)
                for t, share in zip(seen, shares.tolist(), strict=True):
                    mass[t] += share / (GROUP * window)
        old = [t for t in own if t < asking[0]]
        half, smooth = policy.pool // 2, {}
        for at, t in enumerate(old):
            near = old[max(0, at - half) : at + half + 1]
            smooth[t] = sum(mass[x] for x in near) / policy.pool
        return smooth | dict.fromkeys(asking, 1e9)


def rule_of(**options):
    spec = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return parse(f"evict({spec})")


def numbers(kept, state):
    """How many tokens each head has, (B, HKV)."""
    newest = state.newest.k.shape[2]
    if kept is None:
        return [[newest] * HKV] * len(state.newest.k)
    return [[newest + n for n in kept.lengths[row * HKV : (row + 1) * HKV]] for row in kept.rows]


RULES = [
    dict(policy="norm", keep=0.5, sinks=2, recent=4, every=None),
    dict(policy="norm", keep=12, sinks=2, recent=4, every=8),
    dict(policy="norm", keep=12, sinks=0, recent=0, every=20),
    dict(policy="streaming", keep=0.3, sinks=3, recent=1, every=5),
    dict(policy="norm", keep=16, sinks=1, recent=3, every=6, adaptive=True),
    dict(policy="norm", keep=0.4, sinks=2, recent=5, every=16, adaptive=True, floor=0.5),
    dict(policy="snapkv(window=6)", keep=14, sinks=2, recent=6, every=9),
    dict(policy="snapkv(window=3, pool=3)", keep=0.5, sinks=2, recent=5, every=12, adaptive=True),
]


@torch.no_grad()
@pytest.mark.parametrize("options", RULES, ids=str)
def test_against_a_list_of_what_was_kept(options):
    """Prompts, chunks and steps of rows, some of them padded on the left; rows change places, and
    the newest tokens are taken back."""
    for seed in range(2):
        dice = random.Random(seed)
        torch.manual_seed(seed)
        cache, attn = rule_of(**options), backend("dense")
        state = cache.new_state(attn)
        rows = [Oracle(state.rule) for _ in range(2)]
        pads = [0, dice.choice([0, 0, 9])]
        first = True
        for tokens in [dice.choice([5, 24, 40]), *dice.choices([1, 1, 1, 2, 7, 16, 19], k=10)]:
            new = [torch.randn(len(rows), n, tokens, D).double() for n in (H, HKV, HKV)]
            # the length of a call counts its padding
            pads = [pad if tokens - pad > 16 else 0 for pad in pads] if first else pads
            mask = torch.ones(len(rows), int(state.seq_len) + tokens, dtype=torch.bool)
            for row, pad in enumerate(pads):
                mask[row, :pad] = False
            out = attn(*new, state=state, padding_mask=mask if any(pads) else None)
            for row, one in enumerate(rows):
                low = pads[row] if first else 0
                want = one.step(*(x[row, :, low:] for x in new))
                torch.testing.assert_close(out[row, :, low:], want)
            first = False
            if not any(pads) or len(set(pads)) == 1:
                assert numbers(state.kept, state) == [[len(x) for x in one.has] for one in rows]
            if dice.random() < 0.2:
                index = [dice.randrange(len(rows)) for _ in rows]
                state.reorder(torch.tensor(index))
                rows, pads = [copy.deepcopy(rows[i]) for i in index], [pads[i] for i in index]


@torch.no_grad()
def test_bytes_are_those_declared():
    """Every storage that is held, after a prompt and after many steps."""
    torch.manual_seed(0)
    attn, dim, heads = backend("dense"), 64, (6, 3)
    for spec in (
        "evict(policy='snapkv', keep=0.5)",
        "evict(policy='norm', keep=300, adaptive=True, every=24)",
        "evict(policy='norm', keep=0.25, format='int8')",
        "evict(policy='norm', keep=0.25, format='int4')",
    ):
        cache = parse(spec).fit(Sizes)
        state = cache.new_state(attn)
        attn(*(torch.randn(2, h, 1024, dim) for h in (heads[0], heads[1], heads[1])), state=state)
        declared = state.predicted_bytes(1024, 2, 3, dim, 4)
        assert state.nbytes == declared
        keep = cache.keep if type(cache.keep) is int else cache.keep * 1024
        if cache.format is None:
            assert abs(declared / (2 * keep * 3 * 2 * dim * 4) - 1) < 0.03
        held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in state.tensors()}
        assert sum(x.nbytes() for x in held.values()) <= 1.03 * declared
        for _ in range(60 if cache.bounded else 0):  # never more than `every` tokens above
            attn(*(torch.randn(2, h, 1, dim) for h in (heads[0], heads[1], heads[1])), state=state)
            assert state.nbytes <= declared * (300 + 24) / 300 * 1.01


class Sizes:
    """Of a layer's keys and values."""

    kv_heads, head_dim, value_dim = 3, 64, 64


def test_bytes_of_one_more_token():
    """Of a number of tokens those of one, whether or not tokens go while decoding."""
    sizes, whole = SimpleNamespace(kv_heads=HKV, head_dim=D, value_dim=D), 4 * HKV * 2 * D
    shares = {"keep=128": 1, "keep=128, every=None": 1, "keep=0.5, every=None": 0.5}
    for spec, share in shares.items():
        found = parse(f"evict({spec})").fit(sizes).bytes_per_token(sizes)
        assert found == whole * share


@torch.no_grad()
def test_rows_share_what_was_kept():
    attn = backend("dense")
    state = parse("evict(policy='norm', keep=64, recent=8)").new_state(attn)
    q, k, v = (torch.randn(1, h, 200, D) for h in (H, HKV, HKV))
    attn(q, k, v, state=state)
    one = state.nbytes
    state.repeat(8)
    assert state.nbytes - one <= 7 * (8 * HKV * 2 * D * 4 + 8)  # the newest of each, and a number
    alone = copy.deepcopy(state)
    alone.select(torch.tensor([3]))
    new = [torch.randn(8, h, 1, D) for h in (H, HKV, HKV)]
    out = attn(*new, state=state)
    torch.testing.assert_close(out[3:4], attn(*(x[3:4] for x in new), state=alone))


@torch.no_grad()
def test_what_can_be_taken_back():
    attn = backend("dense")
    state = parse("evict(policy='norm', keep=40, recent=20)").new_state(attn)
    q, k, v = (torch.randn(2, h, 120, D) for h in (H, HKV, HKV))
    attn(*(x[:, :, :100] for x in (q, k, v)), state=state)
    before = copy.deepcopy(state)
    attn(*(x[:, :, 100:110] for x in (q, k, v)), state=state)
    with pytest.raises(ValueError, match=r"crop: got 79, .*valid are 0 and 80 to 110"):
        state.crop(79)
    state.crop(100)
    again = [x[:, :, 110:] for x in (q, k, v)]
    assert torch.equal(attn(*again, state=state), attn(*again, state=before))
    state.crop(90)
    assert state.seq_len == 90
    state.crop(0)
    assert state.nbytes == 0


@torch.no_grad()
def test_packed_tokens():
    """int8 as full precision does, int4 not far off; nothing is packed twice."""
    torch.manual_seed(0)
    attn, outs = backend("dense"), {}
    new = [torch.randn(2, h, 200, 32) for h in (H, HKV, HKV)]
    steps = [[torch.randn(2, h, 1, 32) for h in (H, HKV, HKV)] for _ in range(20)]
    for format in (None, "int8", "int4"):
        spec = f"evict(policy='norm', keep=64, recent=8, every=24, format={format!r})"
        cache = parse(spec).fit(type("S", (), dict(kv_heads=2, head_dim=32, value_dim=32)))
        state = cache.new_state(attn)
        attn(*new, state=state)
        outs[format] = torch.cat([attn(*step, state=state) for step in steps], dim=2)
        before = {tuple(row.tolist()) for row in state.kept.k}
        for step in steps[:4]:  # tokens go again
            attn(*step, state=state)
        after = {tuple(row.tolist()) for row in state.kept.k}
        assert len(before) == len(after) == 2 * HKV * (64 - 8)
        assert len(before & after) >= len(after) - 2 * HKV * 24
    size = outs[None].norm()
    assert 0 < (outs["int8"] - outs[None]).norm() / size < 0.03
    assert (outs["int4"] - outs[None]).norm() / size < 0.3


@torch.no_grad()
def test_what_is_packed_of_a_row_does_not_depend_on_its_neighbours():
    """A row that may keep all, beside one of which tokens go: as it is alone."""
    torch.manual_seed(0)
    attn, tokens, own = backend("dense"), 200, 60
    cache = parse("evict(policy='norm', keep=100, recent=8, every=24, format='int4')")
    cache = cache.fit(type("S", (), dict(kv_heads=2, head_dim=32, value_dim=32)))
    both, alone = cache.new_state(attn), cache.new_state(attn)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, :-own] = False
    new = [torch.randn(2, h, tokens, 32) for h in (H, HKV, HKV)]
    attn(*new, state=both, padding_mask=mask)
    attn(*(x[1:, :, -own:] for x in new), state=alone)
    assert alone.nbytes == alone.predicted_bytes(own, 1, HKV, 32, 4)
    for _ in range(30):
        new = [torch.randn(2, h, 1, 32) for h in (H, HKV, HKV)]
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        got = attn(*new, state=both, padding_mask=mask)[1:]
        torch.testing.assert_close(got, attn(*(x[1:] for x in new), state=alone))


# In a model
# -------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(0))
SPEC = "evict(policy='snapkv(window=8)', keep=0.5, recent=8, every=8)"


def model_of(kind="llama", **changes):
    return tiny(kind, dtype=torch.float32, **{"num_key_value_heads": 2} | changes)


def generate(model, rows=2, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    return model.generate(
        IDS[-rows:],
        attention_mask=mask[-rows:],
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=None,
        **{"do_sample": False} | options,
    )


def test_generate():
    """What keeps all gives what full does; what forgets runs every way of decoding."""
    ways = (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 20},
        {"prompt_lookup_num_tokens": 4, "rows": 1},
    )
    model = model_of()
    expected = [generate(model, **way) for way in ways]
    swap(model, cache="evict(policy='norm', keep=200)")
    for way, want in zip(ways, expected, strict=True):
        assert torch.equal(generate(model, **way), want), way
    swap(model.bfloat16(), cache=SPEC)
    for way, want in zip(ways, expected, strict=True):
        assert generate(model, **way).shape == want.shape
    cache = new_cache(model)
    generate(model, past_key_values=cache)
    for layer in cache.layers:
        assert layer.get_seq_length() == 71
        assert layer.state.kept is not None


@torch.no_grad()
def test_in_a_model(tmp_path):
    model = model_of()
    plain = model(IDS).logits
    spec = "evict(policy='expected', keep=0.5, sinks=2, recent=8)"
    swap(model, cache={"0": spec, "1": "evict(policy='norm', keep=24, recent=8)"})
    told = describe(model).layers
    assert told[0]["cache"] == spec
    assert [layer["grows"] for layer in told] == [True, False]
    assert told[0]["kv_bytes_per_token"] * 2 == told[1]["kv_bytes_per_token"]
    assert torch.allclose(model(IDS).logits, plain, atol=1e-5)  # a prompt sees all of itself
    tokens = generate(model)
    save(model, tmp_path / "out")
    other = load(tmp_path / "out")
    assert active(other).caches[0] == spec
    assert torch.equal(generate(other), tokens)
    assert torch.equal(generate(copy.deepcopy(model)), tokens)
    with pytest.raises(Unsupported, match=r"evict.*sliding says itself who sees whom"):
        swap(model, "sliding(window=8)")
    with pytest.raises(Unsupported, match=r"policy reads the model's own rotation"):
        swap(model, positions={"0": "yarn(factor=2.0)"})
    swap(model, cache=SPEC)
    for rule in ("rerope(window=16)", "alibi"):
        with pytest.raises(Unsupported, match=r"cache: evict holds keys as they were rotated"):
            swap(model, positions=rule)
    swap(model, positions="yarn(factor=2.0)")
    assert generate(model).shape == (2, 72)
    restore(model)
    assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_expected_attention_by_its_definition():
    """The mean of exp(q k) over normal queries at every later position, by sampling them."""
    from effattn.positions import Rope
    from effattn.states.policies import Seen
    from effattn.states.policies import parse as parse_policy

    torch.manual_seed(0)
    policy, tokens = parse_policy("expected(future=3, first=2)"), 3000
    rope = Rope(torch.tensor([0.02, 0.001, 0.0, 0.0]).double())
    raw = torch.randn(1, 2, tokens, D).double() * 0.5 + torch.randn(1, 2, 1, D).double()
    k, v = torch.randn(1, 1, tokens, D).double(), torch.randn(1, 1, tokens, D).double()
    q = rope.turn(raw, torch.arange(tokens))
    real = torch.ones(1, 1, tokens, dtype=torch.bool)
    found = policy.score(Seen(q, k, v, real, D**-0.5, rope))[0, 0, 2:]
    # the same queries at the three next places: what they pay to each key, before the softmax
    later = torch.stack([rope.turn(raw[:, :, 2:], torch.full((1,), tokens + i)) for i in range(3)])
    paid = (later.mean(dim=0) @ k[:, 0, None, 2:].mT * D**-0.5).exp().mean(dim=2)
    paid = paid / paid.sum(dim=-1, keepdim=True)
    want = paid.mean(dim=1)[0] * v[0, 0, 2:].norm(dim=-1)
    assert torch.corrcoef(torch.stack([found.log(), want.log()]))[0, 1] > 0.99
    assert policy.score(Seen(q, k, v, real, 1.0, rope))[0, 0, :2].min() > found.max()


@torch.no_grad()
def test_what_is_kept_matters():
    """On a trained model, half of the tokens by attention are far closer than by nothing."""
    model, _ = embedded.load()
    tokens = embedded.tokens("validation", 320)[None]
    truth = model(tokens).logits[:, 256:].log_softmax(-1)

    def lost(spec):
        swap(model, cache=spec)
        cache = new_cache(model)
        model(tokens[:, :256], past_key_values=cache)
        steps = tokens[:, 256:].split(16, dim=1)
        found = torch.cat([model(x, past_key_values=cache).logits for x in steps], 1)
        return float((truth.exp() * (truth - found.log_softmax(-1))).sum(-1).mean())

    half = {name: lost(f"evict(policy={name!r}, keep=0.35)") for name in ("snapkv", "norm")}
    assert half["snapkv"] < 0.06
    assert half["snapkv"] < half["norm"]
    assert lost("evict(policy='snapkv', keep=0.35, adaptive=True)") < half["snapkv"]


def test_gradients_and_directions_are_refused():
    attn = backend("dense")
    state = parse("evict").new_state(attn)
    q, k, v = (torch.randn(1, h, 20, D, requires_grad=True) for h in (H, HKV, HKV))
    with pytest.raises(Unsupported, match=r"evict has no gradients"):
        attn(q, k, v, state=state)
    assert state.seq_len == 0


@torch.no_grad()
@pytest.mark.parametrize("format", ["None", "'int8'", "'int4'"])
def test_guesses_as_long_as_all_that_is_left_let_tokens_go(format):
    """What is newer than the guesses is nothing, and nothing is packed."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny("llama", dtype=torch.float32, **sizes)
    swap(model, cache=f"evict(policy='norm', keep=16, recent=4, every=8, format={format})")
    ids = torch.randint(3, 9, (1, 40), generator=torch.Generator().manual_seed(0))
    given = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, prompt_lookup_num_tokens=10, **given)
    assert out.shape == (1, 80)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("evict(kep=0.5)", "did you mean 'keep'"),
        ("evict(keep=0)", "keep: got 0, valid is a share above 0 and below 1, or a whole number"),
        ("evict(keep=1.0)", r"keep: got 1\.0"),
        ("evict(keep=68)", "at least 69: sinks, recent and one more"),
        ("evict(keep=True)", "keep: got True"),
        ("evict(keep='half')", "keep: got 'half'"),
        ("evict(policy='snap')", "did you mean 'snapkv'"),
        ("evict(policy=3)", "policy: got 3, valid is a name in quotes"),
        ("evict(policy='snapkv(windw=3)')", "did you mean 'window'"),
        (
            "evict(policy='snapkv(window=0)')",
            "window: got 0, valid is a whole number of at least 1",
        ),
        ("evict(every=0)", "every: got 0, valid is None, or a whole number of at least 1"),
        ("evict(sinks=-1)", "sinks: got -1, valid is a whole number of at least 0"),
        ("evict(adaptive=1)", "adaptive: got 1, valid is True or False"),
        ("evict(floor=2)", "floor: got 2, valid is a share of 0 to 1"),
        ("evict(format='int3')", "format.*got 'int3'"),
    ],
)
def test_bad_specs(spec, said):
    with pytest.raises(ValueError, match=said):
        parse(spec)
