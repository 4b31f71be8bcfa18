"""Whole heads, FFN dimensions and layers, removed for good."""
