"""The model that comes out: transformers' DeepSeek-V3 class with a dense FFN in every layer.

Its cache holds the latent and the shared keys, r + rope_dim numbers a token. The latent goes
through an RMS norm (`kv_a_layernorm`), which is not linear. One of its numbers is therefore a
constant, the bias of `kv_a_proj_with_mqa`, beside which the others are small: what the norm divides
by is then the same for every token, to `SMALL` squared, and its weights undo it. The constant
carries the biases of keys and values as well.

r: numbers of a latent; P: pairs that turn; d: size of a head; H, K: query and key/value heads; D1:
hidden size + 1, the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from effattn.errors import Unsupported
from effattn.heads.latent.spectrum import Factors
from effattn.heads.mla.rotary import Shared
from effattn.hf.anatomy import Anatomy, Layer
from effattn.hf.positions import LENGTH_DEPENDENT
from effattn.positions.rope import Rope

# Architectures whose layers are DeepSeek's but for the attention.
CLASSES = ("llama", "mistral")
CONSTANT = 8.0
# Size of the other numbers beside the constant, by bytes of a number: its square is what remains of
# the norm's effect, and a number in half precision must not vanish.
SMALL = {8: 1e-5, 4: 1e-4, 2: 1e-3}


def check(parts: Anatomy) -> None:
    """Unsupported, naming the reason, for a model that the class cannot hold."""
    config, kind = parts.config, type(parts.model).__name__
    where = f"{kind} cannot become a DeepSeek-V3-class checkpoint"
    if config.model_type not in CLASSES:
        raise Unsupported(
            f"{where}: its model_type is {config.model_type!r}, valid are "
            f"{' and '.join(map(repr, CLASSES))}; latent(...) takes more classes"
        )
    if getattr(config, "mlp_bias", False):
        raise Unsupported(f"{where}: mlp_bias=True, and the class has no biases in its FFN")
    for layer in parts:
        here = f"{where}: layer {layer.index}"
        if layer.latent is not None:
            raise Unsupported(f"{here} has latents already; valid is its parent")
        if layer.window is not None:
            raise Unsupported(f"{here} has a window of {layer.window} tokens")
        if layer.q.bias is not None and layer.q.module.bias.any():
            raise Unsupported(f"{here} has a bias in its queries, and the class has none")
        if layer.rotary is None or layer.rotary_dims != layer.head_dim:
            raise Unsupported(f"{here} turns {layer.rotary_dims} of {layer.head_dim} dimensions")
        if layer.rotary.kind in LENGTH_DEPENDENT:
            raise Unsupported(f"{here}: its rotary rule {layer.rotary.kind!r} follows the length")


def empty(parts: Anatomy, rank: int, rope_dim: int, inv_freq: Tensor) -> DeepseekV3ForCausalLM:
    """The model with everything but its attention, which is yet to be written. inv_freq (P,)."""
    old, one = parts.config, parts.layers[0]
    config = DeepseekV3Config(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        first_k_dense_replace=old.num_hidden_layers,
        num_attention_heads=one.heads,
        num_key_value_heads=one.heads,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dim,
        qk_nope_head_dim=one.head_dim,
        v_head_dim=one.head_dim,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        rope_parameters=_rope_parameters(parts, rope_dim, inv_freq),
        rope_interleave=True,
        attention_bias=True,
        num_mtp_layers=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(one.dtype)
    try:
        model = DeepseekV3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    kept = {
        name: tensor
        for name, tensor in parts.model.state_dict().items()
        if ".self_attn." not in name
    }
    found = model.load_state_dict(kept, strict=False)
    missing = [name for name in found.missing_keys if ".self_attn." not in name]
    if missing or found.unexpected_keys:
        names = ", ".join([*missing, *found.unexpected_keys][:3])
        raise Unsupported(f"{type(parts.model).__name__}: DeepSeek's class lacks or misses {names}")
    model.config.dtype = one.dtype
    model.generation_config = parts.model.generation_config
    return model.to(one.k.like.device).eval()


def _rope_parameters(parts: Anatomy, rope_dim: int, inv_freq: Tensor) -> dict:
    """Plain RoPE where its frequencies are those that are asked for; otherwise factors of it."""
    base = float(parts.config.rope_parameters["rope_theta"])
    plain = base ** -(torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    factors = plain / inv_freq.double().cpu()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return {"rope_type": "default", "rope_theta": base}
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": parts.config.max_position_embeddings,
    }


@dataclass(frozen=True)
class Attention:
    """What an attention module is made of: keys that turn, and the latent of the rest."""

    shared: Shared
    factors: Factors
    rope: Rope


@torch.no_grad()
def write(module: nn.Module, layer: Layer, made: Attention, moment: Tensor) -> float:
    """Writes a layer's attention into the new module, whose output projection is the old one.

    moment (D1, D1): E[(x, 1)(x, 1)^T] of the inputs. Returns by what share its norm scales a
    token's latent otherwise than it should, in the mean."""
    shared, factors = made.shared, made.factors
    rank, pairs = module.kv_lora_rank, len(shared.inv_freq)
    small = SMALL[layer.dtype.itemsize] * CONSTANT
    # numbers of mean square 1 so far, r - 1 of them
    shrink = small / max(1, len(factors.down)) ** 0.5
    down = factors.down.new_zeros(rank, factors.down.shape[1])
    down[: len(factors.down)] = factors.down * shrink
    turned = _interleaved(shared.key)
    bias = torch.cat([down.new_zeros(rank), turned[:, -1]])
    bias[rank - 1] = CONSTANT
    _put(module.kv_a_proj_with_mqa.weight, torch.cat([down, turned[:, :-1]]))
    _put(module.kv_a_proj_with_mqa.bias, bias)

    norm = module.kv_a_layernorm
    divided = (CONSTANT**2 / rank + norm.variance_epsilon) ** 0.5
    norm.weight.fill_(divided)  # the latent is what it was
    up = torch.stack([factors.key, factors.value]) / shrink  # (2, K, d, r - 1)
    biases = torch.stack([factors.key_bias, factors.value_bias]) / CONSTANT
    both = up.new_zeros(*up.shape[:3], rank)
    both[..., : up.shape[3]], both[..., -1] = up, biases
    both = both.transpose(0, 1).flatten(1, 2)  # of each K/V head: its key, its value
    group = layer.heads // layer.kv_heads
    _put(module.kv_b_proj.weight, both.repeat_interleave(group, dim=0).flatten(0, 1))

    _put(module.q_proj.weight, _queries(module, layer, made, pairs))
    _put(module.o_proj.weight, layer.o.module.weight)
    module.o_proj.bias.zero_()
    if layer.o.bias is not None:
        _put(module.o_proj.bias, layer.o.bias)
    size = torch.einsum("ri,ij,rj->", down, moment[:-1, :-1].to(down), down)
    return float(size / (2 * rank * divided**2))


def _queries(module: nn.Module, layer: Layer, made: Attention, pairs: int) -> Tensor:
    """(H (d + 2 P), D): each head's query for what has no position, and for the shared keys."""
    shared = made.shared
    rows = layer.q.with_bias.to(shared.rest)[..., :-1].unflatten(0, (layer.kv_heads, -1))
    real, imaginary = layer.rotary_pairs()
    q = torch.complex(rows[:, :, real], rows[:, :, imaginary])  # (K, G, F, D)
    still = q * shared.mean[:, None]
    unturned = torch.zeros_like(rows)
    unturned[:, :, real], unturned[:, :, imaginary] = still.real, still.imag
    turning = torch.einsum("kfp,kgfD->kgpD", shared.query, q)
    turning = _interleaved(turning.flatten(0, 1)) * made.rope.attention_scaling**2
    whole = torch.cat([unturned.flatten(0, 1), turning.view(layer.heads, 2 * pairs, -1)], dim=1)
    own = float(getattr(layer.attention, "scaling", None) or layer.head_dim**-0.5)
    return (whole * (own / module.scaling)).flatten(0, 1)


def _interleaved(rows: Tensor) -> Tensor:
    """Complex (..., P, n) as real (..., 2 P, n): a pair's dimensions beside each other."""
    return torch.view_as_real(rows).movedim(-1, -2).flatten(-3, -2)


def _put(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter))
