"""The same model as another class, one that can hold fewer key/value heads.

transformers ignores `num_key_value_heads` in some classes. What they compute is what another class
computes with rearranged weights: a file of `effattn.rehosting.hosts` says for each how. Nothing is
approximated; weights of half precision that two factors meet in are rounded once."""
