"""What a model costs to run, measured: time and memory of prefill and decoding, several variants
side by side.
"""
