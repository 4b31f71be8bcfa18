"""A position rule carries a model past its trained length, without tuning."""

import effattn

model, _ = effattn.embedded.load()  # trained at 512 tokens
text = effattn.embedded.tokens("validation", 4_096)


def perplexities(contexts=(512, 2_048)) -> str:
    return ", ".join(f"{effattn.perplexity(model, text, context=c):.1f} at {c:,}" for c in contexts)


print("as trained:", perplexities())

# YaRN exists in transformers: it is written into the config, and the model stays a plain one.
effattn.swap(model, positions="yarn(factor=4)")
print("YaRN:      ", perplexities())
effattn.restore(model)

# ReRoPE does not: distances beyond the window stop growing, which the attention itself computes.
effattn.swap(model, positions="rerope(window=192)+logn")
print("ReRoPE:    ", perplexities())
effattn.restore(model)
