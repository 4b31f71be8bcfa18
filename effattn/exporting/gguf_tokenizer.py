"""A tokenizer in a GGUF file: tokens, kinds, merges, and by which rule text is split before them.

llama.cpp knows the rules by name and has their expressions in its code; here the name follows from
what tokenizer.json says, and another rule is refused: a file with a wrong one loads, and reads text
as other tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from effattn.errors import Unsupported

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the expression that splits text -> llama.cpp's name of it
SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. rule: the name of how text is split. merges: pairs,
    "a b". special: the ids of tokens with a role ("bos", "eos", ...)."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str
    special: dict[str, int]
    begins: bool
    template: str | None


def of(tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model with `size` rows in its embedding. Unsupported,
    saying what it is, for one that llama.cpp would read differently."""
    found = _described(tokenizer)
    model = found["model"]
    tokens: list[str | None] = [None] * size
    kinds = [UNUSED] * size
    for token, index in model["vocab"].items():
        _put(tokens, index, token, size)
        kinds[index] = NORMAL
    for one in found.get("added_tokens", ()):
        _put(tokens, one["id"], one["content"], size)
        kinds[one["id"]] = CONTROL if one["special"] else USER
    named = [f"[PAD{index}]" if one is None else one for index, one in enumerate(tokens)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    special = {
        name: index
        for name in ("bos", "eos", "unk", "pad")
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    ids = tokenizer("a").input_ids
    begins = bool(ids) and ids[0] == special.get("bos")
    rule = rule_of(found.get("pre_tokenizer"))
    return Vocabulary(named, kinds, merges, rule, special, begins, tokenizer.chat_template)


def _described(tokenizer) -> dict[str, Any]:
    """What tokenizer.json holds. Unsupported unless it is a byte-level BPE."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__
    if fast is None:
        raise Unsupported(f"gguf: {kind} has no tokenizer.json; valid is a byte-level BPE")
    found = json.loads(fast.to_str())
    model = found["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        what = "a SentencePiece BPE" if model.get("byte_fallback") else f"a {model['type']}"
        raise Unsupported(f"gguf: {kind} is {what}, valid is a byte-level BPE (GPT-2's kind)")
    if found.get("normalizer") not in (None, {"type": "NFC"}):
        raise Unsupported(
            f"gguf: {kind} rewrites text ({found['normalizer']['type']}), which llama.cpp would not"
        )
    return found


def _put(tokens: list[str | None], index: int, token: str, size: int) -> None:
    if not 0 <= index < size:
        raise Unsupported(
            f"gguf: token {token!r} has number {index:,}, the model's embedding has {size:,} rows"
        )
    tokens[index] = token


def rule_of(split: dict | None) -> str:
    """llama.cpp's name of a rule that splits text, from tokenizer.json's `pre_tokenizer`."""
    steps = (split or {}).get("pretokenizers", [split])
    kinds = [one["type"] for one in steps if one]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        expression = steps[0]["pattern"].get("Regex")
        if expression in SPLITS:
            return SPLITS[expression]
    raise Unsupported(
        f"gguf: text is split by {' and '.join(kinds) or 'nothing'} in a way that effattn has no "
        "name of llama.cpp's for; valid are those of GPT-2, SmolLM, Llama 3 and Qwen 2"
    )
