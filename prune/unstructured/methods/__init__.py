"""One-shot methods, a file each."""
