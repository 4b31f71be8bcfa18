"""What a swap does to quality, memory and text: patterns as users write them, the measurements,
and the report of `recipes/swap_backend.py`.
"""
