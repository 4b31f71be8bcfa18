"""Weights that came packed, or were unpacked by the loader, and stay as they are: in the model, its
copies and files.

4-bit weights of bitsandbytes: on processors with AVX512-bf16 units its modules rearrange their
weight at the first call in eval mode and round its scales to bf16. `state_dict()` turns that back,
but leaves the scales transposed: the model and what is saved of it are wrong from then on. The
rearrangement is switched off, module by module, for every model that passes through here; what has
been done already is turned back as it should be, in a model or a checkpoint.

Conversions: transformers remembers how it converted a checkpoint's tensors, and does the opposite
when it saves. It would write fp8 codes where it had made plain numbers of them, without a word in
config.json, and has no opposite for bitsandbytes' weights, whose state_dict() is what a file holds
anyway. These conversions are forgotten."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from effattn.errors import Unsupported

# bitsandbytes' attribute of a module that may rearrange its weight
SWITCH = "support_avx512bf16_for_cpu"
CONVERSIONS = "_weight_conversions"  # where transformers keeps how a model was loaded


def format_of(config) -> str | None:
    """The name of the packed format that a checkpoint's config says its weights are in ("fp8",
    "gptq", "bitsandbytes"); None for plain numbers."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    if found is None:
        return None
    kind = found.get("quant_method")
    return str(getattr(kind, "value", kind) or "bitsandbytes")


def check_format(config, path: str | Path) -> None:
    """Unsupported for a format that transformers does not know: it would take the codes for plain
    numbers.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    kind = format_of(config)
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    if kind is not None and kind not in known | set(AUTO_QUANTIZER_MAPPING):
        near = difflib.get_close_matches(kind, known, n=1)
        raise Unsupported(
            f"model: {str(path)!r}: config.json: quantization_config: quant_method: got {kind!r}"
            f"{f' (did you mean {near[0]!r}?)' if near else ''}, valid are "
            f"{', '.join(sorted(known))}"
        )


def require_plain_files(config, path: str | Path, what: str) -> None:
    """Unsupported for a checkpoint whose files hold codes. what: that reads them as numbers."""
    kind = format_of(config)
    if kind is not None:
        raise Unsupported(
            f"model: {str(path)!r}: its weights are stored as {kind!r}, and {what} reads plain "
            "numbers; valid is a checkpoint without quantization_config, such as "
            "effattn.save(effattn.load(...), ...) makes where the weights are unpacked as they "
            "are loaded"
        )


def steady(model: nn.Module) -> nn.Module:
    """Keeps every weight of `model` in the form in which it is stored now. Returns the model."""
    for module in model.modules():
        if hasattr(module, SWITCH):
            setattr(module, SWITCH, False)
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                _codes_back(module.weight, state)
            # the scales, which were transposed to (blocks of a row, rows) and rounded to bf16
            if state is not None and state.absmax.dim() == 2:
                state.absmax = state.absmax.T.reshape(-1).float()
    if conversions := getattr(model, CONVERSIONS, None):
        packed = getattr(model, "hf_quantizer", None) is not None
        kept = (_of_the_model(one, packed) for one in conversions)
        setattr(model, CONVERSIONS, [one for one in kept if one is not None])
    return model


@contextmanager
def leaving_out(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While open, `save_pretrained` writes no weight of these names: of a packed model it asks the
    quantizer what to write, whatever `state_dict` it is given."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    asked = quantizer.get_state_dict_and_metadata

    def answer(model):
        state, metadata = asked(model)
        state = model.state_dict() if state is None else state
        return {name: tensor for name, tensor in state.items() if name not in names}, metadata

    quantizer.get_state_dict_and_metadata = answer
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


def _codes_back(weight: nn.Parameter, state) -> None:
    """The codes in their order. Scales that were quantized themselves were replaced by values, and
    stay values.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False
    weight.data, _ = _convert_weight_packed_for_cpu_inverse(weight.data, state)


def _of_the_model(conversion, packed: bool):
    """A conversion without what a quantizer did in it; None where that was all. packed: the weights
    still are, and what has an opposite belongs to their format."""
    operations = getattr(conversion, "operations", [])
    made = [
        one
        for one in operations
        if getattr(one, "hf_quantizer", None) and not (packed and _has_opposite(one))
    ]
    if not made:
        return conversion
    rest = [one for one in operations if one not in made]
    if not rest:
        return None
    scales = {
        name for names in made[0].hf_quantizer.serialized_names.values() for name in names[1:]
    }
    sources = conversion._original_source_patterns
    plain = [source for source in sources if source.rpartition(".")[2] not in scales]
    return conversion.copy(plain, conversion._original_target_patterns, operations=rest)


def _has_opposite(operation) -> bool:
    try:
        return operation.reverse_op is not None
    except NotImplementedError:
        return False
