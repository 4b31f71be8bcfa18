"""Proof that a saved checkpoint needs nothing of effattn: a fresh process loads it with plain
transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from effattn.hf.placement import input_device

# By bytes a weight, as a share of the largest logit: two processes may pick different matrix
# kernels.
TOLERANCE = {8: 1e-10, 4: 1e-4, 2: 2e-2}
# Runs isolated (-I), with effattn made unimportable before anything else.
_SCRIPT = """
import sys
sys.modules["effattn"] = None
import json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, given, answer, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().to(device)
ids = load_file(given)["ids"].to(device)
with torch.no_grad():
    out = model(input_ids=ids, use_cache=True)
keys = [layer.keys for layer in out.past_key_values.layers]
save_file({"logits": out.logits.float().cpu().contiguous()}, answer)
print(json.dumps({"class": type(model).__name__, "cache_shape": list(keys[0].shape),
                  "kv_heads": sorted({k.shape[1] for k in keys})}))
"""


@torch.no_grad()
def verify_plain(folder: Path, model, tokens: torch.Tensor) -> dict:
    """Loads `folder` in a fresh process where effattn cannot be imported and compares with `model`
    on tokens (T,).

    Returns {"fresh_process", "class", "max_logit_difference", "cache_shape", "kv_heads_in_cache"}.
    Raises RuntimeError when it does not load, when logits differ, or when the cache has other KV
    heads than the config."""
    ids = tokens[None]
    device = input_device(model)
    expected = model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    # a process of its own: what this one has imported and patched proves nothing
    with tempfile.TemporaryDirectory() as scratch:
        given, answer = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.contiguous()}, given)
        command = [
            sys.executable,
            "-I",
            "-c",
            _SCRIPT,
            str(folder),
            str(given),
            str(answer),
            str(device),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"plain transformers cannot load {folder}: {done.stderr.strip().splitlines()[-1]}"
            )
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        found = load_file(answer)["logits"]
    difference = float((found - expected).abs().max())
    limit = TOLERANCE[model.dtype.itemsize] * float(expected.abs().max())
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # one latent for all heads
        kv_heads = 1
    if not difference <= limit:
        raise RuntimeError(
            f"the saved checkpoint gives other logits: largest difference {difference:.3g} > "
            f"{limit:.3g}"
        )
    if facts["kv_heads"] != [kv_heads]:
        raise RuntimeError(
            f"the saved checkpoint caches {facts['kv_heads']} KV heads, its config says {kv_heads}"
        )
    return {
        "fresh_process": True,
        "class": facts["class"],
        "max_logit_difference": difference,
        "cache_shape": facts["cache_shape"],
        "kv_heads_in_cache": kv_heads,
    }
