"""Sheared LLaMA: masked equals folded and sliced, targets, dynamic batch loading, exact resumption,
two processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_model

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.prune.shearing import batch_loading, folding
from effattn.prune.shearing.batch_loading import Domains, DomainWindows, LoadingWeights
from effattn.prune.shearing.mask_stage import cut, learn_masks, reference_losses
from effattn.prune.shearing.masks import Masks
from effattn.prune.shearing.sheared import continue_training, shear
from effattn.prune.shearing.target import Target
from effattn.prune.shearing.training import Shearing

CPU = {"use_cpu": True}


def masked(kind: str, target: Target, **overrides) -> Shearing:
    """A tiny model with random masks over `target`, about a half of the gates open and none of them
    at 1.
    """
    model = tiny(kind, **overrides)
    parts = hf.of(model)
    masks = Masks(parts, target.of(parts))
    torch.manual_seed(1)
    for log_alpha in masks.parameters():
        log_alpha.data.normal_(std=1.5)
    return Shearing(model, LoadingWeights(torch.ones(1), 1), masks)


EVERYTHING = Target(hidden=40, heads=4, ffn=50, layers=1)
CASES = [
    ("llama", EVERYTHING, {"tie_word_embeddings": True}),
    ("llama", EVERYTHING, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    (
        "llama",
        Target(hidden=40, heads=1, ffn=50),
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
    ),
    (
        "llama",
        Target(hidden=64, heads=1, layers=1),
        {"tie_word_embeddings": False, "num_key_value_heads": 2},
    ),
    ("qwen3", EVERYTHING, {}),
    ("phi3", Target(heads=4, ffn=24, layers=1), {}),  # fused projections
    ("gemma2", Target(hidden=40, heads=2, ffn=24), {}),  # norms after the blocks, scaled embeddings
    ("opt", Target(ffn=32, layers=1), {"ffn_dim": 96}),  # LayerNorm, biases
]


@pytest.mark.parametrize(("kind", "target", "overrides"), CASES)
def test_masked_and_sliced_models_agree(kind, target, overrides, tokens):
    module = masked(kind, target, **overrides)
    before = (
        module.model.state_dict()["model.embed_tokens.weight"].clone() if kind == "llama" else None
    )
    small, difference = cut(module, tokens[:96].view(2, 48))
    assert difference < 1e-5
    parts = hf.of(small)
    for axis, size in target.of(hf.of(tiny(kind, **overrides))).items():
        found = {
            "hidden": parts.embeddings.weight.shape[1],
            "heads": parts.kv_heads,
            "layers": len(parts.layers),
            "ffn": parts.layers[0].feed_forward.size,
        }[axis]
        assert found == size, axis
    assert all(bool(z.max() < 1) for z in module.masks.values.values()), (
        "gates that are 1 would hide a fold"
    )
    assert before is None or ("hidden" in module.masks.values) != torch.equal(
        before, module.model.state_dict()["model.embed_tokens.weight"]
    )


def test_norms_take_their_mean_over_kept_dimensions():
    module = masked("llama", Target(hidden=16))
    masks, norm = module.masks, hf.of(module.model).final_norm
    masks.values = {"hidden": torch.zeros(64, dtype=torch.float64)}
    masks.values["hidden"][:16] = 1
    x = torch.zeros(3, 64, dtype=torch.float64)
    x[:, :16] = torch.randn(3, 16, dtype=torch.float64)
    expected = (
        x[:, :16] / (x[:, :16].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    )
    torch.testing.assert_close(
        norm(x)[:, :16],
        expected * norm.weight[:16],
        rtol=1e-6,
        atol=1e-6,
    )
    masks.detach()
    assert not torch.allclose(norm(x)[:, :16], expected * norm.weight[:16])


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("llama", Target(heads=9), r"target: heads: got 9, the model has 8 .* valid is 1 to 8"),
        ("llama", Target(ffn=0), r"target: ffn: got 0, the model has 96"),
        ("llama", Target(layers=True), r"target: layers: got True"),
        (
            "llama",
            Target(heads=8, ffn=96),
            r"removes nothing from a model of hidden 64, heads 8, ffn 96, layers 2",
        ),
        ("llama", Target(), "removes nothing"),
        (
            "opt",
            Target(hidden=32),
            r"target: hidden: OPT.*subtract a mean.*valid axes are heads, ffn, layers",
        ),
        (
            "gemma2",
            Target(layers=1),
            r"target: layers: .*undoes.*valid axes are hidden, heads, ffn",
        ),
        ("mixtral", Target(ffn=8), r"target: ffn: .*mixture of experts; valid axes are heads"),
    ],
)
def test_what_cannot_be_reached_is_refused(kind, target, message):
    with pytest.raises(ValueError, match=message):
        target.of(hf.of(tiny(kind, dtype=torch.float32)))


def test_weights_follow_the_papers_rule_and_the_codes():
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    losses, references = (
        torch.tensor([2.0, 1.0, 3.0]).double(),
        torch.tensor([1.5, 2.0, 3.0]).double(),
    )
    raised = torch.tensor([0.5 * 2.718281828459045**0.5, 0.3, 0.2], dtype=torch.float64)
    expected = (1 - 1e-4) * raised / raised.sum() + 1e-4 / 3
    torch.testing.assert_close(batch_loading.update(w, losses, references), expected)
    raised[1] *= 2.718281828459045**-1
    expected = (1 - 1e-4) * raised / raised.sum() + 1e-4 / 3
    torch.testing.assert_close(batch_loading.update(w, losses, references, "signed"), expected)
    torch.testing.assert_close(batch_loading.update(w, losses, references, "fixed"), w)
    with pytest.raises(ValueError, match="did you mean 'clamped'"):
        batch_loading.update(w, losses, references, "clampd")


def two_domains(length: int = 16) -> Domains:
    """Domain "a" has even tokens, "b" odd ones, all different."""
    streams = {"a": torch.arange(0, 3000, 2), "b": torch.arange(1, 3000, 2)}
    return Domains(streams, length, proportions={"a": 3, "b": 1})


def test_windows_follow_the_weights_one_step_late_and_are_the_same_in_any_order():
    domains = two_domains()
    weights = LoadingWeights(domains.proportions, 4)
    windows = DomainWindows(domains, weights, steps=50, per_step=8, every=10)
    domain_of = lambda index: int(windows[index]["input_ids"][0] % 2)  # noqa: E731
    # until step 11: an update after step 10 may come no earlier
    first = [domain_of(index) for index in range(88)]
    assert sum(first) == pytest.approx(22, abs=12)
    with pytest.raises(RuntimeError, match="update 1"):
        windows[88]
    weights.add(torch.tensor([1e-9, 1 - 1e-9]))
    assert all(domain_of(index) for index in range(88, 168))
    # going back, as a resumed process does
    assert [domain_of(index) for index in range(88)] == first
    fresh = DomainWindows(domains, weights, steps=50, per_step=8, every=10)
    assert torch.equal(fresh[150]["input_ids"], windows[150]["input_ids"])
    seen = torch.cat([windows[index]["input_ids"] for index in range(60)])
    assert len(seen.unique()) == len(seen), "every token once before any is seen twice"
    assert not set(seen.tolist()) & set(domains.held_out["a"].flatten().tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Domains({"a": torch.arange(40), "b": torch.arange(99)}, 16),
            r"domain 'a' has 40 tokens.*at least 64",
        ),
        (lambda: Domains({}, 16), "no domains"),
        (lambda: Domains({"a": torch.rand(99)}, 16), r"domain 'a': got torch.float32"),
        (
            lambda: Domains(torch.arange(99), 16, proportions={"b": 1.0}),
            r"proportions: .*each of 'text'",
        ),
    ],
)
def test_bad_domains_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


STAGES = ("masks", "recovered", "continued")
SETTINGS = dict(
    mask_tokens=6 * 128,
    recover_tokens=3 * 128,
    continue_tokens=4 * 128,
    length=64,
    batch=2,
    overrides=CPU,
    mask_lr=0.3,
)
TARGET = Target(hidden=48, heads=4, ffn=48)


def streams(tokens) -> dict:
    return {"a": tokens[:1200], "b": tokens[1200:]}


class Killed(Exception):
    pass


def test_a_killed_run_ends_like_an_uninterrupted_one(tokens, tmp_path):
    """Killed twice, in the first stage and in the last; every bit of the result is the same, and so
    is the record.
    """
    found = {}
    for name, deaths in (("whole", ()), ("killed", (5, 3))):
        folder = tmp_path / name
        for death in (*deaths, None):
            seen = []

            def progress(done, total, death=death, seen=seen):
                seen.append((done, total))
                if done == death and total == (6 if death == 5 else 4):
                    raise Killed

            model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
            try:
                small = shear(
                    model, TARGET, streams(tokens), folder=folder, progress=progress, **SETTINGS
                )
            except Killed:
                assert death
        records = [json.loads((folder / stage / "record.json").read_text()) for stage in STAGES]
        found[name] = (small.state_dict(), records)
    # the last process went on after the checkpoint at step 2 of the last stage
    assert seen[0] == (3, 4)
    for name, value in found["whole"][0].items():
        assert torch.equal(value, found["killed"][0][name]), name
    assert found["whole"][1] == found["killed"][1]
    weights = [point["weights"] for point in found["whole"][1][0]]
    assert weights[0] != weights[-1]


def test_shear_gives_a_plain_model_of_exactly_the_shape(tokens, tmp_path):
    model = tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=True, num_key_value_heads=4)
    small = shear(
        model,
        Target(heads=2, ffn=33),
        tokens,
        **(SETTINGS | {"recover_tokens": 0, "continue_tokens": 0}),
    )
    config = small.config
    assert (config.num_key_value_heads, config.num_attention_heads, config.intermediate_size) == (
        2,
        4,
        33,
    )
    assert (config.head_dim, config.use_cache, small.dtype, small.training) == (
        8,
        True,
        torch.bfloat16,
        False,
    )
    small.save_pretrained(tmp_path)
    again = effattn.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens[None, :32]).logits, small(tokens[None, :32]).logits)


def test_training_moves_masks_towards_what_matters():
    """FFN dimensions whose output is 0 are the ones that go, on text that the model itself
    wrote.
    """
    model = tiny("llama", dtype=torch.float32)
    dead = torch.arange(96) % 2 == 0
    with torch.no_grad():
        for layer in hf.of(model):
            layer.feed_forward.output.weight[:, dead] = 0
            layer.feed_forward.output.weight *= 3
        model.lm_head.weight *= 3
    torch.manual_seed(0)
    own = model.generate(
        torch.arange(1, 49)[:, None], do_sample=True, max_new_tokens=63, min_new_tokens=63, top_k=0
    )
    kept = []
    keep = folding.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            folding,
            "keep",
            lambda values: kept.append(keep(values)) or keep(values),
        )
        _, facts = learn_masks(
            model,
            Target(ffn=48),
            Domains(own.flatten(), 64),
            tokens=40 * 128,
            batch=2,
            mask_lr=0.3,
            lr=1e-6,
            warm_start=None,
            overrides=CPU,
        )
    share = sum(int(dead[rows].sum()) for rows in kept[0].ffn) / 96
    assert share < 0.15
    for row in facts["compensation"]:
        assert row["ffn_error"] < row["ffn_error_sliced"]


def test_what_is_not_finite_is_named(tokens):
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds NaN"):
        shear(model, TARGET, streams(tokens), **SETTINGS)
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(FloatingPointError, match=r"domain '[ab]' is not finite after step"):
        shear(model, TARGET, streams(tokens), lr=1e30, **SETTINGS)
    with pytest.raises(Unsupported, match="valid axes"):
        shear(tiny("opt"), Target(hidden=32), tokens)


def save_sheared(batch: int, out: str) -> None:
    """What each process of the next test runs."""
    tokens = torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
    model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    rank = os.environ.get("RANK")
    # gradients of bf16 differ
    overrides = CPU | {"bf16": False} | ({} if rank is None else {"ddp_backend": "gloo"})
    small = shear(
        model,
        Target(heads=4, ffn=48),
        streams(tokens),
        mask_tokens=4 * 256,
        recover_tokens=256,
        continue_tokens=2 * 256,
        length=64,
        batch=batch,
        lr=1e-4,
        continue_lr=1e-4,
        overrides=overrides,
    )
    if rank in (None, "0"):
        save_model(small, out)


@pytest.mark.slow  # processes share their work by the Trainer, as in uptraining, which always runs
def test_two_processes_shear_like_one(tmp_path):
    """torchrun with gloo: the same gates in both, half the windows in each."""
    one, two, script = tmp_path / "1.safetensors", tmp_path / "2.safetensors", tmp_path / "shear.py"
    save_sheared(4, str(one))
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"import conftest\nfrom test_shear import save_sheared\nsave_sheared(2, {str(two)!r})\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(two)
    for name, value in load_file(one).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4, msg=name)


def test_references_are_the_models_own_losses(tokens):
    model, domains = tiny("llama", dtype=torch.float32), Domains(streams(tokens), 64)
    expected = [effattn.perplexity(model, torch.cat([row]), 63) for row in domains.held_out["a"]]
    found = reference_losses(model, domains)
    assert found[0].item() == pytest.approx(torch.tensor(expected).log().mean().item(), rel=1e-3)
    facts = continue_training(model, domains, found, tokens=2 * 128, batch=2, overrides=CPU)
    assert facts["record"][0]["losses"] == pytest.approx(found.tolist())
