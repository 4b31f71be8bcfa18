"""The job behind `recipes/swap_backend.py` and `effattn swap`: what a swap does to quality, memory
and text.
"""
