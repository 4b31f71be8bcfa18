"""A checkpoint of 6 GB, converted by a process that may have 3: slow, and 12 GB of disk (18 where
what is cut is solved again)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

LAYERS, HIDDEN, INNER, VOCABULARY = 60, 256, 65536, 4096
BY = {"heads": "obs", "layers": "block_influence"}
CONVERT = """
import json, resource, sys, torch
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
import effattn
tokens = torch.randint(0, 4096, (2560,), generator=torch.Generator().manual_seed(0))
source, output, function, asked = sys.argv[1:]
convert = effattn.convert_files if function == "convert" else effattn.prune.structured_files
convert(source, output, tokens, **json.loads(asked))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def save_large(folder) -> None:
    """A Llama whose FFNs are cut from one random matrix, which makes it in seconds."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator, index = torch.Generator().manual_seed(0), {}

    def random(rows: int, columns: int) -> torch.Tensor:
        made = torch.randn(rows, columns, generator=generator)
        return (made * columns**-0.5).bfloat16()

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    wide, gains = random(INNER, HIDDEN), torch.ones(HIDDEN).bfloat16()
    for layer in range(LAYERS):
        parts = {f"self_attn.{name}_proj": random(HIDDEN, HIDDEN) for name in "qkvo"}
        parts["mlp.gate_proj"], parts["mlp.up_proj"] = (
            wide.roll(shift * layer + shift, 0) for shift in (1, 7)
        )
        parts["mlp.down_proj"] = (wide.roll(3 * layer, 0).T * (HIDDEN / INNER) ** 0.5).contiguous()
        parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), gains)
        named = {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
        write(layer, {name: part.clone() for name, part in named.items()})
    around = {name: random(VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    around["model.norm"] = gains
    write(LAYERS, {f"{name}.weight": part for name, part in around.items()})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    save_large(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and ru_maxrss as on Linux")
@pytest.mark.parametrize(
    ("function", "asked"),
    [
        ("convert", {"heads": "gqa(kv_heads=2, length=128, batch=2)"}),
        ("convert", {"heads": "latent(ratio=0.5, length=128, batch=2)"}),
        ("convert", {"projections": "lowrank(ratio=0.75)"}),
        ("prune", {"heads": 4, "layers": 50, "criterion": BY, "length": 128}),
        ("prune", {"ffn": 0.5, "criterion": "flap", "compensate": False, "length": 128}),
    ],
    ids=["gqa", "latent", "lowrank", "heads and layers", "ffn"],
)
def test_memory_is_of_layers_not_of_the_model(function, asked, large, tmp_path):
    given = [str(large), str(tmp_path / "out"), function, json.dumps(asked)]
    command = [sys.executable, "-c", CONVERT, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    layer = 2 * (3 * INNER * HIDDEN + 4 * HIDDEN**2)
    limit = 3 * layer + 2 * 2 * VOCABULARY * HIDDEN + 10**9
    assert int(done.stdout.split()[-1]) <= limit
