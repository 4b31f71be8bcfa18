"""Every backend x implementation x dtype x direction through `effattn.conformance`; and the suite
catches mistakes.

A new backend is one more row in ROWS.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effattn
from effattn.conformance import PROPERTIES, Violation, check, inputs
from effattn.errors import Unsupported
from effattn.interface import Traits
from effattn.patterns.dense import Dense
from effattn.states.full import FullState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# name -> options, and whether it can be bidirectional (None: it can be nothing else). The lengths
# 1, 2, 4, 5, 6 lie around these windows and blocks.
ROWS = {
    "dense": [({}, True)],
    "block": [({"block": 4}, True), ({"block": 3, "look_back": 2}, True)],
    "sliding": [
        ({"window": 5}, True),
        ({"window": 5, "sinks": 2}, False),
        ({"window": 3, "dilation": 2}, True),
        ({"window": 5, "sink_logits": True}, True),
        ({"window": 6, "sinks": 2, "compress": 2, "means": 3}, False),
        ({"window": 4, "compress": 4, "means": 2}, False),
    ],
    "longformer": [
        ({"window": 5, "global_tokens": 2}, True),
        ({"window": 5, "global_tokens": [0, 4, 20]}, True),
    ],
    "strided": [({"stride": 4}, False)],
    "fixed": [({"stride": 4}, False), ({"stride": 5, "summary": 2}, False)],
    "longnet": [({"segments": [4, 12], "dilations": [1, 3]}, True)],
    "s2": [({"block": 4}, True)],
    "linformer": [
        ({"k": 4, "max_length": 40}, None),
        ({"k": 5, "max_length": 40, "window": 5}, None),
    ],
    "linformer_blockwise": [({"k": 16, "max_length": 32, "block": 6}, False)],
    "vq": [({"codes": 12, "block": 8}, True)],
    "linear": [
        ({}, True),
        ({"feature_map": "softmax", "decay": 0.9}, False),
        ({"feature_map": "hedgehog"}, False),
        ({"feature_map": "exp", "features": 24}, False),
        ({"feature_map": "identity", "decay": 0.8, "normalize": False}, False),
    ],
    "gated": [({"delta": True, "gate": "feature", "decay": 0.7}, False)],
    "hybrid": [({"window": 5, "sinks": 2}, False)],
    "topk": [
        ({"window": 5, "sinks": 2, "block": 3, "blocks": 2}, False),
        ({"window": 2, "block": 1, "blocks": 3, "summary": "minmax"}, False),
        ({"window": 3, "block": 2, "blocks": 3, "summary": "learned"}, False),
    ],
    "lsh": [
        ({"rounds": 2, "buckets": 4, "chunk": 2}, True),
        ({"rounds": 3, "buckets": 2, "chunk": 3, "seed": 1}, False),
    ],
    "performer": [({"features": 24}, True), ({"features": 16, "kernel": "relu"}, False)],
}
CASES = [
    (name, options, causal)
    for name, rows in ROWS.items()
    for options, both in rows
    for causal in {True: (True, False), False: (True,), None: (False,)}[both]
]
HALF = ("accuracy", "future", "padding", "decode", "gradients", "layouts")  # what a dtype can break
# Triton's interpreter takes some 10 ms a program: without a GPU, all that a kernel can break is
# checked for one row of the backends that have a kernel of their own, and of the others what they
# make of it.
INTERPRETED = {
    torch.float32: (
        "accuracy",
        "future",
        "padding",
        "decode",
        "gradients",
        "poisoned_memory",
        "layouts",
    ),
    torch.bfloat16: ("accuracy", "gradients"),
    torch.float16: ("accuracy",),
}
HALVES = ("dense", "linear", "lsh", "linformer", "vq")
FIRST = [
    next(case for case in CASES if case[0] == name)
    for name in (*HALVES, "block", "sliding", "performer")
]


def test_every_backend_has_a_row():
    assert set(ROWS) == set(effattn.backends())


SLICE = [next(case for case in CASES if case[0] == name) for name in ROWS]  # one a backend


def run(*values):
    """quick: one case a backend, in torch. Triton's interpreter takes seconds a case: one of each
    backend is tried with the kernels (`make kernels`), the others are slow; tests/kernels has the
    options of each kernel."""
    *case, impl, dtype = values
    one = tuple(case) in SLICE
    interpreted = impl == "triton" and DEVICE == "cpu"
    quick = one and (impl, dtype) == ("torch", torch.float32)
    slow = not one and interpreted
    marks = [pytest.mark.quick] * quick + [pytest.mark.slow] * slow
    marks += [pytest.mark.interpreted] * interpreted
    return pytest.param(*values, marks=marks)


RUNS = [
    run(*case, impl, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for impl in ("torch", "triton")
    for case in CASES
    if DEVICE == "cuda"
    or impl == "torch"
    or dtype == torch.float32
    or (case in FIRST and case[0] in HALVES)
]


@pytest.mark.parametrize(("name", "options", "causal", "impl", "dtype"), RUNS)
def test_conformance(name, options, causal, impl, dtype):
    some, small = None if dtype == torch.float32 else HALF, {}
    if impl == "triton" and DEVICE == "cpu":
        some, small = INTERPRETED[dtype], {"lengths": (1, 9), "sizes": (2, 2, 1, 16)}
        if (name, options, causal) not in FIRST:
            some, small["lengths"] = ("accuracy", "gradients"), (9,)
    attn = effattn.backend(name, **options, impl=impl)
    report = check(attn, causal=causal, dtype=dtype, device=DEVICE, properties=some, **small)
    assert list(report.properties) == list(some or PROPERTIES)
    assert f"impl={impl}" in str(report)


SIZED = {
    "sliding": "window",
    "block": "block",
    "longformer": "window",
    "strided": "stride",
    "fixed": "stride",
}


@settings(deadline=None, max_examples=60)
@given(
    case=st.sampled_from(list(SIZED.items())),
    size=st.integers(1, 40),
    length=st.integers(2, 90),
    sinks=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_window_and_length(case, size, length, sinks, seed):
    name, option = case
    options = {option: size} | ({"sinks": sinks} if name == "sliding" else {})
    some = ("accuracy", "future", "padding", "decode", "state_bytes", "state_moves")
    lengths = (min(size, length), min(size + 1, length), length)
    check(
        effattn.backend(name, **options, impl="torch"), properties=some, lengths=lengths, seed=seed
    )


@pytest.mark.parametrize("name", ROWS)
def test_excluded_directions_are_refused(name):
    attn = effattn.backend(name, **ROWS[name][0][0])
    for causal, possible in ((True, attn.traits.causal), (False, attn.traits.bidirectional)):
        if not possible:
            with pytest.raises(Unsupported, match=f"causal={causal}"):
                check(attn, causal=causal)


EXACT = [
    ("block", {"block": 64}),
    ("sliding", {"window": 64}),
    ("sliding", {"window": 40, "sinks": 30}),
    ("longformer", {"window": 127, "global_tokens": 3}),
    ("longformer", {"window": 127, "global_tokens": [2, 50]}),
    ("strided", {"stride": 64}),
    ("strided", {"stride": 1}),
    ("fixed", {"stride": 64}),
    ("fixed", {"stride": 8, "summary": 8}),
    ("longnet", {"segments": [64], "dilations": [1]}),
    ("s2", {"block": 256}),
    ("linformer_blockwise", {"k": 64, "max_length": 64, "block": 8}),
]


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_converges_to_dense(name, options):
    q, k, v = inputs(61, torch.float64)
    expected = effattn.backend("dense")(q, k, v)
    torch.testing.assert_close(effattn.backend(name, **options)(q, k, v), expected)


class NeedsDenseRows(Dense):
    """What a kernel does that takes the stride of the last dimension for 1."""

    def attend(self, q, k, v, call):
        return super().attend(
            q, k, v.as_strided(v.shape, (*v.stride()[:3], 1), v.storage_offset()), call
        )


class WritesToInputs(Dense):
    def attend(self, q, k, v, call):
        out = super().attend(q, k, v, call)
        v.data.mul_(1.0 + 1e-6)
        return out


class GivesInputsBack(Dense):
    def attend(self, q, k, v, call):
        return q.view_as(q)


class Leaky(Dense):
    """The future shows in the values' mean."""

    def attend(self, q, k, v, call):
        return super().attend(q, k, v, call) + 1e-6 * v.mean()


class IgnoresPadding(Dense):
    def attend(self, q, k, v, call):
        return super().attend(q, k, v, call) + 0.01 * k.mean(dim=(1, 2, 3))[:, None, None, None]


class TopLeft(Dense):
    """Queries aligned with the first keys instead of the last."""

    def attend(self, q, k, v, call):
        return super().attend(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], call)


class MixesRows(Dense):
    def attend(self, q, k, v, call):
        out = super().attend(q, k, v, call)
        return out + 0.01 * (out.roll(1, 0) - out)


class WrongGroups(Dense):
    """Query head h reads key/value head h % Hkv."""

    def attend(self, q, k, v, call):
        order = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.reshape(-1)
        out = super().attend(q[:, order], k, v, call)
        return (
            out[:, order.argsort()] if self.impl != "reference" else super().attend(q, k, v, call)
        )


class NoValueGradient(Dense):
    def attend(self, q, k, v, call):
        return super().attend(q, k, v if self.impl == "reference" else v.detach() + 0 * v, call)


class Imprecise(Dense):
    def attend(self, q, k, v, call):
        out = super().attend(q, k, v, call)
        return out if self.impl == "reference" else out.bfloat16().to(out.dtype)


class Uninitialised(Dense):
    def attend(self, q, k, v, call):
        return super().attend(q, k, v, call) + 0 * torch.empty(1).to(q.dtype)


class Forgetful(Dense):
    """A state that keeps more than it declares, and whose crop does nothing."""

    class Keeps(FullState):
        nbytes = 7

    def new_state(self):
        return self.Keeps()


class NanRows(Dense):
    def attend(self, q, k, v, call):
        out = super().attend(q, k, v, call)
        return torch.where((out == 0).all(-1, keepdim=True), torch.nan, out)


@pytest.mark.parametrize(
    ("wrong", "properties", "message"),
    [
        (Leaky, ("future",), "future: changing tokens"),
        (IgnoresPadding, ("padding",), "padding: what left padding holds"),
        (TopLeft, ("decode",), "decode: "),
        (MixesRows, ("batch",), "batch: rows alone"),
        (WrongGroups, ("grouped_heads",), "grouped_heads"),
        (WrongGroups, None, "accuracy"),
        (NoValueGradient, ("gradients",), "gradients: .*dv"),
        (Imprecise, None, "accuracy: 1 tokens"),
        (Uninitialised, ("poisoned_memory",), "uninitialised"),
        (Forgetful, ("state_bytes",), "holds 7 bytes, cost declares"),
        (NanRows, ("blind_rows",), "not 0"),
        (NeedsDenseRows, ("layouts",), "layouts: output of q transposed, .* v every_third"),
        (WritesToInputs, ("layouts",), "written to the inputs"),
        (GivesInputsBack, ("layouts",), "lies in the memory"),
    ],
)
def test_the_suite_catches(wrong, properties, message):
    with pytest.raises(Violation, match=message):
        check(wrong(impl="torch"), properties=properties)


def test_the_suite_catches_excluded_directions_that_run():
    class Claims(Dense):
        traits = Traits(exact=True, causal=False, bidirectional=True, learned=False, state="none")

        def _check(self, *args):
            pass

    with pytest.raises(Violation, match="excluded, but it ran"):
        check(Claims())


def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'future'"):
        check("dense", properties=("futur",))
    with pytest.raises(ValueError, match="did you mean 'sliding'"):
        check("slding(window=3)")


def test_the_report_reads_well():
    text = str(check("sliding(window=3)", properties=("future", "accuracy", "gradcheck")))
    assert "future               bit for bit" in text
    assert "gradcheck            holds" in text
    assert "float32, causal" in text
