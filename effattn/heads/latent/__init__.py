"""Latent keys and values: of each token, r numbers are remembered, and both come of them.

`spectrum` finds the best of every rank, `ranks` chooses one for each layer, `converting` walks
through the model. `effattn.swap(model, heads="latent(ratio=0.5)", calibration=tokens)` does it.

The form: DeepSeek-V2, arXiv:2405.04434. From trained weights by SVD: PALU, arXiv:2407.21118."""
