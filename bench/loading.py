"""What `from_pretrained` after `import effattn` costs beside the plain class: time and memory.

    python -m bench.loading --output results/cpu-NAME/loading.json

A random Llama is saved as it is, and in the forms that effattn restores. Each is loaded in a fresh
process, all side by side, several times, and every page of its weights is read; a small checkpoint
of the same form is loaded before the clock starts, so that imports are a number of their own. Time
is the process's CPU time, which other processes change least. Memory is the most that the process
had resident beyond what it had before; pages of the mapped file count in both."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import effattn
from effattn import embedded
from effattn.profiling.environment import environment
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model
from effattn.reports.files import write_all_atomic

LIMIT = 0.10  # more time than the plain class, at most, for weights that are plain
SIZES = {  # hidden, FFN, layers
    "large": (1024, 2816, 4),
    "small": (64, 96, 2),
}
# argv: folder, a small one of the same form, "plain" or "effattn"
CHILD = """
import json, sys, time
folder, small, how = sys.argv[1:]
if how == "plain":
    sys.modules["effattn"] = None
import torch, transformers
from transformers import AutoModelForCausalLM
begin = time.process_time()
if how == "effattn":
    import effattn
AutoModelForCausalLM.from_pretrained(small, local_files_only=True)
first = time.process_time() - begin

def resident(name):
    said = open("/proc/self/status").read().split(name + ":")[1]
    return int(said.split()[0]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, begin = resident("VmRSS"), time.process_time()
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
for one in tensors.values():  # files are mapped: every page is read here, or not at all
    one.detach().contiguous().view(-1).view(torch.uint8)[::4096].sum()
seconds = time.process_time() - begin
weights = {name: one.nbytes for name, one in tensors.items()}
print(json.dumps({"seconds": seconds, "first_small": first,
                  "peak": resident("VmHWM") - before, "weights": sum(weights.values())}))
"""


def llama(size: str) -> nn.Module:
    """A random model in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3072,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def windows(model: nn.Module) -> nn.Module:
    """Plain weights, and a pattern that is put on."""
    return effattn.swap(model, "sliding(window=64, sinks=4)", cache="int8")


def uneven(model: nn.Module) -> nn.Module:
    """Layers that differ."""
    layers = model.config.num_hidden_layers
    ffn = model.config.intermediate_size
    keep = Keep(
        heads=[torch.arange(4 - index % 2) for index in range(layers)],
        ffn=[torch.arange(ffn // (1 + index % 2)) for index in range(layers)],
    )
    return slice_model(model, keep, uniform=False)


def packed(model: nn.Module) -> nn.Module:
    """2:4, in its packed bytes."""
    text = torch.arange(3000)
    effattn.prune.oneshot(model, text, method="magnitude", sparsity="2:4")
    effattn.prune.pack(model, format="2:4")
    return model


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "pattern and cache": windows,
    "layers that differ": uneven,
    "packed 2:4": packed,
}


def load(folder: Path, small: Path, how: str) -> dict[str, float]:
    """One load, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), str(small), how]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{folder} was not loaded: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(found: list[dict[str, float]]) -> dict[str, float]:
    """Of several loads, number by number."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def measure(scratch: Path, repeats: int) -> dict:
    """All forms beside the plain class on the plain checkpoint."""
    folders = {}
    for form, change in FORMS.items():
        for size in SIZES:
            folder = scratch / size / form.replace(" ", "-").replace(":", "")
            effattn.save(change(llama(size)), folder, embedded.tokenizer())
            folders[form, size] = folder
    asked = {"the plain class": ("plain", "plain")} | {form: (form, "effattn") for form in FORMS}
    found: dict[str, list] = {name: [] for name in asked}
    with ThreadPoolExecutor() as side_by_side:  # what else the machine does, it does to all
        for _ in range(repeats):
            loads = {
                name: side_by_side.submit(load, folders[form, "large"], folders[form, "small"], how)
                for name, (form, how) in asked.items()
            }
            for name, one in loads.items():
                found[name].append(one.result())
    rows = {name: median(loads) for name, loads in found.items()}
    plain = rows["the plain class"]
    for row in rows.values():
        row["time_beside_plain"] = row["seconds"] / plain["seconds"] - 1
        row["peak_beside_weights"] = row["peak"] / row["weights"]
    return {
        "kind": "loading",
        "repeats": repeats,
        "limit": LIMIT,
        "rows": rows,
        "environment": environment(),
    }


def main() -> None:
    """Measures, prints a line a form, and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/loading.json"))
    parser.add_argument("--repeats", type=int, default=5)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), settings.repeats)
    for name, row in found["rows"].items():
        print(
            f"{name:20} {row['seconds']:6.2f} s ({row['time_beside_plain']:+.0%}), peak "
            f"{row['peak_beside_weights']:.2f} times {row['weights'] / 2**20:.0f} MiB; first, "
            f"with imports, {row['first_small']:.2f} s"
        )
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_all_atomic(
        settings.output.parent, {settings.output.name: json.dumps(found, indent=1) + "\n"}
    )


if __name__ == "__main__":
    main()
