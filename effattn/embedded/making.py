"""What the embedded model is made of: a BPE tokenizer, and the shape of a small multi-head Llama.
`recipes/pretrain_embedded.py` trains it."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from effattn.embedded import corpus

END = "<|endoftext|>"
VARIANTS = ("dense", "logn", "hwfa")


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` entries, trained on the training files only."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _, text in corpus.documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def config(tokenizer, hidden: int, layers: int, length: int) -> LlamaConfig:
    """Full multi-head attention: 8 heads and 8 KV heads, FFN 11/4 of the hidden size, tied
    embeddings.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def window_of(layers: int, length: int) -> int:
    """The window of `hwfa`: what all layers but the last reach together is three quarters of the
    training length, (w - 1)(layers - 1) + 1 = 3/4 length. A window of the whole length is none."""
    return max(2, (3 * length // 4 - 1) // (layers - 1) + 1)


def axes_of(variant: str, layers: int, length: int, window: int | None = None) -> dict:
    """What `effattn.swap` takes for one of `VARIANTS` of a model of so many layers, trained at
    `length` tokens, before it is trained. Nothing for "dense".

    "logn": queries times log n / log T (https://kexue.fm/archives/8823). "hwfa", hybrid
    window-full attention (https://kexue.fm/archives/9603): windows in all layers but the last,
    which sees everything, without positions and with log n."""
    scaled = "logn(trained=True)"
    if variant == "logn":
        return {"positions": scaled}
    if variant == "hwfa":
        last, size = layers - 1, window or window_of(layers, length)
        return {
            "pattern": {f"0-{last - 1}": f"sliding(window={size})"},
            "positions": {str(last): f"nope+{scaled}"},
        }
    return {}
