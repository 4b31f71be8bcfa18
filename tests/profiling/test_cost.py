"""The cost model against counts: of backends from their definition and their torch path, of modules
and whole models.

A new backend joins by its row in test_conformance's ROWS.
"""

import inspect

import pytest
import torch
import transformers
from conftest import tiny
from test_conformance import CASES
from torch import nn

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.interface import Cost, Shape
from effattn.patterns.exact import ExactBackend
from effattn.profiling.cost import layer_backend, linear_cost, model_cost
from effattn.profiling.counting import Counted

T, B, H, K, D = 23, 2, 4, 2, 8
SIZE = 8  # bytes of a float64


# What they need depends on the data. Declared is the expectation, for buckets that fill evenly, or
# chosen blocks that lie apart from the window; a call may need less.
EXPECTED = {"lsh", "topk"}


def bounds(name: str) -> tuple[float, float]:
    """The least and the most that the torch path may do, of what is declared: sequences are short,
    blocks padded.
    """
    return (0.5, 40) if name in EXPECTED else (1, 10)


def inputs(queries: int, keys: int, grad: bool = False) -> list[torch.Tensor]:
    sizes = ((H, queries), (K, keys), (K, keys))
    return [torch.randn(B, h, n, D, dtype=torch.float64, requires_grad=grad) for h, n in sizes]


def pairs(attn, queries: int, causal: bool) -> int:
    """(query, key) pairs of the last queries, over batch and heads, from the backend's
    definition.
    """
    i, j, h = (
        torch.arange(T - queries, T)[:, None],
        torch.arange(T)[None],
        torch.arange(H)[:, None, None],
    )
    return B * int(attn.sees(i, j, h, H, causal).expand(H, queries, T).sum())


def keys_used(attn, queries: int, causal: bool) -> int:
    """How many keys have any influence on the last queries: those whose values have a gradient in
    the reference.
    """
    q, k, v = inputs(queries, T, grad=True)
    attn(q, k, v, causal=causal).pow(2).sum().backward()
    return int((v.grad != 0).any(dim=3).any(dim=1).any(dim=0).sum())


def softmax_over_keys(name: str, options: dict) -> bool:
    """Of keys as they came: means of some are another method."""
    return issubclass(effattn.backends()[name], ExactBackend) and "compress" not in options


@pytest.mark.parametrize(
    ("name", "options", "causal"), [case for case in CASES if softmax_over_keys(*case[:2])]
)
def test_exact_backends_cost_what_their_definition_needs(name, options, causal):
    attn = effattn.backend(name, **options, impl="reference")
    for queries in (T, 7, 1) if causal else (T,):
        shape = Shape(B, H, K, queries, T, D, itemsize=SIZE, causal=causal)
        cost, seen = attn.cost(shape), pairs(attn, queries, causal)
        q, kv = B * H * queries * D * SIZE, B * K * keys_used(attn, queries, causal) * 2 * D * SIZE
        assert cost.flops == 2 * seen * 2 * D
        assert (cost.read_bytes, cost.write_bytes) == (q + kv, q)
        back = attn.cost(Shape(B, H, K, queries, T, D, itemsize=SIZE, causal=causal, backward=True))
        lse = B * H * queries * SIZE
        # out, d_out; dq, dk, dv
        assert back == Cost(2 * seen * 5 * D, 3 * q + kv + lse, q + B * K * T * 2 * D * SIZE)


@pytest.mark.parametrize(
    ("name", "options", "causal"), [case for case in CASES if not softmax_over_keys(*case[:2])]
)
def test_other_backends_move_what_their_definition_needs(name, options, causal):
    """Their operations are each method's own: they are held between bounds below. Moved are q, what
    has influence of k and v, the output, and the backend's own parameters and constants."""
    attn = effattn.backend(name, **options, impl="torch")
    q, kv = B * H * T * D * SIZE, B * K * keys_used(attn, T, causal) * 2 * D * SIZE
    own = sum(one.nbytes for one in (*attn.parameters(), *attn.buffers()))
    cost = attn.cost(Shape(B, H, K, T, T, D, itemsize=SIZE, causal=causal))
    assert q + kv <= cost.read_bytes <= q + kv + own
    assert cost.write_bytes == q
    back = attn.cost(Shape(B, H, K, T, T, D, itemsize=SIZE, causal=causal, backward=True))
    assert back.flops >= cost.flops
    assert back.read_bytes >= 2 * q + kv
    assert back.write_bytes >= q + kv
    assert back.state_bytes == 0


@pytest.mark.parametrize(("name", "options", "causal"), CASES)
def test_the_torch_path_does_no_less_than_declared(name, options, causal):
    """Otherwise what is declared is not the least. A backward pass that keeps the weights saves one
    product of five.
    """
    attn = effattn.backend(name, **options, impl="torch")
    q, k, v = inputs(T, T, grad=True)
    with Counted() as forward:
        out = attn(q, k, v, causal=causal)
    with Counted() as backward:
        out.sum().backward()
    shape = Shape(B, H, K, T, T, D, itemsize=SIZE, causal=causal)
    (least, most), declared = bounds(name), attn.cost(shape)
    assert least * declared.flops <= forward.flops <= most * declared.flops
    back = attn.cost(Shape(B, H, K, T, T, D, itemsize=SIZE, causal=causal, backward=True))
    assert 0.8 * least * back.flops <= backward.flops <= most * back.flops


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, options, causal in CASES if causal]
)
@pytest.mark.parametrize("past", [6, T, 70])
@torch.no_grad()
def test_decoding_reads_what_is_declared_and_no_more_than_its_state(name, options, past):
    attn = effattn.backend(name, **options, impl="torch")
    state = attn.new_state()
    attn(*inputs(past, past), state=state)
    assert state.nbytes == attn.cost(Shape(B, H, K, past, past, D, itemsize=SIZE)).state_bytes
    for _ in range(2):  # the first step may still put a ring in order
        held = {key: one for key, one in vars(state).items() if isinstance(one, torch.Tensor)}
        held = {key: one for key, one in held.items() if one.numel()}
        held |= {f"own_{n}": one for n, one in enumerate(attn.buffers())}  # codebooks and the like
        new = inputs(1, 1)
        with Counted(**held) as counted:
            attn(*new, state=state)
        past += 1
        cost = attn.cost(Shape(B, H, K, 1, past, D, itemsize=SIZE))
        # not positions
        read = sum(counted.read_bytes(key) for key, one in held.items() if one.dtype != torch.int64)
        declared = cost.read_bytes - sum(x.nbytes for x in new)
        least, _ = bounds(name)
        # written there before it is read, where a state grows in place
        own = sum(x.nbytes for x in new[1:])
        assert least * declared <= read <= sum(one.nbytes for one in held.values()) + own
        assert state.nbytes == cost.state_bytes
        assert counted.flops >= least * cost.flops


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cost_is_what_torch_does(bias):
    layer = nn.Linear(6, 10, bias=bias)
    x = torch.randn(3, 5, 6, requires_grad=True)
    with Counted(layer=layer, x=x) as forward:
        out = layer(x)
    assert linear_cost(15, 6, 10, 4, bias) == Cost(forward.flops, forward.read_bytes(), out.nbytes)
    d_out = torch.randn_like(out)
    with Counted(weight=layer.weight, x=x, d_out=d_out) as backward:
        out.backward(d_out)
    written = sum(one.grad.nbytes for one in (x, *layer.parameters()))
    assert linear_cost(15, 6, 10, 4, bias, backward=True) == Cost(
        backward.flops, backward.read_bytes(), written
    )


# Whole models
# -------------------------------------------------------------------------------------------------

PLAIN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "opt",
    "phi",
    "stablelm",
    "cohere",
    "cohere2",
    "glm",
    "granite",
    "smollm3",
)
EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")


def weights_read(counted: Counted, model: nn.Module) -> int:
    """Bytes of the parameters that were read; a tied table is read twice, as rows and as the
    head.
    """
    parameters = {id(p) for p in model.parameters()}
    names = [name for name, tensor in counted.watched.items() if id(tensor) in parameters]
    return counted.read_bytes(*names)


def rows_again(model, tokens: int) -> int:
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return tokens * table.shape[1] * table.element_size() if tied else 0


def agrees(model, tokens: int, step: bool = True) -> None:
    """Operations, weights read and state bytes of a prefill and a decoding step, counted and
    declared.
    """
    ids = torch.randperm(model.get_input_embeddings().num_embeddings)[:tokens][None]
    cache, past = None, 0
    for given in (ids, ids[:, :1]) if step else (ids,):
        with torch.no_grad(), Counted(model=model) as counted:
            out = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cost = model_cost(model, 1, given.shape[1], past)
        cache, past = out.past_key_values, past + given.shape[1]
        assert counted.flops == cost.total.flops
        weights = sum(operation.weight_bytes for operation in cost.operations)
        assert weights_read(counted, model) + rows_again(model, given.shape[1]) == weights
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == cost.kv_bytes == cost.total.state_bytes
        assert cost.weight_bytes == sum(
            one.nbytes for one in (*model.parameters(), *model.buffers())
        )


@pytest.mark.parametrize("kind", PLAIN)
def test_a_models_sum_is_what_its_forward_does(kind):
    agrees(tiny(kind), 40)


def test_grouped_heads_and_untied_heads():
    agrees(tiny("llama", num_key_value_heads=2), 40)
    agrees(tiny("llama", tie_word_embeddings=True), 40)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_cost_what_a_token_activates(kind):
    agrees(tiny(kind, dtype=torch.float32), 40)  # torch's grouped product knows no float64


def test_the_embedded_model():
    model, _ = effattn.embedded.load()
    agrees(model, 512)


@pytest.mark.parametrize(
    "spec", ["sliding(window=9, sinks=2)", "block(block=8)", "strided(stride=4)"]
)
def test_swapped_models(spec):
    model = tiny("llama", num_key_value_heads=4)
    effattn.swap(model, {"0": spec, "1": "dense"})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    cost = model_cost(model, 1, 40)
    assert cost.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    attn = effattn.backend(spec)
    shape = Shape(1, 8, 4, 1, 41, 8, itemsize=8)
    step = {o.layer: o for o in model_cost(model, 1, 1, 40).operations if o.name == "attention"}
    assert step[0].cost == attn.cost(shape)
    assert step[0].kv_bytes == attn.cost(shape).read_bytes - shape.query_bytes
    assert step[1].kv_bytes == shape.kv_bytes


def test_second_projections_are_counted():
    model = tiny("llama")
    before = model_cost(model, 1, 40).by_name()
    effattn.swap(model, "longformer(window=9, global_tokens=[0, 12])")
    with torch.no_grad(), Counted(model=model) as counted:
        cache = model(
            torch.randperm(96)[:40][None], use_cache=True, logits_to_keep=1
        ).past_key_values
    after = model_cost(model, 1, 40)
    assert after.kv_bytes == sum(layer.nbytes for layer in cache.layers)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert after.by_name()[name] == before[name] + before[name]
    assert after.by_name()["o_proj"] == before["o_proj"]
    weights = sum(operation.weight_bytes for operation in after.operations)
    assert weights_read(counted, model) + rows_again(model, 40) == weights


def test_a_backward_pass():
    """The gradients of every weight and activation, attention's with its recomputation."""
    model = tiny("llama", num_key_value_heads=2, dtype=torch.float32).train()
    ids = torch.randint(0, 96, (2, 24))
    logits = model(ids, use_cache=False).logits
    with Counted() as counted:
        logits.sum().backward()
    cost = model_cost(model, 2, 24, backward=True, logits=24)
    assert counted.flops == cost.total.flops
    assert cost.kv_bytes == cost.total.state_bytes == 0
    assert (cost.activation_bytes, cost.peak_bytes) == (None, None)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_encoders(kind):
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=64,
    )
    if kind == "distilbert":
        sizes = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=64)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.randperm(64)[:20][None]
    with torch.no_grad(), Counted() as counted:
        model(ids)
    cost = model_cost(model, 1, 20)
    # but for the pooler of one token
    inside = counted.flops - (2 * 32 * 32 if kind == "bert" else 0)
    assert inside == cost.total.flops
    assert cost.kv_bytes == 0
    with pytest.raises(Unsupported, match="has no cache"):
        model_cost(model, 1, 1, past=3)


def test_a_70b_configuration_without_its_memory():
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    step = model_cost(model, batch=8, tokens=1, past=4095)
    weights = 2 * sum(p.numel() for p in model.parameters())
    kv = 8 * 4096 * 80 * 2 * 8 * 128 * 2
    assert 0 <= step.weight_bytes - weights < 4096  # RoPE's frequencies
    assert step.kv_bytes == kv
    read = weights - (32000 - 8) * 8192 * 2  # of the embedding, one row for each of the batch
    written = 8 * 80 * 2 * 8 * 128 * 2
    assert step.step_bytes == read + kv + written
    assert step.total.flops == pytest.approx(8 * 2 * 69e9, rel=0.1)
    assert step.peak_bytes > weights + kv


def test_sums_and_names():
    model = tiny("llama")
    cost = model_cost(model, 2, 30)
    assert list(cost.by_name()) == [
        "embedding",
        "q_proj",
        "k_proj",
        "v_proj",
        "attention",
        "cache",
        "o_proj",
        "ffn",
        "norms",
        "head",
    ]
    assert list(cost.by_layer()) == [None, 0, 1]
    for sums in (cost.by_name(), cost.by_layer()):
        assert sum(sums.values(), Cost()) == cost.total
    assert (
        model_cost(model, 2, 30, logits=30).by_name()["head"].flops
        == 30 * cost.by_name()["head"].flops
    )
    assert "head" not in model_cost(model, 2, 30, logits=0).by_name()


def test_bad_input():
    model = tiny("llama")
    for arguments, message in (
        (dict(batch=0, tokens=1), "batch: got 0"),
        (dict(batch=1, tokens=1.5), "tokens: got 1.5"),
        (dict(batch=1, tokens=1, past=-1), "past: got -1"),
        (
            dict(batch=1, tokens=4, logits=5),
            r"logits: got 5 positions, valid is at most tokens \(4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model_cost(model, **arguments)
    model.model.layers[1].self_attn.o_proj = nn.Identity()
    with pytest.raises(Unsupported, match=r"Identity is not a Linear .* cost\(rows"):
        model_cost(model, 1, 8)


# How others join
# -------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear map in half the bytes, as packed weights are."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.packed = nn.Buffer(torch.zeros(inner.weight.numel() // 2, dtype=torch.uint8))

    def cost(self, rows: int, backward: bool = False) -> Cost:
        return Cost(7 * rows, self.packed.nbytes + rows, rows)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_linear_like_modules_say_their_own_cost(kind):
    model = tiny(kind)
    before = model_cost(model, 1, 8)
    layer = anatomy.of(model).layers[1]
    for name, module in list(layer.block.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(layer.block.get_submodule(parent), last, Packed(module))
    linears = [m for m in layer.block.modules() if isinstance(m, Packed)]
    after = model_cost(model, 1, 8)
    of = lambda cost, index: {o.name: o for o in cost.operations if o.layer == index}  # noqa: E731
    assert of(after, 0) == of(before, 0)
    mine = of(after, 1)
    products = ("q_proj", "k_proj", "v_proj", "o_proj", "ffn")
    assert sum(mine[name].cost.flops for name in products) == pytest.approx(
        len(linears) * 7 * 8, abs=3
    )
    assert sum(mine[name].weight_bytes for name in products) == sum(
        m.packed.nbytes for m in linears
    )
    assert mine["attention"] == of(before, 1)["attention"]


def test_states_say_their_own_cost(monkeypatch):
    """A cache in a quarter of the bytes."""
    model = tiny("llama")
    backend = layer_backend(anatomy.of(model).layers[0])

    class Quarter(type(backend.new_state())):
        def cost(self, shape: Shape) -> Cost:
            quarter = shape.kv_bytes // 4
            return Cost(0, quarter, quarter // shape.keys * shape.queries, quarter)

    monkeypatch.setattr(type(backend), "new_state", lambda self: Quarter())
    before = tiny("llama")  # never swapped: costed by the same backend
    full = 1 * 8 * 41 * 16 * 8
    cost = model_cost(before, 1, 1, 40)
    assert cost.kv_bytes == 2 * full // 4
    assert cost.by_name()["cache"].write_bytes == 2 * (full // 4 // 41)
    assert {o.kv_bytes for o in cost.operations if o.name == "attention"} == {full // 4}


def test_hooks_are_documented():
    from effattn.profiling import cost

    text = inspect.getdoc(cost)
    for hook in ("cost(rows, backward=False)", "cost(shape) -> Cost", "`Backend.cost`"):
        assert hook in text


@pytest.mark.parametrize("positions", [None, "nope"])
def test_latents(positions):
    """Operations of a step as they are counted, and r numbers a token, where keys turn and where
    they are absorbed; of a prefill, those of keys and values that are made once."""
    model, tokens = tiny("llama", num_key_value_heads=4), 40
    heads, calibration = "latent(rank=12)", torch.randint(0, 96, (1024,))
    effattn.swap(model, heads=heads, calibration=calibration, positions=positions)
    ids = torch.randperm(96)[:tokens][None]
    with torch.no_grad():
        with Counted(model=model) as counted:
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        assert counted.flops == model_cost(model, 1, tokens).total.flops
        held = sum(layer.nbytes for layer in cache.layers)
        assert held == model_cost(model, 1, tokens).kv_bytes == 2 * tokens * 12 * 8
        with Counted(model=model) as counted:
            model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
    cost = model_cost(model, 1, 1, tokens)
    # the new token's key and value are made too, which nobody reads
    assert counted.flops == cost.total.flops
    step = [one for one in cost.operations if one.name == "attention"]
    assert [one.kv_bytes for one in step] == 2 * [(tokens + 1) * 12 * 8]
    weights = sum(operation.weight_bytes for operation in cost.operations)
    assert weights <= cost.weight_bytes + rows_again(model, 1)


def test_a_ring_of_latents_costs_what_it_holds():
    model = tiny("llama", num_key_value_heads=4)
    heads, calibration = "latent(rank=12)", torch.randint(0, 96, (1024,))
    effattn.swap(model, "sliding(window=5, sinks=3)", heads=heads, calibration=calibration)
    with torch.no_grad():
        cache = model(torch.arange(60)[None], use_cache=True).past_key_values
    assert model_cost(model, 1, 60).kv_bytes == sum(layer.nbytes for layer in cache.layers)
    step = model_cost(model, 1, 1, 60).operations
    assert {one.kv_bytes for one in step if one.name == "attention"} == {8 * 12 * 8}
