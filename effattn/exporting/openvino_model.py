"""A model in OpenVINO's format, by transformers' own exporter.

    write(model, folder, "f16")     # openvino_model.xml and .bin

The model keeps its cache by itself: it takes input_ids, attention_mask, position_ids and beam_idx,
of any batch and length, and gives logits. That is what Optimum and OpenVINO GenAI read."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.exporting import openvino_cpu
from effattn.hf import anatomy

FORMATS = ("f16", "f32")
EXPORTER = "transformers.exporters.exporter_openvino"
# rules whose frequencies are numbers of the model, whatever it reads
FIXED = ("default", "linear", "llama3", "yarn", "proportional")
# of the example that is traced: two sequences, so many tokens before and new ones
PAST, NEW = 6, 3


def require() -> None:
    """ValueError, saying what to install, without OpenVINO or a transformers that exports to it."""
    openvino_cpu.require()
    if importlib.util.find_spec("transformers.exporters") is None or (
        importlib.util.find_spec(EXPORTER) is None
    ):
        raise ValueError(
            "to: 'openvino' needs transformers' own exporter, which this version has not: "
            "pip install -U transformers"
        )


def check(parts: anatomy.Anatomy) -> None:
    """Unsupported for positions that are made anew for each text."""
    said = getattr(parts.config, "rope_parameters", None) or {}
    # some models have a rule for each kind of layer
    rules = said.values() if all(isinstance(one, dict) for one in said.values()) else [said]
    for rule in rules:
        kind = rule.get("rope_type", "default")
        if kind not in FIXED:
            raise Unsupported(
                f"openvino: positions are scaled by {kind!r}, whose frequencies depend on the "
                f"text; valid there are {', '.join(FIXED[1:])} and none"
            )


def write(model: nn.Module, folder: Path, format: str) -> None:
    """Writes the model into `folder`. format: of the weights. The model is in float32 afterwards.
    Unsupported, with the exporter's words, for one that cannot be traced."""
    model.float()
    with openvino_cpu.runtime() as openvino, _quiet(), _settled(model):
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        try:
            example, sizes = _example(model)
            config = OpenVINOConfig(dynamic_shapes=sizes, compress_to_fp16=format == "f16")
            made = OpenVINOExporter().export(model, example, config=config).program
        except Exception as error:
            words = str(error).strip().splitlines() or [""]
            raise Unsupported(
                f"openvino: transformers cannot export {type(model).__name__}: "
                f"{type(error).__name__}: {words[0]:.200}"
            ) from error
        _repeat_plainly(openvino, made)
        # whoever runs it chooses the numbers it computes in; the exporter says float32
        about = made.get_rt_info()
        if "runtime_options" in about:
            del about["runtime_options"]
        save(openvino, made, folder / openvino_cpu.FILE)


def save(openvino: Any, made: Any, file: Path) -> None:
    """Writes the file, and its weights beside it. OSError where the disk takes no more of them."""
    try:
        openvino.save_model(made, str(file), compress_to_fp16=False)
    except RuntimeError as error:  # all that is said is "iostream error"
        words = str(error).strip().splitlines() or [""]
        raise OSError(f"output: {file.name} cannot be written ({words[-1]:.200})") from error


@torch.no_grad()
def _example(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a step that reads tokens after others, and which of their sizes may be others:
    sequences and tokens."""
    from transformers import DynamicCache

    ids = torch.arange(2 * (PAST + NEW)).view(2, -1) % model.config.vocab_size
    # without a config every layer keeps all that it has read: a window is in the mask
    cache = DynamicCache()
    model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True)
    example = {
        "input_ids": ids[:, PAST:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(PAST, PAST + NEW).expand(2, -1),
        "past_key_values": cache,
    }
    any_size = torch.export.Dim.AUTO
    cached = sum(layer.is_initialized for layer in cache.layers)
    sizes: dict[str, Any] = {name: {0: any_size, 1: any_size} for name in example}
    return example, sizes | {"past_key_values": [{0: any_size, 2: any_size}] * 2 * cached}


def _repeat_plainly(openvino: Any, made: Any) -> None:
    """Grouped heads are repeated by a constant, which OpenVINO's processors' plugin recognises:
    attention and cache become one kernel, two to three times as fast. What the exporter writes
    there, sizes that are looked up, hides it from them."""
    ops = importlib.import_module("openvino.opset14")
    for node in made.get_ordered_ops():
        heads = _repeated_heads(node)
        if heads is None:
            continue
        shape = ops.constant([1, 1, heads, 1, 1])
        by_constant = ops.broadcast(node.input_value(0), shape, broadcast_spec="BIDIRECTIONAL")
        by_constant.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(by_constant.output(0))
    made.validate_nodes_and_infer_types()


def _repeated_heads(node: Any) -> int | None:
    """How many query heads a K/V head serves where `node` repeats K or V for them, (B, Hkv, 1, T,
    D) -> (B, Hkv, n, T, D) before a reshape to (B, Hq, T, D); None of other nodes."""
    if node.get_type_name() != "Broadcast" or node.get_output_partial_shape(0).rank != 5:
        return None
    source, readers = node.input_value(0).get_partial_shape(), node.output(0).get_target_inputs()
    read = [one.get_node() for one in readers]
    if len(read) != 1 or read[0].get_type_name() != "Reshape" or source[2] != 1:
        return None
    joined = read[0].get_output_partial_shape(0)
    if joined.rank != 4 or not (joined[1].is_static and source[1].is_static):
        return None
    return joined[1].get_length() // source[1].get_length()


@contextlib.contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """With an attention that can be traced: a kernel, where the class has one."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to those who develop it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
