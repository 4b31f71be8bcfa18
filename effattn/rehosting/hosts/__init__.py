"""What a model type becomes: one file each, found by itself."""
