"""Every stage of every flow that runs a model over text, or steps, says how far it is: on real
models they take minutes, and what is left is told by the first steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flows import KILLED, run_small, save_small

from effattn.recipes.flow import parts
from effattn.resuming import Parts
from effattn.stages import Quiet

# What takes seconds whatever the model: files, a few steps for a proof, sizes.
SHORT = ("loading", "making", "reading text", "saving", "swapping", "generating", "the device")
PROOF = {
    "fresh_process": True,
    "class": "LlamaForCausalLM",
    "max_logit_difference": 0.0,
    "cache_shape": [1, 1, 1, 1],
    "kv_heads_in_cache": 1,
}
# What the small runs leave out.
MORE = {
    "prune_structured": {"criteria": ("taylor",), "compensate": True, "calibration_tokens": 640},
    "quantize_kv": {"decode_contexts": (16,), "decode_seconds": 0.01, "decode_steps": 2},
    "shear": {"baselines": ("structured",), "recover_tokens": 10 * 64},
}


class Recorded(Quiet):
    """Every stage in order, and the progress that it told."""

    def __init__(self):
        self.stages: list[tuple[str, list[tuple[int, int]]]] = []

    @contextmanager
    def stage(self, text: str) -> Iterator:
        told: list[tuple[int, int]] = []
        self.stages.append((text, told))
        yield lambda done, total: told.append((done, total))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("progress")
    save_small(root)
    return root


@pytest.mark.parametrize("name", KILLED)
def test_long_stages_say_how_far_they_are(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr("effattn.hf.verify.verify_plain", lambda *_: PROOF)  # seconds, elsewhere
    show = Recorded()
    run_small(
        name, str(place / "model"), place / "text.txt", tmp_path / "out", show, **MORE.get(name, {})
    )
    long = [(text, told) for text, told in show.stages if not text.startswith(SHORT)]
    assert long or name == "measure"  # which shows each cell by itself
    for text, told in long:
        assert told, f"{text}: no progress"
        assert told == sorted(told), text
        assert told[-1][0] == told[-1][1] > 0, text
        assert len({total for _, total in told}) == 1, text


def test_parts_that_are_there_already_are_no_part_of_the_progress():
    kept, show = Parts(None, {}, {}, "job"), Recorded()
    kept.once("b", lambda: 2)

    def made(value: int):
        def make(progress):
            progress(1, 2)
            progress(2, 2)
            return value

        return make

    jobs = {"a": made(1), "b": made(20), "c": made(3)}
    assert parts(show, kept, "all", jobs) == [1, 2, 3]
    assert show.stages == [("all", [(1, 4), (2, 4), (3, 4), (4, 4)])]
