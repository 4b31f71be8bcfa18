"""Heads that keep half of the tokens after a prompt: what the rest of the text loses, and what is
found again."""

from __future__ import annotations

from bench.real.steps import Place, Step, Subject, Target

ORDER = 2
TOKENS = 4096  # of the text that is read, the last eighth of which is scored
DEPTHS = (0.1, 0.5, 0.9)
HALF = "keep=0.5, every=None"
SPECS = {
    "snapkv": f"evict(policy='snapkv', {HALF})",
    "snapkv, adaptive": f"evict(policy='snapkv', adaptive=True, {HALF})",
    "snapkv, int8": f"evict(policy='snapkv', format='int8', {HALF})",
    "expected": f"evict(policy='expected', {HALF})",
    "norm": f"evict(policy='norm', {HALF})",
    "streaming": f"evict(policy='streaming', {HALF})",
}


def asked(place: Place, spec: str, tokens: int, trials: int) -> dict:
    """The same tokens after the same prompt with the full cache and with `spec`, a few at a time,
    so that none go; and pass keys in prompts of `tokens`."""
    import torch

    from effattn.evaluate import passkey
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import swap
    from effattn.textdata import measured_on

    model, tokenizer = load_model(place.model)
    text, _ = measured_on(tokenizer, tokens, text=[place.held_out])
    prompt = tokens - tokens // 8
    losses, held, found = {}, {}, {}
    for cache in ("full", spec):
        swap(model, "dense", cache=cache)
        losses[cache], held[cache] = losses_after(model, text[None], prompt)
        rows = passkey(model, tokenizer, length=tokens, depths=DEPTHS, trials=trials)["rows"]
        found[cache] = sum(row["exact"] for row in rows) / len(rows)
    apart = losses[spec] - losses["full"]
    return {
        "tokens": len(apart),
        "prompt": prompt,
        "before": float(losses["full"].mean()),
        "more": float(torch.expm1(apart.mean())),
        "standard_error": float(apart.std() / len(apart) ** 0.5),
        "bytes": held[spec] / held["full"],
        "passkey": found[spec],
        "passkey_before": found["full"],
    }


def losses_after(model, tokens, prompt: int):
    """(cross-entropies of the tokens (1, T) after the first `prompt`, bytes of the cache after
    these)."""
    import torch

    from effattn.evaluate.streaming import cache_bytes
    from effattn.hf.cache import new_cache

    cache, losses = new_cache(model), []
    with torch.inference_mode():
        model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1)
        held = cache_bytes(cache)
        for low in range(prompt, tokens.shape[1] - 1, 16):
            some = tokens[:, low : min(low + 16, tokens.shape[1] - 1)]
            logits = model(some, past_key_values=cache).logits[0].float()
            wanted = tokens[0, low + 1 : low + 1 + some.shape[1]]
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses), held


def step(name: str) -> Step:
    """A policy, at half of the bytes."""
    return Step(name, asked, {"spec": SPECS[name], "tokens": TOKENS, "trials": 1})


def least(steps: dict[str, dict]) -> float | None:
    """The perplexity that the better of two policies adds."""
    found = [steps[name]["more"] for name in ("snapkv", "expected") if name in steps]
    return min(found, default=None)


SUBJECT = Subject(
    "Heads that keep half of the tokens",
    [step(name) for name in SPECS],
    {
        "bytes": lambda found: f"{found['bytes']:.1%}",
        "perplexity": lambda found: f"{found['more']:+.2%} ± {found['standard_error']:.2%}",
        "pass keys found (full cache)": lambda found: (
            f"{found['passkey']:.0%} ({found['passkey_before']:.0%})"
        ),
    },
    [Target("`evict`, half of the bytes: perplexity above the full cache's", 0.02, least)],
    note="The question comes after tokens have gone, one token at a time: a policy does not know "
    "it when it chooses.",
)
