"""Which checkpoint a training goes on from: the newest complete one, whatever was being written
when it was killed.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from effattn.resuming import STATE, complete, newest_complete


def checkpoint(folder, step, ranks=1):
    """A folder as the Trainer writes it."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    save_file({"weight": torch.ones(50, 50) * step}, made / "model.safetensors")
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *names):
        torch.save({"step": step, "many": torch.rand(300)}, made / name)
    (made / "training_args.bin").write_bytes(b"not read")
    (made / STATE).write_text(json.dumps({"global_step": step}))
    return made


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)
DAMAGES = {
    "missing": lambda file: file.unlink(),
    "half": halve,
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_file_is_enough(tmp_path, name, damage):
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path) == newer
    DAMAGES[damage](newer / name)
    assert newest_complete(tmp_path) == older
    assert newer.exists()
    assert newest_complete(tmp_path, clean=True) == older
    assert not newer.exists()


def test_what_was_not_flushed_is_seen(tmp_path):
    made = checkpoint(tmp_path, 3)
    flip(made / "optimizer.pt")
    assert not complete(made, 3)


def test_steps_are_numbers_and_other_folders_are_left_alone(tmp_path):
    assert newest_complete(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert newest_complete(tmp_path, clean=True) is None
    assert len(list(tmp_path.iterdir())) == 3
    newest = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 20)
    assert newest_complete(tmp_path) == newest
    (newest / STATE).write_text(json.dumps({"global_step": 20}))  # of another step
    assert newest_complete(tmp_path).name == "checkpoint-20"


def test_every_process_has_its_random_state(tmp_path):
    made = checkpoint(tmp_path, 5, ranks=3)
    assert complete(made, 5, world_size=3)
    assert not complete(made, 5)
    (made / "rng_state_1.pth").unlink()
    assert not complete(made, 5, world_size=3)


def test_every_shard_is_there(tmp_path):
    made = checkpoint(tmp_path, 5)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not complete(made, 5)
    save_file({"b": torch.ones(2)}, made / "model-2.safetensors")
    assert complete(made, 5)
    (made / "model.safetensors.index.json").write_text("{")
    assert not complete(made, 5)
