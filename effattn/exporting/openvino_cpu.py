"""OpenVINO on this machine's processors: what it makes of an exported model.

    require()                                    # ValueError, saying what to install
    ask(folder, {"prompts": [[1, 2, 3]], "new": 64, "full": 4, "vocabulary": 49152, "threads": 1})

The package tells its makers of every import and conversion, unless it is told not to:
`runtime()` is how it is imported here, without that."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effattn.exporting.llama_cpp import cores as cores

NAME, PACKAGE = "OpenVINO", "openvino"
INSTALL = "pip install 'effattn[openvino]'"
FILE = "openvino_model.xml"  # in the folder of an export
TELLS = "openvino_telemetry"
NUMBERS = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")  # what it computes and caches in
STEPS, CHUNK = 32, 512  # tokens that are timed, and tokens of a text that are read at once


def require() -> None:
    """ValueError, saying what to install, where OpenVINO is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"to: 'openvino' needs OpenVINO, which is not installed: {INSTALL}")


def version() -> str:
    """Of the package."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


@contextlib.contextmanager
def runtime() -> Iterator[Any]:
    """The package, which within this sends nothing to anybody."""
    kept = sys.modules.get(TELLS)
    if PACKAGE not in sys.modules:
        sys.modules[TELLS] = None  # type: ignore[assignment]  # it has a stub for where it is not
    try:
        openvino = importlib.import_module(PACKAGE)
        tells = importlib.import_module(f"{PACKAGE}.tools.ovc.telemetry_utils")
        importlib.import_module(f"{PACKAGE}.tools.ovc.convert_impl")
        stub = importlib.import_module(f"{PACKAGE}.tools.ovc.telemetry_stub")
    finally:
        if kept is None:
            sys.modules.pop(TELLS, None)
    kept, tells.tm = tells.tm, stub  # somebody may have imported it before
    try:
        yield openvino
    finally:
        tells.tm = kept


def ask(folder: Path, question: dict) -> dict:
    """The answer to a question about the model in a folder (`effattn.exporting.checking`).
    "exact" in it: in float32 with a float32 cache. RuntimeError, with its last words, when it
    cannot run it."""
    require()
    with runtime() as openvino:
        options = {"INFERENCE_NUM_THREADS": question["threads"], "PERFORMANCE_HINT": "LATENCY"}
        if question.get("exact"):
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        try:
            compiled = openvino.Core().compile_model(str(folder / FILE), "CPU", options)
            return _answer(_Reader(compiled), question)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1:] or ["no words"]
            raise RuntimeError(f"OpenVINO cannot run {folder / FILE}: {last[0]:.300}") from error


class _Reader:
    """A model that reads token after token of one text, and keeps the past."""

    def __init__(self, compiled: Any):
        self.request = compiled.create_infer_request()
        said = [compiled.get_property(name).get_type_name() for name in NUMBERS]
        self.numbers = ", cache ".join(said)
        self.length = 0

    def forget(self) -> None:
        """Begins a new text."""
        self.request.reset_state()
        self.length = 0

    def read(self, ids: list[int]) -> np.ndarray:
        """Logits (V,) float32 after these tokens, valid until the next ones."""
        new = self.length + len(ids)
        answer = self.request.infer(
            {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, new), dtype=np.int64),
                "position_ids": np.arange(self.length, new)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            },
            share_outputs=True,
        )
        self.length = new
        return answer["logits"][0, -1]


def _answer(reader: _Reader, question: dict) -> dict:
    tokens, logprobs = [], []
    for prompt in question["prompts"]:
        reader.forget()
        logits, new, places = reader.read(prompt), [], []
        for place in range(question["new"]):
            if place < question["full"]:
                places.append(torch.from_numpy(logits.copy()).double().log_softmax(-1).tolist())
            new.append(int(logits.argmax()))
            if place + 1 < question["new"]:
                logits = reader.read(new[-1:])
        tokens.append(new)
        logprobs.append(places)
    speeds = {
        str(context): _speed(reader, question["prompts"][0], context, question["repeats"])
        for context in question.get("contexts", ())
    }
    return {"tokens": tokens, "logprobs": logprobs, "speeds": speeds, "numbers": reader.numbers}


def _speed(reader: _Reader, prompt: list[int], context: int, repeats: int) -> float:
    """Tokens a second after `context` tokens: the median of so many times so many steps."""
    longer = (prompt * (context // len(prompt) + 1))[:context]
    reader.forget()
    for start in range(0, context, CHUNK):
        reader.read(longer[start : start + CHUNK])
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(STEPS // repeats):
            reader.read(prompt[:1])
        found.append(STEPS // repeats / (time.perf_counter() - begin))
    return sorted(found)[repeats // 2]
