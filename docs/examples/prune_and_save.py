"""Half of the weights of every layer to zero, packed without them: what it saves."""

import sys
import tempfile
from pathlib import Path

import effattn

output = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
calibration = effattn.embedded.tokens("train", 4_096)
held_out = effattn.embedded.tokens("validation", 2_048)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# Zeros are stored like other weights: as large and as slow as before.
model, _ = effattn.embedded.load()
print(f"dense: perplexity {effattn.perplexity(model, held_out, context=512):.2f}")
effattn.prune.oneshot(model, calibration, method="sparsegpt", sparsity=0.5)
effattn.save(model, output / "half")

# Without them: a bit for each weight, and the weights that are left.
print(effattn.prune.pack(model, format="bitmask"))
effattn.save(model, output / "packed")  # plain transformers refuses it, effattn.load reads it
packed = effattn.load(output / "packed")
print(f"50 %:  perplexity {effattn.perplexity(packed, held_out, context=512):.2f}")

# Two zeros in every four take as many bytes, and lose more.
model, _ = effattn.embedded.load()
effattn.prune.oneshot(model, calibration, sparsity="2:4")
print(effattn.prune.pack(model))
print(f"2:4:   perplexity {effattn.perplexity(model, held_out, context=512):.2f}")
print(f"bytes on disk: {size(output / 'half'):,} as zeros, {size(output / 'packed'):,} packed")
