"""Weights one by one, or N of every M: magnitude, Wanda, SparseGPT."""
