"""A trained multi-head model becomes a grouped-query one, and plain transformers loads it."""

import sys
import tempfile

from transformers import AutoModelForCausalLM

import effattn

output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

model, tokenizer = effattn.embedded.load()  # any AutoModelForCausalLM works the same
calibration = effattn.embedded.tokens("train", 10_000)  # int64 (N,): text to stay good at
held_out = effattn.embedded.tokens("validation", 4_096)

before = effattn.perplexity(model, held_out, context=512)
report = effattn.convert_gqa(model, kv_heads=2, calibration=calibration)  # in place
after = effattn.perplexity(model, held_out, context=512)
print(f"8 -> 2 KV heads, no training: perplexity {before:.2f} -> {after:.2f}")
print(
    "relative error of each layer's attention:",
    [f"{layer['attention_error']:.3f}" for layer in report.layers],
)

# What is saved is a checkpoint of the same class, with another `num_key_value_heads`.
effattn.save(model, output)
tokenizer.save_pretrained(output)
plain = AutoModelForCausalLM.from_pretrained(output)
print(type(plain).__name__, "with", plain.config.num_key_value_heads, "KV heads")
