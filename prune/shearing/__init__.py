"""Sheared LLaMA: learned masks, then a smaller model that trains on."""
