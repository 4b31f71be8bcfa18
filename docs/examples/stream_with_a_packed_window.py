"""A window with sinks and an int4 cache inside plain generate(): memory that does not grow."""

import torch

import effattn

model, tokenizer = effattn.embedded.load()  # trained at 512 tokens
prompt = effattn.embedded.tokens("validation", 1_200)[None]  # (1, T): longer than that already

# Keys and values of the newest 256 tokens, and of the first 4, in four bits. The newest 32 stay in
# full precision: so small a residual only so that a small window packs something.
effattn.swap(model, "sliding", window=256, sinks=4, cache="int4(group=32, residual=32)")
for layer in effattn.describe(model).layers:
    print(layer["pattern"], "|", layer["cache"], "|", layer["kv_bytes_per_token"], "bytes a token")

cache = effattn.new_cache(model)  # generate() makes one by itself; here we want to look at it
with torch.no_grad():
    model.generate(prompt, max_new_tokens=60, do_sample=False, past_key_values=cache)
held = sum(layer.nbytes for layer in cache.layers)
print(f"{cache.get_seq_length():,} tokens read, {held:,} bytes held")

effattn.restore(model)  # the same bits as before the swap
