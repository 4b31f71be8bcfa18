"""Multi-head latent attention in the form that servers know: a plain DeepSeek-V3-class checkpoint.

Positions move into few dimensions that all heads share (`rotary`), the rest of keys and the values
become a latent (`factors`), and both are the weights of transformers' own class (`build`).
`effattn.convert_mla(model, tokens, rank=128, rope_dim=32)` does it.

DeepSeek-V2, arXiv:2405.04434; from trained weights: TransMLA, arXiv:2502.07864."""
