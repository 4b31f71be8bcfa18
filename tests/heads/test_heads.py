"""Head merging holds the invariants that theory promises, each method exactly those it should."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.errors import Unsupported
from effattn.heads.gqa import METHODS, check_ffn, convert_gqa
from effattn.heads.grouping import by_similarity, contiguous
from effattn.heads.methods.base import Heads, relative_errors
from effattn.hf import anatomy as hf

TIGHT = (
    1e-5  # RMSNorm casts to fp32 inside transformers; a lossy merge moves logits by 0.01 and more
)
PER_HEAD_NORMS = {"stablelm": {"qk_layernorm": True}, "cohere": {"use_qk_norm": True}}
CALIBRATION = dict(length=64, batch=8)


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[:128].view(2, 64), use_cache=False).logits.double()


def plant(model, groups: int) -> None:
    """Makes the K and V heads of each group identical, so that merging them can lose nothing."""
    for layer in hf.of(model):
        size = layer.kv_heads // groups
        for part in (layer.k, layer.v):
            part.by_head.copy_(part.by_head[::size].repeat_interleave(size, 0).clone())
            if part.module.bias is not None:
                rows = part._rows(part.module.bias.detach())
                rows.copy_(rows[::size].repeat_interleave(size, 0).clone())
        # one gain a head
        if layer.k_norm is not None and getattr(layer.k_norm, "weight", torch.empty(0)).dim() == 2:
            gains = layer.k_norm.weight.detach()
            gains.copy_(gains[::size].repeat_interleave(size, 0).clone())


def regauge(model, seed: int, general: bool) -> None:
    """Rewrites every head in another gauge of the same function: phases on K with Q and rotations
    on V with O, or (general) any complex factor and any invertible matrix. Biases of K and Q must
    be zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in hf.of(model):
        d, heads = layer.head_dim, layer.heads
        real, imaginary = layer.rotary_pairs()
        z = torch.randn(heads, len(real), generator=generator, dtype=torch.complex128)
        c = z if general else z / z.abs()
        k, q, v, o = layer.k.by_head, layer.q.by_head, layer.v.by_head, layer.o.by_head
        for target, factor in ((k, c), (q, 1 / c.conj())):
            turned = torch.complex(target[:, real], target[:, imaginary]) * factor[..., None]
            target[:, real], target[:, imaginary] = turned.real, turned.imag
        a = torch.randn(heads, d, d, generator=generator, dtype=torch.float64)
        a = a + 3 * torch.eye(d) if general else torch.linalg.qr(a).Q
        v.copy_(a @ v)
        if layer.v.bias is not None:
            rows = layer.v._rows(layer.v.module.bias.detach())
            rows.copy_((a @ rows[..., None])[..., 0])
        o.copy_(o @ torch.linalg.inv(a))
        for part in (layer.q, layer.k):
            assert part.bias is None or not part.bias.any()


def converted(model, kv_heads, tokens, method, **options):
    convert_gqa(
        model, kv_heads, tokens, method=method, **{"refit": False, **CALIBRATION, **options}
    )
    return model


@pytest.mark.parametrize("method", ["mean", "first", "aligned", "optimal"])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "olmo2", "phi3", "stablelm", "gemma", "cohere"]
)
def test_planted_heads_are_merged_without_loss(kind, method, tokens):
    model = tiny(kind, **PER_HEAD_NORMS.get(kind, {}))
    plant(model, 2)
    before = logits(model, tokens)
    assert (logits(converted(model, 2, tokens, method), tokens) - before).abs().max() < TIGHT


@pytest.mark.parametrize(
    ("method", "phases", "general"),
    [
        ("mean", False, False),
        ("aligned", True, False),
        ("optimal", True, True),
    ],
)
def test_planted_heads_in_another_gauge(method, phases, general, tokens):
    for kind, lossless in ((False, phases), (True, general)):
        model = tiny("llama")
        plant(model, 2)
        before = logits(model, tokens)
        regauge(model, 1, general=kind)
        assert (logits(model, tokens) - before).abs().max() < TIGHT  # the gauge itself is free
        error = (logits(converted(model, 2, tokens, method), tokens) - before).abs().max()
        assert (error < TIGHT) == lossless, (method, kind, float(error))


# full, partial, partial interleaved rotary
@pytest.mark.parametrize("kind", ["llama", "stablelm", "glm"])
def test_optimal_does_not_depend_on_the_gauge(kind, tokens):
    results = []
    for seed in (None, 1, 2):
        model = tiny(kind)
        for layer in hf.of(model):
            for part in (layer.q, layer.k):
                if part.bias is not None:
                    part.module.bias.detach().zero_()
        if seed is not None:
            regauge(model, seed, general=True)
        results.append(logits(converted(model, 2, tokens, "optimal"), tokens))
    assert (results[0] - results[1]).abs().max() < TIGHT
    assert (results[0] - results[2]).abs().max() < TIGHT
    plain = [logits(converted(tiny("llama"), 2, tokens, "mean"), tokens)]
    model = tiny("llama")
    regauge(model, 1, general=True)
    plain.append(logits(converted(model, 2, tokens, "mean"), tokens))
    assert (plain[0] - plain[1]).abs().max() > 1e-2  # the same test can fail


@pytest.mark.parametrize("method", sorted(METHODS))
def test_all_heads_is_the_identity(method, tokens):
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted(model, 8, tokens, method, refit=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_head_a_group_is_merged_to_itself():
    heads = random_heads(2, 4, 10, 6, seed=3)
    for method in ("mean", "first", "aligned", "optimal"):
        single = heads.select([1])
        assert max(relative_errors(single, METHODS[method](single))) < 1e-20


def test_mean_of_means_is_the_mean(tokens):
    direct = converted(tiny("llama"), 2, None, "mean").state_dict()
    nested = converted(converted(tiny("llama"), 4, None, "mean"), 2, None, "mean").state_dict()
    for name, value in direct.items():
        torch.testing.assert_close(nested[name], value, rtol=0, atol=1e-15)


def test_optimal_on_an_existing_gqa_model_matches_the_direct_way_on_planted_heads(tokens):
    model = tiny("llama")
    plant(model, 1)
    before = logits(model, tokens)
    converted(model, 4, tokens, "optimal")
    converted(model, 1, tokens, "optimal")
    assert (logits(model, tokens) - before).abs().max() < TIGHT
    assert model.config.num_key_value_heads == 1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi", "qwen3"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_refit_never_raises_the_calibration_error(kind, method, tokens):
    report = convert_gqa(tiny(kind), 2, tokens, method=method, **CALIBRATION)
    for row in report.data["layers"]:
        assert 0 <= row["attention_error"] <= row["attention_error_merged"] * (1 + 1e-9)


def behind(model, rows) -> torch.Tensor:
    """The hidden states behind every layer, (layers, B, T, D)."""
    return torch.stack(model.model(rows, output_hidden_states=True).hidden_states[1:-1])


@torch.no_grad()
def test_refits_bring_the_hidden_states_back(tokens):
    """On the calibration tokens, each further step: the errors of the layers before are made up
    for."""
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    parent, lost = tiny("llama"), []
    for more in ({"refit": False}, {}, {"refit_ffn": True}):
        model = tiny("llama")
        report = convert_gqa(model, 2, tokens, length=64, **more)
        lost.append((behind(model, rows) - behind(parent, rows)).square().sum((1, 2, 3)))
    assert (lost[1] < lost[0]).all()
    assert (lost[2] < lost[1]).all()
    # what is left behind the first layer is what its row says, of what the FFN should give
    assert 0 < report.data["layers"][0]["ffn_error"] < 1


@torch.no_grad()
def test_a_refit_makes_up_for_the_layers_before(tokens):
    """Against the normal equations: what is wanted of a layer is its old output and what the hidden
    states lack."""
    from effattn.calibration.layerwise import LayerRunner, windows
    from effattn.hf import anatomy

    model, parent = tiny("llama"), tiny("llama")
    convert_gqa(model, 2, tokens, length=64)
    batches = windows(tokens, 64, 8)
    runs = [LayerRunner(anatomy.of(one), batches) for one in (parent, model)]
    hidden = [run.embed() for run in runs]
    hidden = [[y for _, y in run.run(0, states)] for run, states in zip(runs, hidden, strict=True)]
    got = []
    for one, run, states in zip((parent, model), runs, hidden, strict=True):
        o = anatomy.of(one).layers[1].o.module
        z = torch.cat([x.flatten(0, -2) for x in run.until(1, states, o)])
        got.append((z, torch.cat(states).flatten(0, -2), o.weight))
    (old, had, weight), (z, has, solved) = got
    wanted = old @ weight.T + had - has
    # at the least of |O z - wanted|^2 plus the damping: its gradient, against its parts
    gradient = (z @ solved.T - wanted).T @ z
    assert gradient.norm() < 0.1 * (wanted.T @ z).norm()
    assert gradient.norm() < 0.1 * ((z @ solved.T - old @ weight.T).T @ z).norm()


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_a_layer_that_norms_what_its_ffn_gives_is_not_refitted(kind, tokens):
    model = tiny(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Unsupported, match="refit_ffn: layer 0 does not add what its FFN gives"):
        check_ffn(hf.of(model), refit=True)  # before anything is measured
    assert model.training
    with pytest.raises(Unsupported, match="refit_ffn: layer 0 does not add what its FFN gives"):
        convert_gqa(model, 1, tokens, length=64, refit_ffn=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_an_ffn_of_packed_weights_is_not_refitted(dtype, tokens):
    """As bitsandbytes' modules, beside attention that was left alone: codes are no numbers."""
    model = tiny("llama")
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(dtype), requires_grad=False)
    with pytest.raises(Unsupported, match="refit_ffn: the FFN of layer 1 ends in a packed weight"):
        convert_gqa(model, 2, tokens, length=64, refit_ffn=True)


def test_optimal_loses_least_by_its_own_measure(tokens):
    errors = {
        m: convert_gqa(tiny("llama"), 2, tokens, method=m, **CALIBRATION).data["layers"][0]
        for m in METHODS
    }
    for method, row in errors.items():
        assert errors["optimal"]["k_error"] <= row["k_error"] + 1e-12, method
        assert errors["optimal"]["v_error"] <= row["v_error"] + 1e-12, method


def random_heads(
    count: int, d: int, hidden: int, rotary: int, seed: int, normed: str | None = None
) -> Heads:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, q, o = draw(4 * hidden, hidden + 1), draw(count, d, 2 * d), draw(count, 2 * d, d)
    rotary = min(rotary, d) // 2 * 2
    dims = torch.arange(rotary)
    pairs = (dims[: rotary // 2], dims[rotary // 2 :])
    return Heads(
        draw(count, d, hidden + 1),
        draw(count, d, hidden + 1),
        x.T @ x / len(x),
        q @ q.transpose(1, 2),
        o.transpose(1, 2) @ o,
        pairs,
        normed,
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.sampled_from([2, 3, 4]),
    d=st.sampled_from([2, 4, 6]),
    hidden=st.integers(6, 24),
    rotary=st.integers(0, 6),
    seed=st.integers(0, 10**6),
    normed=st.sampled_from([None, "rms", "layer"]),
)
def test_any_shape_merges_within_bounds(count, d, hidden, rotary, seed, normed):
    """Errors are shares (optimal never above 1: writing zeros is always allowed), stand-ins have
    the right shapes, and optimal never loses more than the mean or the aligned mean."""
    heads = random_heads(count, d, hidden, rotary, seed, normed)
    errors = {}
    for name, method in METHODS.items():
        merged = method(heads)
        assert merged.key.shape == merged.value.shape == (d, hidden + 1)
        assert merged.key_maps.shape == merged.value_maps.shape == (count, d, d)
        assert all(
            torch.isfinite(t).all()
            for t in (merged.key, merged.value, merged.key_maps, merged.value_maps)
        )
        errors[name] = relative_errors(heads, merged)
    assert errors["optimal"][1] <= min(1.0, *(e[1] for e in errors.values())) + 1e-9
    # one frequency: the query weight has no cross terms between pairs
    if normed is None and d == 2:
        weighted = heads.query.diagonal(dim1=1, dim2=2)
        # |q|^2, as optimal sees it
        heads.query = torch.diag_embed(weighted.mean(1, keepdim=True).expand_as(weighted))
        for name, method in METHODS.items():
            errors[name] = relative_errors(heads, method(heads))
        assert errors["optimal"][0] <= min(e[0] for e in errors.values()) + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.sampled_from([4, 6, 8]))
def test_similarity_finds_planted_pairs(seed, count):
    """Heads that are copies of each other in another gauge end up together, wherever they stand."""
    half = count // 2
    base = random_heads(half, 4, 16, 4, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    twins = [int(i) % half for i in order]
    heads = base.select(twins)
    groups = by_similarity(heads, half, METHODS["optimal"])
    assert sorted(h for g in groups for h in g) == list(range(count))
    lost = sum(
        sum(relative_errors(heads.select(g), METHODS["optimal"](heads.select(g)))) for g in groups
    )
    start = sum(
        sum(relative_errors(heads.select(g), METHODS["optimal"](heads.select(g))))
        for g in contiguous(count, half)
    )
    assert lost <= start + 1e-12
    assert lost < 1e-9


@pytest.mark.parametrize("kind", ["llama", "olmo2", "stablelm", "cohere"])
def test_grouping_by_similarity_undoes_a_shuffle(kind, tokens):
    """Planted pairs, then shuffled heads: neighbours would lose, the right grouping loses
    nothing.
    """
    model = tiny(kind, **PER_HEAD_NORMS.get(kind, {}))
    plant(model, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for layer in hf.of(model):
        for part in (layer.q, layer.k, layer.v, layer.o):
            part.by_head.copy_(part.by_head[order].clone())
        layer.merge_norms(order, [[head] for head in order])
    before = logits(model, tokens)
    neighbours = converted(copy.deepcopy(model), 4, tokens, "optimal")
    assert (logits(neighbours, tokens) - before).abs().max() > 1e-2
    alike = converted(copy.deepcopy(model), 4, tokens, "optimal", grouping="similarity")
    assert (logits(alike, tokens) - before).abs().max() < TIGHT
