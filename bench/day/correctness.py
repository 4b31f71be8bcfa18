"""Every kernel against fp64, forward and backward, in the dtypes and at the sizes that people use.

The plain torch path in fp64, which the tests hold to the definition, says what is right; the same
path in the kernel's dtype says which error is to be expected: a kernel may have twice that. Nothing
stops at what is wrong, or raises: it is a line of the results. Memory that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize
from torch.utils import deterministic

from bench.day.settings import Day
from effattn.kernels import (
    bitmask,
    decode,
    flash,
    gated,
    latent,
    linear,
    linformer,
    lsh,
    monarch,
    pack,
    ragged,
    sparse24,
    topk,
    vq,
)
from effattn.kernels.decode import packed
from effattn.kernels.flash.pattern import layout_of
from effattn.kernels.flash.rules import Bias, Far

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# RMS(error) / RMS(right) that is fine whatever plain torch's is
FINE = {BF16: 2e-3, FP16: 3e-4, FP32: 1e-5}
Tensors = dict[str, Tensor]
# inputs -> outputs, by an implementation
Call = Callable[[str, Tensors], Tensors]


class Check:
    """inputs: name -> shape; q, k, v and others, drawn from a normal distribution. graded: those
    whose gradient is compared, too. ranged: the kernel multiplies fp16 as bf16, since fp16's range
    does not hold what it makes of the inputs."""

    def __init__(
        self,
        call: Call,
        inputs: dict[str, tuple[int, ...]],
        graded: str = "",
        ranged: bool = False,
    ):
        self.call, self.inputs, self.graded = call, inputs, graded.split()
        self.ranged = ranged

    def drawn(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """The inputs."""
        return {
            name: torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
            for name, shape in self.inputs.items()
        }

    def outcome(self, impl: str, inputs: Tensors, dtype: torch.dtype) -> Tensors:
        """What an implementation makes of the inputs in `dtype`; gradients are called d and the
        input's name."""
        leaves = {name: x.to(dtype, copy=True) for name, x in inputs.items()}
        graded = [leaves[name].requires_grad_() for name in self.graded]
        with torch.set_grad_enabled(bool(graded)):
            found = self.call(impl, leaves)
        if graded:
            above = [torch.cos(torch.arange(x.numel(), device=x.device)) for x in found.values()]
            above = [x.view_as(y).to(y) for x, y in zip(above, found.values(), strict=True)]
            grads = torch.autograd.grad(list(found.values()), graded, above, materialize_grads=True)
            found |= {f"d{name}": x for name, x in zip(self.graded, grads, strict=True)}
        return {name: x.detach() for name, x in found.items()}


def judge(check: Check, device: torch.device, dtype: torch.dtype) -> dict:
    """{"errors": {name: [kernel's, plain torch's, as much is fine]}, "right"}."""
    inputs = check.drawn(device, dtype)
    right = check.outcome("torch", inputs, torch.float64)
    like = BF16 if check.ranged and dtype == FP16 else dtype
    plain = check.outcome("torch", inputs, like)
    ours = check.outcome("triton", inputs, dtype)
    errors = {}
    for name, truth in right.items():
        mine, theirs = (_error(x[name], truth) for x in (ours, plain))
        errors[name] = [mine, theirs, 2 * theirs + FINE[like]]
    return {"errors": errors, "right": all(mine <= fine for mine, _, fine in errors.values())}


def _error(x: Tensor, right: Tensor) -> float:
    size, distance = (float(y.double().square().mean().sqrt()) for y in (right, x - right))
    return distance / size if size else distance


# ---- what is checked


def _qkv(tokens: int, queries: int | None = None, dim: int = 64, heads=(8, 2)) -> dict:
    few = tokens if queries is None else queries
    return {
        "q": (2, heads[0], few, dim),
        "k": (2, heads[1], tokens, dim),
        "v": (2, heads[1], tokens, dim),
    }


def _padding(x: Tensor) -> Tensor:
    """(2, T): a third of the second row is padding, on the left."""
    mask = torch.ones(2, x.shape[2], dtype=torch.bool, device=x.device)
    mask[1, : x.shape[2] // 3] = False
    return mask


def _flash(pattern, padded, options, impl, x):
    layout = layout_of(_padding(x["k"])) if padded else None
    options = dict(options)
    if window := options.pop("far", None):
        options["far"] = Far(x["q_far"], x["k_far"], window)
    if options.pop("alibi", None):
        slopes = 2.0 ** -torch.arange(1.0, x["q"].shape[1] + 1, device=x["q"].device)
        options["bias"] = Bias("alibi", slopes[:, None].to(torch.promote_types(x["q"].dtype, FP32)))
    out = flash.attention(x["q"], x["k"], x["v"], pattern, layout, impl=impl, **options)
    return {"out": out}


PATTERNS = {
    "full": flash.Pattern(),
    "window": flash.Window(back=48),
    "sinks": flash.Window(back=48, first=4),
    "blocks": flash.Blocks(size=64, look_back=1),
}


def _flash_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    for (name, pattern), dim, padded in product(PATTERNS.items(), (64, 128), (False, True)):
        said = f"{name} D{dim}{' padded' * padded}"
        call = partial(_flash, pattern, padded, {"causal": True})
        yield said, Check(call, _qkv(tokens, dim=dim), "q k v")
    for dim in (32, 80, 256):
        call = partial(_flash, PATTERNS["full"], False, {"causal": True})
        yield f"full D{dim}", Check(call, _qkv(tokens, dim=dim), "q k v")
    for name in ("full", "window"):
        pattern = flash.Window(back=24, ahead=24) if name == "window" else PATTERNS[name]
        call = partial(_flash, pattern, False, {"causal": False})
        yield f"{name} both ways", Check(call, _qkv(tokens, dim=128), "q k v")


def _rule_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    sizes = _qkv(tokens, dim=128)
    far = sizes | {"q_far": sizes["q"], "k_far": sizes["k"]}
    call = partial(_flash, PATTERNS["full"], False, {"causal": True, "far": 48})
    yield "ReRoPE", Check(call, far, "q k v q_far k_far")
    call = partial(_flash, PATTERNS["full"], False, {"causal": True, "softcap": 5.0})
    yield "softcap", Check(call, sizes, "q k v")
    call = partial(_flash, PATTERNS["full"], False, {"causal": True, "alibi": True})
    yield "ALiBi", Check(call, sizes, "q k v")


def _decode(pattern, padded, impl, x):
    layout = layout_of(_padding(x["k"])) if padded else None
    return {"out": decode.attention(x["q"], x["k"], x["v"], pattern, layout, impl=impl)}


def _decode_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    for (name, pattern), dim, padded in product(PATTERNS.items(), (64, 128), (False, True)):
        said = f"{name} D{dim}{' padded' * padded}"
        yield said, Check(partial(_decode, pattern, padded), _qkv(4 * tokens, 1, dim))
    yield "full, 5 queries", Check(partial(_decode, PATTERNS["full"], False), _qkv(tokens, 5, 128))


def _packed(k_coding, v_coding, impl, x):
    """Packed in the inputs' own dtype by torch, whatever is asked for: the bytes are the same."""
    codes = [
        pack.pack(x[name].to(x["rest"].dtype), coding, "torch")
        for name, coding in (("k", k_coding), ("v", v_coding))
    ]
    rest = x["rest"]
    cache = packed.PackedCache(*codes, rest, rest, x["k"].shape[2] + rest.shape[2])
    return {"out": packed.attention(x["q"], cache, impl=impl)}


def _packed_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    tokens = max(128, tokens // 128 * 128)
    for kind, dim in product(pack.KINDS, (64, 128)):
        codings = [pack.Coding(kind, axis, 32) for axis in ("channel", "token")]
        sizes = _qkv(tokens, 1, dim)
        sizes["rest"] = (2, 2, 40, dim)
        yield f"{kind} D{dim}", Check(partial(_packed, *codings), sizes)


def _linear(map, options, impl, x):
    decay = torch.tensor([0.9, 0.99], device=x["q"].device) if options.get("decay") else None
    work = torch.promote_types(x["q"].dtype, FP32)
    given = {"directions": x["w"].to(work)} if "w" in x else {}
    given |= {"decay": decay.to(work)} if decay is not None else {}
    given |= {name: options[name] for name in ("causal", "normalize") if name in options}
    out, _ = linear.attention(x["q"], x["k"], x["v"], map, impl=impl, **given)
    return {"out": out}


def _linear_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    for map, causal in product(("elu", "softmax"), (True, False)):
        call = partial(_linear, map, {"causal": causal})
        yield f"{map}{' both ways' * (not causal)}", Check(call, _qkv(tokens), "q k v", ranged=True)
    call = partial(_linear, "elu", {"decay": True})
    yield "elu with decay", Check(call, _qkv(tokens, dim=128), "q k v", ranged=True)
    call = partial(_linear, "identity", {"decay": True, "normalize": False})
    yield "retention", Check(call, _qkv(tokens, dim=128), "q k v", ranged=True)
    sizes = _qkv(tokens)
    sizes["w"] = (128, 64)
    yield "favor", Check(partial(_linear, "favor", {}), sizes, "q k v", ranged=True)


def _linformer(impl, x):
    weight = x["w"].to(torch.promote_types(x["x"].dtype, FP32))
    return {"slots": linformer.project(x["x"], weight, impl=impl)}


def _vq(impl, x):
    words = x["codebook"].shape[1]
    codes = vq.nearest(x["k"], x["codebook"], "torch")
    sums, counts = vq.summarise(x["v"], codes, words=words, size=64, impl=impl)
    options = dict(scale=0.1, size=64, impl=impl)
    out, _ = vq.read(x["q"], x["codebook"], sums, counts, **options)
    return {"out": out, "sums": sums}


def _lsh(causal, impl, x):
    rule = lsh.Rule(rounds=2, buckets=8, chunk=32)
    rounded = [x[name].float() for name in ("q", "k")]
    mine, bucket = (lsh.hash_tokens(one, x["rotations"].float()) for one in rounded)
    rank, _ = lsh.new_ranks(bucket, rule.buckets)
    places = lsh.places_of(rule, mine, bucket, rule.code(bucket, rank), causal, None)
    return {"out": lsh.attention(x["q"], x["k"], x["v"], places, impl=impl)}


def _topk(impl, x):
    # chosen by the rounded inputs, so that all dtypes read the same blocks
    rule = topk.Rule(window=32, block=16, blocks=3)
    at = torch.arange(x["q"].shape[2], device=x["q"].device)[None]
    summaries = topk.summarise(rule, x["k"].bfloat16().float())
    chosen = topk.select(rule, x["q"].bfloat16().float(), summaries, at)
    out, lse = topk.attention(x["q"], x["k"], x["v"], rule, chosen, at, impl=impl)
    return {"out": out, "lse": torch.where(lse.isfinite(), lse, 0.0)}


def _method_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    sizes = {"x": (2, 2, tokens, 64), "w": (2, 32, 2 * tokens)}
    yield "linformer", Check(_linformer, sizes, "x w")
    sizes = _qkv(tokens) | {"codebook": (2, 48, 64)}
    yield "vq", Check(_vq, sizes, "q v")
    yield "topk", Check(_topk, _qkv(tokens), "q k v")
    for causal in (True, False):
        sizes = _qkv(tokens) | {"rotations": (2, 64, 4)}
        yield f"lsh{' both ways' * (not causal)}", Check(partial(_lsh, causal), sizes, "q k v")


def _gated(delta, impl, x):
    work = torch.promote_types(x["q"].dtype, FP32)
    forget = logsigmoid(x["g"].to(work) + 2).clamp(min=gated.LOWEST)
    given = {"beta": torch.sigmoid(x["b"].to(work))} if delta else {}
    # the delta rule's keys are no longer than 1
    k = normalize(x["k"], dim=-1)
    return {"out": gated.attention(x["q"], k, x["v"], log_decay=forget, impl=impl, **given)[0]}


def _ragged(impl, x):
    """Of each head its first tokens, another number of them."""
    tokens, dim = x["k"].shape[2:]
    lengths = (tokens, tokens // 3, tokens // 2, 1)
    ends = torch.tensor([0, *lengths], device=x["k"].device).cumsum(0)
    k, v = (
        torch.cat([y[:n] for y, n in zip(x[name].flatten(0, 1), lengths, strict=True)])
        for name in "kv"
    )
    of = torch.arange(2, device=k.device)
    kept = ragged.Ragged(k, v, ends, of, lengths, (0, 1), (dim, dim), k.dtype)
    return {"out": ragged.attention(x["q"], kept, scale=dim**-0.5, impl=impl)[0]}


def _latent(impl, x):
    maps = latent.Maps(*(x[name] * x["c"].shape[2] ** -0.5 for name in ("key", "value")))
    return {"out": latent.attention(x["q"], x["c"], maps, impl=impl)}


def _state_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    for delta, width in product((False, True), (1, 64)):
        sizes = _qkv(tokens) | {"g": (2, 2, tokens, width), "b": (2, 2, tokens)}
        said = f"gated{' delta rule' * delta}, {width} gates a head"
        yield said, Check(partial(_gated, delta), sizes, "q k v", ranged=True)
    for queries in (1, 5):
        yield f"ragged, {queries} queries", Check(_ragged, _qkv(tokens, queries, 128))
    for rank in (96, 600):
        sizes = {"q": (2, 8, 1, 64), "c": (2, tokens, rank)}
        sizes |= dict.fromkeys(("key", "value"), (2, 64, rank))
        yield f"latents of rank {rank}", Check(_latent, sizes)


def _monarch(outputs, impl, x):
    options = dict(out_features=outputs, impl=impl)
    return {"out": monarch.linear(x["x"], x["right"], x["left"], x["bias"], **options)}


def _sparse(impl, x):
    groups = x["w"].unflatten(1, (-1, 4))
    lowest = groups.float().abs().argsort(dim=2)[..., :2]
    kept = sparse24.pack(groups.scatter(2, lowest, 0.0).flatten(1))
    return {"out": sparse24.linear(x["x"], kept, x["bias"], impl=impl)}


def _bitmask(impl, x):
    # half of the weights, wherever they are, by their numbers: the same in every dtype
    smallest = x["w"].float().abs().argsort(dim=1)[:, : x["w"].shape[1] // 2]
    kept = bitmask.pack(x["w"].scatter(1, smallest, 0.0))
    return {"out": bitmask.linear(x["x"], kept, x["bias"], impl=impl)}


def _product_checks(tokens: int) -> Iterator[tuple[str, Check]]:
    for rows in (1, tokens):
        sizes = {"x": (rows, 512), "right": (16, 16, 32), "left": (16, 48, 16), "bias": (768,)}
        yield f"monarch, {rows} rows", Check(partial(_monarch, 768), sizes, "x right left bias")
    for rows in (1, 16):
        sizes = {"x": (rows, 512), "w": (256, 512), "bias": (256,)}
        yield f"2:4, {rows} rows", Check(_sparse, sizes)
        yield f"bitmask, {rows} rows", Check(_bitmask, sizes)


GROUPS: dict[str, Callable[[int], Iterator[tuple[str, Check]]]] = {
    "flash": _flash_checks,
    "rules": _rule_checks,
    "decode": _decode_checks,
    "packed": _packed_checks,
    "linear": _linear_checks,
    "methods": _method_checks,
    "states": _state_checks,
    "products": _product_checks,
}
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


def names(day: Day) -> list[str]:
    """A job is a group of kernels in one dtype."""
    found = [f"{group} {dtype}" for dtype, group in product(DTYPES, GROUPS)]
    return found[1:3] if day.tiny else found


def checks(name: str, day: Day) -> tuple[list[tuple[str, Check]], torch.dtype]:
    """What a job checks, and in which dtype."""
    group, _, dtype = name.partition(" ")
    found = list(GROUPS[group](40 if day.tiny else 1000))
    return found[: 1 if day.tiny else None], DTYPES[dtype]


def run(name: str, day: Day) -> Iterator[dict]:
    """{"what", "errors", "right"} of each check; "failed" in the place of errors for one that
    raises."""
    found, dtype = checks(name, day)
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    for what, check in found:
        try:
            yield {"what": what, **judge(check, torch.device(day.device), dtype)}
        except Exception as error:  # of any kind: it is what came of this check
            said = f"{type(error).__name__}: {error}"[-400:]
            yield {"what": what, "failed": said, "right": False}


def launch(name: str, day: Day) -> None:
    """All that a job launches, once."""
    found, dtype = checks(name, day)
    for _, check in found:
        check.outcome("triton", check.drawn(torch.device(day.device), dtype), dtype)
