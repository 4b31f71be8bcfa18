"""How much memory pruning from file to file takes: a large checkpoint of random weights, and the
recipe on it.

    # in a temporary folder; prints the peak
    python -m bench.pruning_memory --gigabytes 2

The checkpoint is written layer by layer, too, so that this process stays as small as the one it
measures."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

WIDTH, FFN, HEADS, KV_HEADS = 2048, 5504, 16, 8  # a layer of 93 MB in bf16


def random_checkpoint(folder: Path, layers: int, seed: int = 0) -> int:
    """Writes a Llama of random bf16 weights with the embedded model's tokenizer, a shard a layer;
    returns its bytes.
    """
    from transformers import LlamaConfig

    from effattn import embedded

    tokenizer = embedded.tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(seed)
    head = WIDTH // HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KV_HEADS * head, WIDTH),
        "self_attn.v_proj": (KV_HEADS * head, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (FFN, WIDTH),
        "mlp.up_proj": (FFN, WIDTH),
        "mlp.down_proj": (WIDTH, FFN),
    }
    weight_map, total = {}, 0

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for index in range(layers):
        prefix = f"model.layers.{index}."
        tensors = {
            f"{prefix}{name}.weight": (
                torch.randn(shape, generator=draw) / shape[1] ** 0.5
            ).bfloat16()
            for name, shape in shapes.items()
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        write(
            index + 1,
            tensors | {f"{prefix}{name}.weight": torch.ones(WIDTH).bfloat16() for name in norms},
        )
    embeddings = torch.randn(len(tokenizer), WIDTH, generator=draw).bfloat16()
    write(
        layers + 1,
        {
            "model.embed_tokens.weight": embeddings,
            "model.norm.weight": torch.ones(WIDTH).bfloat16(),
        },
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main(
    gigabytes: Annotated[float, typer.Option(help="size of the checkpoint")] = 2.0,
    calibration_tokens: Annotated[int, typer.Option(help="to take Hessians of")] = 1024,
    length: Annotated[int, typer.Option(help="window length in tokens")] = 256,
    folder: Annotated[
        Path | None, typer.Option(help="where to work (default: a temporary folder)")
    ] = None,
) -> None:
    """Write a random checkpoint, prune it in a process of its own, print seconds and the most
    memory as JSON.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, output = Path(scratch) / "source", Path(scratch) / "pruned"
        source.mkdir()
        layers = max(1, round(gigabytes * 1e9 / (2 * (3 * WIDTH * FFN + 3 * WIDTH * WIDTH))))
        total = random_checkpoint(source, layers)
        command = [
            sys.executable,
            "-m",
            "effattn.recipes.cli",
            "prune",
            "oneshot",
            "--model",
            source,
            "--output",
            output,
            "--measure",
            "no",
            "--calibration-tokens",
            calibration_tokens,
            "--length",
            length,
        ]
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(done.returncode)
        report = json.loads((output / "report.json").read_text())
        print(
            json.dumps(
                {
                    "bytes": total,
                    "layers": layers,
                    "seconds": time.perf_counter() - start,
                    "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
                    "seconds_in_layers": sum(layer["seconds"] for layer in report["layers"]),
                    "sparsity": sum(one["zeros"] for one in report["layers"])
                    / sum(one["weights"] for one in report["layers"]),
                    "verification": report["verification"],
                    "threads": torch.get_num_threads(),
                }
            )
        )


if __name__ == "__main__":
    typer.run(main)
