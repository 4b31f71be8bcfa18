"""Pruning of heads, FFN and weights. Nothing here yet."""
