"""Uptraining: the loss is what it says, memory is bounded, a kill costs nothing, two processes
agree with one.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from effattn.heads.gqa import convert_gqa
from effattn.hf import anatomy as hf
from effattn.training.uptrain import default_lr, distillation_loss, layer_distance, uptrain


def pair(tokens, dtype=torch.float32, refit=True):
    teacher = tiny("llama", dtype=dtype, tie_word_embeddings=True)
    student = copy.deepcopy(teacher)
    convert_gqa(student, 2, tokens, length=64, refit=refit)
    return teacher, student


def test_loss_and_gradients_equal_the_plain_formula(tokens):
    teacher, student = pair(tokens, torch.float64)
    parts, teacher_parts = hf.of(student), hf.of(teacher)
    ids = tokens[:96].view(2, 48)
    grads = []
    for chunked in (False, True):
        student.zero_grad()
        if chunked:
            seen = {}
            handle = parts.final_norm.register_forward_hook(
                lambda _, __, y, seen=seen: seen.update(h=y)
            )
            student(input_ids=ids)
            handle.remove()
            with torch.no_grad():
                teacher_hidden = teacher.model(input_ids=ids).last_hidden_state
            loss = distillation_loss(
                parts, seen["h"], teacher_parts, teacher_hidden, ids, ce_weight=0.3, chunk=7
            )
        else:
            s = student(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            with torch.no_grad():
                t = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            kl = (t.exp() * (t - s)).sum(-1).mean()
            loss = kl + 0.3 * F.nll_loss(s, ids[:, 1:].flatten())
        loss.backward()
        grads.append((loss.item(), {n: p.grad.clone() for n, p in student.named_parameters()}))
    assert abs(grads[0][0] - grads[1][0]) < 1e-6
    for name, expected in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


class Largest(TorchDispatchMode):
    """The most elements of any tensor (..., vocabulary) that an operation gave, forward or
    backward.
    """

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (96,):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_logits_of_all_positions_never_exist(tokens):
    teacher, student = pair(tokens)
    parts, teacher_parts = hf.of(student), hf.of(teacher)
    hidden = torch.randn(2, 256, 64, requires_grad=True)
    with Largest() as largest:
        loss = distillation_loss(
            parts, hidden, teacher_parts, hidden.detach(), torch.zeros(2, 256, dtype=int), chunk=16
        )
        loss.backward()
    # a chunk of 16 positions, or the head; all positions: 510 * 96
    assert 16 * 96 <= largest.elements <= 64 * 96


def test_uptraining_helps_and_reports_a_curve(tokens, tmp_path):
    teacher, student = pair(tokens, refit=False)  # a re-fit would leave little to learn
    result = uptrain(
        student,
        teacher,
        tokens,
        train_tokens=40 * 128,
        folder=tmp_path,
        evaluation=tokens[:512],
        length=64,
        batch=2,
        points=2,
        ce_weight=0.0,
        layer_weight=0.0,
        trainable="all",
        lr=2e-3,
    )
    assert result["tokens"] == 40 * 128
    assert [point["tokens"] for point in result["curve"]] == [0, 20 * 128, 40 * 128]
    assert result["curve"][-1]["kl"] < 0.95 * result["curve"][0]["kl"], result["curve"]
    assert not student.training
    assert student.config.use_cache


def test_only_attention_is_trained_by_default(tokens, tmp_path):
    teacher, student = pair(tokens)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    uptrain(student, teacher, tokens, train_tokens=4 * 128, folder=tmp_path, length=64)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == ("self_attn" not in name), name
        assert parameter.requires_grad
    with pytest.raises(ValueError, match=r"trainable: got 'attn'.*'attention'"):
        uptrain(student, teacher, tokens, train_tokens=128, folder=tmp_path, trainable="attn")


def test_the_default_rate_falls_with_width_and_depth():
    parts = hf.of(tiny("llama"))
    layers = list(parts.layers)

    def rate(width, depth):
        parts.embeddings.weight = torch.nn.Parameter(torch.empty(1, width, device="meta"))
        parts.layers[:] = (layers * depth)[:depth]
        return default_lr(parts)

    assert rate(64, 2) == rate(256, 4) == 3e-3  # the embedded model's size, and below it
    assert rate(576, 30) == pytest.approx(1.78e-4, rel=0.01)  # SmolLM2
    assert rate(4096, 32) == pytest.approx(2.3e-5, rel=0.02)
    assert rate(256, 8) == rate(512, 4) == 1.5e-3


def test_layer_distance_is_relative_to_each_position():
    t = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    s = t + torch.tensor([[[0.0, 5.0], [0.0, 0.0]]])
    assert layer_distance([s, t], [t, t]).item() == pytest.approx((25 / 25 + 0) / 2 / 2)


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_weights(tokens, tmp_path):
    runs = {}
    for name in ("whole", "killed"):
        teacher, student = pair(tokens)
        settings = dict(
            train_tokens=12 * 128,
            folder=tmp_path / name,
            evaluation=tokens[:256],
            length=64,
            batch=2,
            save_every=4,
        )
        if name == "killed":

            def die(done, total):
                if done == 6:
                    raise Killed

            with pytest.raises(Killed):
                uptrain(student, teacher, tokens, progress=die, **settings)
            teacher, student = pair(tokens)  # a new process starts from the conversion again
        seen = []
        result = uptrain(
            student,
            teacher,
            tokens,
            progress=lambda done, _, seen=seen: seen.append(done),
            **settings,
        )
        runs[name] = (student.state_dict(), result["curve"], seen)
    assert runs["killed"][2][0] == 5  # went on after the checkpoint at step 4
    for name, value in runs["whole"][0].items():
        assert torch.equal(value, runs["killed"][0][name]), name
    assert runs["whole"][1] == runs["killed"][1]


SCRIPT = """
import json, sys
import torch
sys.path.insert(0, {tests!r})
import conftest
torch.set_num_threads(1)
from test_uptrain import pair, uptrain
tokens = torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
teacher, student = pair(tokens)
overrides = {{"use_cpu": True, "bf16": False, "ddp_backend": "gloo"}}
result = uptrain(student, teacher, tokens, train_tokens=8 * 256, folder={folder!r}, length=64,
                 batch={batch}, evaluation=tokens[:256], overrides=overrides)
import os
from safetensors.torch import save_model
if int(os.environ.get("RANK", 0)) == 0:
    save_model(student, {out!r})
    json.dump(result, open({out!r} + ".json", "w"))
"""


def test_two_processes_train_like_one(tokens, tmp_path):
    """torchrun with gloo: half the windows in each process give the weights of one process with all
    of them.
    """
    states = []
    for processes, batch in ((1, 4), (2, 2)):
        out = str(tmp_path / f"{processes}.safetensors")
        script = tmp_path / f"train{processes}.py"
        script.write_text(
            SCRIPT.format(
                tests=str(Path(__file__).parents[1]),
                folder=str(tmp_path / f"run{processes}"),
                batch=batch,
                out=out,
            )
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            f"--master_port={port}",
        ]
        done = subprocess.run(
            [sys.executable, *launcher, str(script)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        from safetensors.torch import load_file

        states.append((load_file(out), json.loads(Path(out + ".json").read_text())))
    assert [state[1]["processes"] for state in states] == [1, 2]
    assert states[0][1]["tokens"] == states[1][1]["tokens"] == 8 * 256
    for name, value in states[0][0].items():
        torch.testing.assert_close(states[1][0][name], value, rtol=0, atol=2e-4, msg=name)
