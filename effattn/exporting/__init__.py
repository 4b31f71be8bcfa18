"""Checkpoints for other engines: `effattn.export`."""
