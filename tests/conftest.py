"""Shared by all tests: tiny random models, few threads, no network, kernels in the interpreter
where no GPU is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

# tests share helpers with each other by module name, whatever folder they lie in
sys.path.extend(str(folder) for folder in Path(__file__).parent.iterdir() if folder.is_dir())

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too

import pytest
import torch

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from transformers import AutoModelForCausalLM

# As many threads in all as there are cores: one for each of pytest-xdist's workers.
threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=96,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)

# Settings of each class that its tiny configuration needs beyond SMALL.
EXTRA: dict[str, dict] = {
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "gemma3_text": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "ministral": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "cohere2": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "head_dim": 8,
    },
    "exaone4": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "head_dim": 8,
    },
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "arcee": {"head_dim": 8},
    "gpt_bigcode": {
        "multi_query": False,
        "n_inner": 96,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt2": {"n_inner": 96, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


# What `pytest -m quick` runs, beside single tests that carry the mark: whole files, by folder. All
# of it takes two minutes of one core. tests/test_quick.py says that every folder has a part.
QUICK = {
    "arena": ["test_tasks"],
    "bench": ["test_benchmark_results"],
    "calibration": ["test_attended"],
    "evaluate": ["test_evaluate"],
    "fitting": ["test_solver"],
    "heads": ["test_heads"],
    "hf": ["test_anatomy", "test_own_windows", "test_refusals"],
    "kernels": ["test_flash_torch", "test_pack", "test_sparse24"],
    "measuring": ["test_compare"],
    "patterns": ["test_dense", "test_interface", "test_patterns", "test_registry"],
    "positions": ["test_position_ids", "test_position_rules"],
    "profiling": ["test_cost", "test_device", "test_timing"],
    "projections": ["test_monarch"],
    "prune": ["test_criteria_rows", "test_one_shot_methods", "test_slicing", "test_sparsegpt"],
    "quant": ["test_formats", "test_quant_state"],
    "recipes": ["test_bounds", "test_flow", "test_outputs", "test_resuming"],
    "reports": ["test_reports"],
    "states": ["test_caches", "test_state_owner", "test_states"],
    "surgery": ["test_checkpoint", "test_swap"],
    "training": ["test_position_collator"],
}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `QUICK` names, and the values of kernels in Triton's interpreter, which `make
    kernels` runs; skips what is marked `gpu` where there is none."""
    without = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.path.stem in QUICK.get(item.path.parent.name, ()):
            item.add_marker("quick")
        elif (
            item.path.parent.name in ("kernels", "patterns")
            and "triton" in f"{item.path.name}::{item.name}"
            and not torch.cuda.is_available()
        ):
            item.add_marker("interpreted")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without)


class Oracle:
    """What retrieval tasks ask of a model, for tests that say themselves what it answers. It
    remembers through its cache, so that a context that comes in pieces is one context."""

    training = False

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(self.vocabulary, 1))

    def eval(self):
        return self

    train = lambda self, mode: self  # noqa: E731

    def __call__(self, input_ids, past_key_values, use_cache):
        past_key_values.append(input_ids)
        whole = torch.cat(past_key_values, dim=1)
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, token in enumerate(self.answers(whole)):
            logits[row, -1, token] = 20.0
        return SimpleNamespace(logits=logits)

    def answers(self, whole: torch.Tensor) -> list[int]:
        """The next token of every row of what has been read, (B, T)."""
        raise NotImplementedError


def tiny(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
    """A random model of transformers' class `kind` (a model_type), eval mode, biases and norm gains
    included.
    """
    config = transformers.AutoConfig.for_model(
        kind, **{**SMALL, **EXTRA.get(kind, {}), **overrides}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # initial biases are zero and gains one, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session", autouse=True)
def fp32():
    """Training and pruning in this process are in fp32, whatever the machine prefers;
    tests/test_precision.py asks for bf16, and commands in processes of their own take what they
    find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effattn.training.lending.bf16_pays", lambda on_cpu=None: False)
        yield


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Random token ids of the tiny models, int64 (2048,)."""
    return torch.randint(
        0, SMALL["vocab_size"], (2048,), generator=torch.Generator().manual_seed(0)
    )
