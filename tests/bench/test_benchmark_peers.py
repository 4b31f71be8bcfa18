"""The peers' adapters: they do what is asked of them, or say why not. Packages that are not
installed are skipped.
"""

import sys
from types import ModuleType

import pytest
import torch

import effattn
from bench import measure
from bench.attention import ours, peer, race
from bench.case import Absent, Contender
from bench.peers import PEERS, find, missing

CPU = torch.device("cpu")
WINDOW = "sliding(window=16)"


def small(what="forward", dtype="float32", contenders=(), tokens=100, **sizes):
    return race(what, dtype, tokens, contenders, **{"heads": 4, "kv_heads": 2, "dim": 16, **sizes})


def test_every_adapter_is_there_and_the_others_say_what_they_wait_for():
    for who, entry in PEERS.items():
        if entry.adapter and missing(who) is None:
            assert callable(find(who))
        else:
            with pytest.raises(Absent, match=r"needs a GPU|not installed|no adapter yet"):
                find(who)


def agrees(who, spec, **sizes):
    case = small(contenders=(peer(who, spec),), **{"kv_heads": 4, "tokens": 128, **sizes})
    _, error = measure.prepare(case.contenders[0], case, case.inputs(case.tokens, CPU))
    return error


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
def test_exact_windows_of_local_attention(what):
    pytest.importorskip("local_attention")
    assert agrees("local-attention", WINDOW, what=what) < 1e-5


@pytest.mark.parametrize("spec", ["sliding(window=17)", "longformer(window=17, global_tokens=3)"])
def test_longformer_of_transformers(spec):
    assert agrees("transformers-Longformer", spec, causal=False) < 1e-5
    assert agrees("transformers-Longformer", spec, causal=False, what="forward+backward") < 1e-5


def test_steps_of_transformers_cache():
    assert agrees("DynamicCache+SDPA", "dense", what="step", kv_heads=2) < 1e-5


LSH, ONE_ROUND = "lsh(rounds=3, chunk=16)", "lsh(rounds=1, chunk=64)"
APPROXIMATE = [
    ("performer-pytorch", "performer(features=64)", (True, False)),
    ("linformer", "linformer(k=32, max_length=128)", (False,)),
    ("linear-attention-transformer", "linear", (True, False)),
    ("linear-attention-transformer(blindspot=64)", "linear", (True,)),
    ("reformer-pytorch", LSH, (True, False)),
    ("transformers-Reformer", LSH, (True, False)),
]


@pytest.mark.parametrize(("who", "spec", "directions"), APPROXIMATE)
def test_packages_do_what_their_papers_say(who, spec, directions):
    """Which is also that none looks further than it should, and that the formulas are right."""
    if why := missing(who):
        pytest.skip(why)
    torch.manual_seed(0)
    for causal in directions:
        case = small("forward+backward", kv_heads=4, tokens=128, causal=causal)
        contender = peer(who, spec, tolerance=0.005 if "eformer" in who else None)
        _, error = measure.prepare(contender, case, case.inputs(128, CPU))
        # see the remark in rows/packages.py
        assert error < (5e-3 if causal and "eformer" in who else 1e-5)
    if directions == (False,):
        with pytest.raises(Absent, match="bidirectional"):
            find(who)(effattn.backend(spec), small(kv_heads=4), None)


@pytest.mark.parametrize("who", ["reformer-pytorch", "transformers-Reformer"])
@pytest.mark.parametrize("causal", [True, False])
def test_lsh_of_one_round_and_two_chunks_is_exact_attention_to_normalised_keys(who, causal):
    if why := missing(who):
        pytest.skip(why)
    case = small(kv_heads=4, tokens=128, causal=causal)
    q, k, v = case.inputs(128, CPU)
    call = find(who)(effattn.backend(ONE_ROUND), case, [q, k, v])
    scale = case.dim**-0.5 if who == "reformer-pytorch" else 1.0
    scores = scale * q.double() @ torch.nn.functional.normalize(q.double(), dim=-1).mT
    at = torch.arange(128)
    scores[..., at, at] = -5e4  # itself only where there is nothing else
    if causal:
        scores = scores.masked_fill(at[:, None] < at, -torch.inf)
    exact = scores.softmax(dim=-1) @ v.double()
    with torch.no_grad():
        out = call(q, k, v)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        call.definition(q.double(), k.double(), v.double()), exact, rtol=1e-4, atol=1e-5
    )


def test_features_of_performer_pytorch_estimate_softmax_attention():
    pytest.importorskip("performer_pytorch")
    torch.manual_seed(0)
    case = small(kv_heads=4, tokens=128, causal=False)
    q, k, v = (x / 2 for x in case.inputs(128, CPU))
    out = find("performer-pytorch")(effattn.backend("performer(features=256)"), case, [q, k, v])(
        q, k, v
    )
    exact = effattn.backend("dense")(q, k, v, causal=False)
    assert (out - exact).square().mean() < 0.2 * exact.square().mean()


def simple_gla(q, k, v, g_gamma=None, scale=None):
    """What flash-linear-attention documents of chunk_simple_gla, on (B, T, H, D)."""
    at = torch.arange(q.shape[1])
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril() * (
        k.shape[-1] ** -0.5 if scale is None else scale
    )
    if g_gamma is not None:
        weights = weights * (g_gamma[:, None, None] * (at[:, None] - at)).tril().exp()
    return torch.einsum("bhts,bshd->bthd", weights, v), None


def linear_attn(q, k, v, scale=None, normalize=True):
    """The same of chunk_linear_attn."""
    out, _ = simple_gla(q, k, v, scale=scale)
    return out / (
        (q * scale * k.cumsum(dim=1)).sum(dim=-1, keepdim=True) + 1e-10
    ) if normalize else out, None


@pytest.mark.parametrize(
    "spec",
    [
        "linear",
        "linear(feature_map='identity', decay='retnet', normalize=False)",
        "linear(normalize=False)",
    ],
)
def test_flash_linear_attention_is_asked_for_the_same(spec, monkeypatch):
    """With stand-ins: its kernels need a GPU."""
    stand_ins = {
        "linear_attn": {"chunk_linear_attn": linear_attn},
        "simple_gla": {"chunk_simple_gla": simple_gla},
    }
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, inside in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(inside)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    monkeypatch.setattr("bench.peers.missing", lambda who: None)
    assert agrees("flash-linear-attention", spec, what="forward+backward", time_first=True) < 1e-5
    for other, sizes in (
        ("linear(decay=0.9)", {}),
        ("linear(feature_map='relu')", {}),
        ("linear", {"causal": False}),
    ):
        with pytest.raises(Absent, match=r"raced with|causal"):
            agrees("flash-linear-attention", other, **sizes)


def test_views_of_time_first_are_leaves():
    case = small("forward+backward", contenders=(ours("linear"),), time_first=True)
    inputs = case.inputs(100, CPU)
    assert inputs[0].transpose(1, 2).is_contiguous()
    assert inputs[0].is_leaf
    assert torch.equal(inputs[0], small("forward+backward").inputs(100, CPU)[0])


def test_contenders_are_data():
    one = ours(WINDOW, tolerance=0.5)
    assert isinstance(one, Contender)
    assert (one.tolerance, one.ours, one.check_tokens) == (0.5, True, None)
    assert peer("flex_attention", WINDOW).setup > 0
    with pytest.raises(ValueError, match="window"):
        ours("sliding(windw=3)")
