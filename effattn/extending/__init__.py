"""Longer contexts: what each position rule promises a model, a checkpoint with one, and the rules
side by side.
"""
