"""Building the model of a checkpoint: the class that was saved, and every weight of it from the
files, or an error.

transformers draws at random what a checkpoint lacks and says so in a log; here it is a ValueError
that names it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.hf import uneven
from effattn.hf.families import ENCODERS
from effattn.hf.names import LEARNED_PARTS
from effattn.hf.weight_files import Stored, one_line, shortened, stored

IN_A_LAYER = re.compile(r"\.\d+\.")


def class_of(config) -> type[nn.Module]:
    """The class that config.json names, or where it names none the causal LM (an encoder: the model
    without a head) of its model_type. ValueError for a class that transformers does not have, or
    has for other configurations."""
    import transformers

    if not config.architectures:
        auto = (
            transformers.AutoModel
            if config.model_type in ENCODERS
            else transformers.AutoModelForCausalLM
        )
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"config.json: model_type: got {config.model_type!r}, which has no causal "
                "language model"
            )
        return auto._model_mapping[type(config)]
    name = config.architectures[0]
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(
            f"config.json: architectures: got {name!r:.80}, which transformers does not have"
        )
    if cls.config_class is None or not issubclass(type(config), cls.config_class):
        raise ValueError(
            f"config.json: architectures: got {name!r}, which is no class for model_type "
            f"{config.model_type!r}"
        )
    return cls


def check_causal(config, name: str | Path) -> None:
    """Unsupported, naming the class, for a checkpoint of another model than a causal language
    model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls = class_of(config).__name__
    valid: set[str] = set()
    for one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        valid.update([one] if isinstance(one, str) else one)
    if cls not in valid:
        raise Unsupported(
            f"model: {str(name)!r} is a {cls}, and no causal language model; valid here is a "
            "class that predicts the next token of a text (...ForCausalLM)"
        )


def build(
    name: str,
    config,
    dtype: torch.dtype | str,
    shape: Callable[[nn.Module], None] | None = None,
    learned: bool = False,
    **options,
) -> nn.Module:
    """The model of the checkpoint `name` (a folder or hub name), in eval mode.

    shape: what makes the new, empty model's modules those of the checkpoint. learned: weights that
    a swap added may lie among the model's own. options: further ones of `from_pretrained`.
    ValueError when the weights are not exactly those that the class asks for."""
    cls = class_of(config)
    built = shaped(cls, config, shape)
    if Path(name).is_dir():
        _compare(name, built, config)
    try:
        model, found = built.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"model: {name!r} cannot be loaded as {cls.__name__}: {one_line(error)}"
        ) from error
    _check_report(found, config.model_type, learned)
    model.__class__ = cls  # it was a subclass while it was built, which nobody should see
    return model.eval()


def from_state(cls: type[nn.Module], config, state: dict, dtype: torch.dtype) -> nn.Module:
    """A new model of a class with these weights, in eval mode: no file is read."""
    built = shaped(cls, config)
    model = built.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.__class__ = cls
    return model


def shell(cls: type[nn.Module], config) -> nn.Module:
    """A model of a class without memory, which tells names and shapes."""
    with torch.device("meta"):
        return shaped(cls, config)(copy.deepcopy(config))


def outline(name: str, config, shape: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """The model of the checkpoint `name` without its weights (`empty`). shape: as in `build`.
    ValueError where the files' headers do not fit it."""
    if Path(name).is_dir():
        _compare(name, shaped(class_of(config), config, shape), config)
    return empty(config, shape)


def empty(config, shape: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """A new model without weights, in eval mode: on the meta device but for what is computed, such
    as rotary frequencies. shape: as in `build`."""
    from accelerate import init_empty_weights

    cls = class_of(config)
    with init_empty_weights(include_buffers=False):
        model = shaped(cls, config, shape)(copy.deepcopy(config))
    model.__class__ = cls
    return model.eval()


def shaped(
    cls: type[nn.Module], config, shape: Callable[[nn.Module], None] | None = None
) -> type[nn.Module]:
    """`cls`, whose new models have layers that differ where the config says so, and pass through
    `shape`, before their weights are read; `cls` itself where there is neither."""
    if shape is None and not uneven.overrides(config):
        return cls

    class Shaped(cls):
        builds_layers = True

        def __init__(self, config):
            layers = uneven.taken(config)
            super().__init__(config)
            uneven.rebuild(self, layers)
            if shape is not None:
                shape(self)

    for name in ("__name__", "__qualname__", "__module__"):  # transformers renames weights by them
        setattr(Shaped, name, getattr(cls, name))
    return Shaped


def _compare(folder: str, cls: type[nn.Module], config) -> None:
    """What a shell without memory and the files' headers tell before anything large is made.
    ValueError.
    """
    files = stored(folder)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(files):
        raise ValueError(
            f"config.json: num_hidden_layers: got {layers:,}, the weights are {len(files):,} "
            "tensors"
        )
    # packed weights have shapes of their own
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        with torch.device("meta"):
            shell = cls(copy.deepcopy(config))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"config.json: {cls.__name__} cannot be built from it: {one_line(error)}"
        ) from error
    if not _converts(shell):
        check_shapes(shell, files, {name: name for name in files})


def check_shapes(model: nn.Module, files: dict[str, Stored], names: dict[str, str]) -> None:
    """ValueError for stored weights of another shape than the model's. names: one in the model ->
    one in the files.
    """
    own = model.state_dict()
    wrong = [
        said(here, files[there].shape, own[here].shape)
        for here, there in names.items()
        if here in own and files[there].shape != tuple(own[here].shape)
    ]
    if wrong:
        refuse("mismatched keys", wrong)


def _converts(shell: nn.Module) -> bool:
    """Whether transformers computes some of this class's weights from those in the files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return any(not isinstance(one, WeightRenaming) for one in get_model_conversion_mapping(shell))


def _check_report(found: dict, model_type: str, learned: bool) -> None:
    """ValueError unless every weight of the model came from the files, and every weight in the
    files is the model's.

    Encoders are published with the heads of their pretraining beside the one that their class has:
    those are left."""
    unexpected = found["unexpected_keys"]
    if learned:
        unexpected = [name for name in unexpected if not LEARNED_PARTS & set(name.split("."))]
    if model_type in ENCODERS:
        unexpected = [name for name in unexpected if IN_A_LAYER.search(name)]
    if found["missing_keys"]:
        refuse("missing keys", found["missing_keys"])
    if found["mismatched_keys"]:
        refuse("mismatched keys", [said(*one) for one in found["mismatched_keys"]])
    if unexpected:
        refuse("unexpected keys", unexpected)
    if found["error_msgs"]:
        refuse("errors", found["error_msgs"])


def said(name: str, got, expected) -> str:
    """A weight of a wrong shape, in words."""
    return f"{name} (got {tuple(got)}, expected {tuple(expected)})"


def left_out(model: nn.Module, name: str) -> bool:
    """Whether transformers drops a weight of this name without a word: what older versions
    stored.
    """
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def refuse(what: str, names) -> None:
    """ValueError for weights that are not those of the model that config.json describes."""
    raise ValueError(f"weights: they do not fit config.json, {what}: {shortened(sorted(names))}")
