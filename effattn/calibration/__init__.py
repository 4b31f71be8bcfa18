"""What calibrated methods share: the walk over layers, second moments, re-fits."""
