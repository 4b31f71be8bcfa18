"""KV-cache and weight quantization. Nothing here yet."""
