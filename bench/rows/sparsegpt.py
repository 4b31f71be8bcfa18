"""SparseGPT of one linear layer, against the part of it that nobody can leave out, and against
llmcompressor.

What cannot be left out: the factorisation of the Hessian's inverse, and the products of the lazy
updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.case import Case, Contender, Ratio, Target
from bench.peers import find
from effattn.calibration.hessian import DAMPING, InverseHessian
from effattn.interface import Cost
from effattn.prune.unstructured.methods.sparsegpt import BLOCK, sparsegpt
from effattn.prune.unstructured.reference import sparsegpt_reference

WIDTH, CHECKED = 4096, 256
ALONE, OURS, PEER = (
    "its factorisation and lazy updates alone",
    "effattn sparsegpt",
    "llmcompressor SparseGPT",
)
SOURCE = "SparseGPT on a CPU: one 4096 x 4096 layer"


@dataclass(frozen=True)
class Layer(Case):
    """A layer of `tokens` inputs and as many outputs, half of whose weights go. Inputs: its weight
    and its Hessian.
    """

    sparsity: str = "0.5"

    @property
    def shape(self) -> str:
        """The matrix."""
        return f"{self.tokens}x{self.tokens}"

    def inputs(self, tokens, device, seed=0):
        draw = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(tokens, tokens, generator=draw, device=device)
        x = torch.randn(2 * tokens, tokens, generator=draw, device=device)
        # features that move together
        x += torch.randn(2 * tokens, 1, generator=draw, device=device)
        return [weight, x.T @ x / tokens]

    def answers(self, call, inputs):
        return {"output error": output_error(inputs, self.once(call, inputs))}

    def cost(self, contender):
        size, item = self.tokens, 4
        return Cost(2 * size**3 // 3 + size**3, 2 * size * size * item, size * size * item)


def output_error(inputs, pruned):
    """tr(E H E^T) in fp64. Two right answers may differ in which of two equal weights they drop,
    but not in this.
    """
    weight, hessian = (one.double() for one in inputs)
    difference = weight - pruned.double()
    return (difference @ hessian * difference).sum()


def _truth(case, inputs, call):
    right = sparsegpt_reference(*(one.double() for one in inputs), case.sparsity)
    return {"output error": output_error(inputs, right)}


def _ours(case, inputs):
    return lambda weight, hessian: sparsegpt(weight, hessian, case.sparsity).weight


def _alone(case, inputs):
    errors = torch.randn(BLOCK, len(inputs[0]), device=inputs[0].device)

    def call(weight, hessian):
        factor = InverseHessian.of(hessian, DAMPING, "weight").factor
        columns = weight.T.contiguous()
        for start in range(0, len(columns), BLOCK):
            stop = start + BLOCK
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return columns

    return call


def _peer(case, inputs):
    return find("llmcompressor")(None, case, inputs)


def _race(width, sparsity="0.5"):
    checked = {"check_tokens": CHECKED, "tolerance": 1e-3, "efficiency": 0.3}
    raced = (
        Contender(ALONE, _alone, efficiency=0.5),
        Contender(OURS, _ours, _truth, ours=True, spec=sparsity, **checked),
        Contender(PEER, _peer, _truth, spec=f"peer {sparsity}", **(checked | {"tolerance": 0.02})),
    )
    remark = (
        "In fp32. The answers' output errors are held to the paper's algorithm in fp64, at "
        f"{CHECKED} inputs."
    )
    return Layer(
        "prune",
        "float32",
        width,
        raced,
        title=f"SparseGPT {sparsity}",
        remark=remark,
        sparsity=sparsity,
    )


def cases(device, quick):
    """SparseGPT of one matrix, beside the linear algebra that it cannot do without."""
    for sparsity in ("0.5", "2:4"):
        yield _race(512 if quick else WIDTH, sparsity)


def targets(device):
    """On a CPU: time over that of the linear algebra alone."""
    if device != "cpu":
        return
    for sparsity in ("0.5", "2:4"):
        name = _race(WIDTH, sparsity).name
        said = f"SparseGPT {sparsity}, time over its factorisation and lazy updates alone"
        yield Target(said, Ratio((name, OURS), (name, ALONE)), SOURCE, most=1.3)
        said = f"SparseGPT {sparsity}, times as fast as llmcompressor"
        yield Target(said, Ratio((name, PEER), (name, OURS)), SOURCE, least=1)
