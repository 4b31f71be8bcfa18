"""What a model costs to run, and what a window or a packed cache changes."""

import sys
import tempfile
from pathlib import Path

import effattn

output = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

model, _ = effattn.embedded.load()
report = effattn.measure(
    model,
    {"window": "sliding(window=256)", "int8": "cache=int8"},  # beside the model as it is
    contexts=[512, 1_536],
    seconds=0.2,  # about so long for the prefills, and for the steps, of each context
)
print(report.headline)
for row in report.rows:
    step, held = row["decode"]["ms_p50"], row["kv_bytes_held"]
    print(f"{row['variant']:7} {row['context']:5} tokens: {step:5.2f} ms a step, {held:,} KV bytes")
report.to_html(output / "measure.html")  # one file that opens anywhere
