"""What a model costs to run, measured: time and memory of prefill and decoding, several variants
side by side.
"""

# What is measured where nobody asks for anything else: tokens of the prompt, sequences at once,
# decode steps at most, and seconds for the prefills, and the steps, of a context.
CONTEXTS, BATCHES, STEPS, SECONDS = (1024, 4096, 16384), (1,), 32, 5.0
