"""Under which names a swap is found in a model: attributes, submodules and arguments of a call."""

# the attention implementation, in transformers' two tables
NAME = "effattn"
# `quantization_config` in config.json: transformers asks `effattn.plugin` to restore the rest
METHOD = {"quant_method": NAME}
# where transformers keeps, on a config, what differs by layer
DIFFER = "_heterogeneity_spec"
# where a swap is kept: a plain attribute, in no state_dict, copied by deepcopy
ATTRIBUTE = "_effattn"
# where the handle of the hook is kept
HANDLE = "_effattn_hook"
# the submodule that holds a backend's parameters and buffers
PATTERN = "effattn_pattern"
# the submodule that holds what a position rule learns
POSITIONS = "effattn_positions"
# the submodule with the second projections, and the argument that carries their q, k, v
GLOBAL = "effattn_global"
# the argument that tells our attention function to hand out q, k and v, and stop there
CAPTURE = "effattn_capture"
# the submodule of latent keys and values, and the argument that carries a call's latents
LATENT = "effattn_latent"
LEARNED_PARTS = {PATTERN, POSITIONS, GLOBAL}
