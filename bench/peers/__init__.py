"""What a user would pick instead: every peer, what it needs, and its adapter.

An adapter of attention is `adapter(attn, case, inputs) -> call`: the peer, set up to do what the
backend `attn` does, as a plain call(q, k, v) -> out of (B, H, T, D) tensors; a `Defined` one where
the peer draws parameters of its own or means something else. It raises `Absent` for what the peer
cannot do. Packages are imported by adapters only, so that a missing one is a line in the report.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.case import Absent

HERE = "bench.peers"


@dataclass(frozen=True)
class Peer:
    """`package`: its distribution. `adapter`: "module:function" in this folder, "" where there is
    none yet. `against`: what of ours it is raced with. `setup`, `efficiency`: as in `Contender`.
    `note`: why it may not install."""

    package: str
    against: str
    adapter: str = ""
    gpu: bool = False
    setup: float = 0.0
    efficiency: float = 0.4
    note: str = ""


PEERS = {
    "SDPA": Peer("torch", "dense", "plain:sdpa", efficiency=0.65),
    "SDPA-flash": Peer("torch", "dense", "plain:sdpa_flash", gpu=True),
    "SDPA-cudnn": Peer("torch", "dense", "plain:sdpa_cudnn", gpu=True),
    "SDPA-efficient": Peer("torch", "dense", "plain:sdpa_efficient", gpu=True),
    "SDPA-math": Peer("torch", "dense", "plain:sdpa_math", gpu=True),
    "flex_attention": Peer("torch", "exact patterns", "plain:flex", setup=15.0),
    "DynamicCache+SDPA": Peer("transformers", "states", "caches:dynamic"),
    "transformers-Longformer": Peer(
        "transformers", "longformer", "windows:longformer", efficiency=0.06
    ),
    "local-attention": Peer(
        "local-attention", "sliding", "windows:local_attention", efficiency=0.06
    ),
    "performer-pytorch": Peer(
        "performer-pytorch", "performer", "approximate:performer", efficiency=0.1
    ),
    "linformer": Peer("linformer", "linformer", "approximate:linformer"),
    "reformer-pytorch": Peer("reformer-pytorch", "lsh", "approximate:reformer", efficiency=0.03),
    "linear-attention-transformer": Peer(
        "linear-attention-transformer", "linear", "approximate:linear", efficiency=0.15
    ),
    "linear-attention-transformer(blindspot=64)": Peer(
        "linear-attention-transformer",
        "linear",
        "approximate:linear_with_blind_spot",
        efficiency=0.15,
    ),
    "transformers-Reformer": Peer(
        "transformers", "lsh", "approximate:transformers_reformer", efficiency=0.03
    ),
    "flash-linear-attention": Peer(
        "flash-linear-attention", "linear", "approximate:flash_linear", gpu=True, setup=5.0
    ),
    "nn.Linear": Peer("torch", "monarch", "plain:dense_layer"),
    "transformers-QuantizedCache": Peer("optimum-quanto", "quantized caches", "caches:quantized"),
    "bitsandbytes": Peer("bitsandbytes", "quantized weights"),
    "llmcompressor": Peer(
        "llmcompressor",
        "SparseGPT",
        "pruning:sparsegpt",
        note="it wants an older transformers: an environment of its own",
    ),
}


def find(who: str) -> Callable:
    """The adapter of `who`. `Absent` where its package is missing, or it has none yet."""
    if why := missing(who):
        raise Absent(why)
    if not PEERS[who].adapter:
        raise Absent(f"no adapter yet; it will be raced with {PEERS[who].against}")
    module, _, name = PEERS[who].adapter.partition(":")
    return getattr(importlib.import_module(f"{HERE}.{module}"), name)


def missing(who: str) -> str | None:
    """Why `who` cannot run on this machine; None if it can."""
    peer = PEERS[who]
    if peer.gpu and not torch.cuda.is_available():
        return "it needs a GPU"
    if version(peer.package) is None:
        return f"{peer.package} is not installed" + (f" ({peer.note})" if peer.note else "")
    return None


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def roster() -> dict[str, dict]:
    """Every peer: {"package", "version", "against", "absent": why or None, "adapter": whether there
    is one}.
    """
    return {
        who: {
            "package": peer.package,
            "version": version(peer.package),
            "against": peer.against,
            "absent": missing(who),
            "adapter": bool(peer.adapter),
        }
        for who, peer in PEERS.items()
    }
