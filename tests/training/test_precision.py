"""Every flow that trains, with bf16 autocast and without, on checkpoints of every dtype: models
come back as they went.

Which of the two a machine prefers (`training.bf16_pays`) decides nothing here: each test says it.
"""

from __future__ import annotations

import copy
import itertools
from typing import ClassVar

import pytest
import torch
from conftest import tiny
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import effattn
from effattn.arena.encoder import Encoder
from effattn.arena.tasks import TASKS
from effattn.arena.training import Budget, train
from effattn.arena.widths import eighths
from effattn.evaluate.curve import token_scores
from effattn.evaluate.loss import compare
from effattn.extending.tuned import Tuning
from effattn.extending.tuning import tune
from effattn.fitting.building import Builder
from effattn.heads.gqa import convert_gqa
from effattn.hf import anatomy as hf
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.mask_stage import learn_masks, reference_losses
from effattn.prune.shearing.sheared import continue_training
from effattn.prune.shearing.target import Target
from effattn.prune.unstructured.zeros import keep_zeros
from effattn.training import lending as training
from effattn.training.lending import bf16_pays
from effattn.training.lora import adapters
from effattn.training.recurrent_memory import RecurrentMemory, train_memory
from effattn.training.transfer import distances, transfer
from effattn.training.uptrain import uptrain

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTH = 32
STEPS = 4


class Flow:
    """One run of a flow: `parent` (the caller's, with odd flags), `model` (what is trained) and, if
    it does not come back changed in place, `result`. `falls`: (before, after) of what it
    minimises."""

    mostly_slow = False

    def __init__(self, tokens, folder, dtype: torch.dtype, bf16: bool, progress=None):
        self.tokens, self.folder, self.progress = tokens, folder, progress
        self.overrides = {"use_cpu": True, "save_strategy": "no", "bf16": bf16}
        self.parent = tiny("llama", dtype=dtype, tie_word_embeddings=True)
        self.parent.model.norm.requires_grad_(False)
        self.parent.model.layers[1].train()
        self.model = copy.deepcopy(self.parent)
        self.result, self.falls = self.model, None

    def run(self):
        raise NotImplementedError

    def prepare(self) -> None:
        """What comes before training."""

    def fresh(self) -> nn.Module:
        """The same class and settings, never trained, with the weights of the result."""
        model = self.prepared
        model.load_state_dict(self.result.state_dict())
        return model.eval()

    def uptrain(self, steps: int = STEPS, **given) -> None:
        evaluation = self.tokens[:129]
        found = uptrain(
            self.model,
            self.parent,
            self.tokens,
            train_tokens=steps * 2 * LENGTH,
            length=LENGTH,
            folder=self.folder,
            evaluation=evaluation,
            points=1,
            progress=self.progress,
            overrides=self.overrides,
            **given,
        )
        first, last = found["curve"]
        self.falls = first["kl"], last["kl"]
        self.measured = {name: last[name] for name in ("perplexity", "cross_entropy", "kl")}
        settings = training.Settings(self.parent, self.model)
        self.expected = compare(self.parent.eval(), self.model.eval(), evaluation, LENGTH)
        settings.put_back()


class Conversion(Flow):
    def prepare(self):
        convert_gqa(self.model, 2, self.tokens, length=64)

    def run(self):
        self.uptrain(lr=1e-3, layer_weight=0.0)


class Latent(Conversion):
    """Keys and values of latents, for so many steps that the loss falls in every dtype."""

    def prepare(self):
        effattn.convert_latent(self.model, self.tokens, rank=12, length=64, refit=False)

    def run(self):
        self.uptrain(steps=40, lr=1e-3, layer_weight=0.0)


class Recovery(Conversion):
    """What one-shot pruning does after it: all weights of the layers, zeros kept."""

    def prepare(self):
        effattn.prune.oneshot(self.model, self.tokens, method="magnitude", sparsity=0.5)
        self.zeros = {name: p == 0 for name, p in self.model.named_parameters()}

    def run(self):
        with keep_zeros(self.model):
            self.uptrain(
                trainable=[p for layer in hf.of(self.model) for p in layer.block.parameters()]
            )
        for name, parameter in self.model.named_parameters():
            assert not parameter[self.zeros[name]].any(), name


class Fitting(Recovery):
    """What a budget search does after it: all weights of layers of unlike sizes, for so many steps
    that the loss falls in every dtype."""

    def prepare(self):
        parts = hf.of(self.model)
        builder = Builder(parts, self.tokens, length=64)
        plan = builder.parent.with_field("kv_heads", 2, [0]).with_field("ffn", 48, [1])
        self.model = self.result = copy.deepcopy(builder.shaped(plan))
        self.zeros = {}

    def run(self):
        layers = [p for layer in hf.of(self.model) for p in layer.block.parameters()]
        self.uptrain(steps=40, lr=1e-3, layer_weight=0.0, trainable=layers)


class Transfer(Flow):
    pattern = "linear(feature_map='hedgehog')"

    def prepare(self):
        effattn.swap(self.model, self.pattern)

    def run(self):
        found = transfer(
            self.model,
            self.parent,
            self.tokens,
            layers=[0, 1],
            train_tokens=2 * STEPS * 2 * LENGTH,
            length=LENGTH,
            folder=self.folder,
            progress=self.progress,
            overrides=self.overrides,
        )
        self.falls = sum(found["before"]), sum(found["after"])
        self.measured = found["after"]
        self.expected = distances(
            self.model, self.parent, list(self.tokens[: 4 * LENGTH].view(-1, LENGTH).split(2))
        )


class Distillation(Transfer):
    def run(self):
        self.uptrain(trainable="all", lr=1e-3)


class LowRank(Transfer):
    def run(self):
        pytest.importorskip("peft")
        with adapters(self.model, 2) as parameters:
            self.uptrain(trainable=parameters, lr=3e-2)
        self.measured = self.expected = None  # measured before the adapters were merged


class Monarch(Distillation):
    def prepare(self):
        effattn.swap(self.model, projections="monarch(blocks=4)", calibration=self.tokens)


TEXT = (torch.arange(2048) * 7) % 90  # can be learned


class Extension(Flow):
    lora = 0
    options: ClassVar = {}

    def prepare(self):
        effattn.swap(self.model, positions="yarn(length=512)")

    def run(self):
        if self.lora:
            pytest.importorskip("peft")
        found = tune(
            self.model,
            TEXT,
            target=512,
            window=64,
            train_tokens=2 * STEPS * 64,
            folder=self.folder,
            lr=1e-2,
            lora=self.lora,
            progress=self.progress,
            overrides=self.overrides,
            **self.options,
        )
        if not self.lora:  # adapters begin at zero, and learn little in few steps
            self.falls = found["losses"][0]["loss"], found["losses"][-1]["loss"]
        self.measured = self.expected = None


class LowRankExtension(Extension):
    lora = 2


class Segmented(Extension):
    """Windows that follow each other, each with a memory of those before."""

    mostly_slow = True
    options: ClassVar = {"memory": "block(block=64, look_back=1)", "sampling": None}


class LongLora(Extension):
    """Shifted blocks, adapters, and norms and embeddings beside them."""

    mostly_slow = True
    lora = 2
    options: ClassVar = {"lora_plus": True, "sampling": None}

    def prepare(self):
        effattn.swap(self.model, "s2(block=16)", positions="yarn(length=512)")


class TunedRule(Extension):
    """What extend_context does: a constant rate, and points of the model as it would be saved."""

    mostly_slow = True

    def run(self):
        rows = TEXT[:129][None]

        def measured() -> dict:
            nats, _ = token_scores(self.model, rows)
            return {"loss": nats.double().mean().item()}

        found = Tuning(TEXT, 2 * STEPS * 64, lr=1e-2).run(
            self.model,
            64,
            self.folder,
            evaluate=measured,
            progress=self.progress,
            overrides=self.overrides,
        )
        first, *_, last = found["curve"]
        self.falls = first["loss"], last["loss"]
        self.measured = {"loss": last["loss"]}
        self.model.eval()
        self.expected = measured()
        self.model.train(self.parent.training)
        self.model.model.layers[1].train()


class Recurrent(Flow):
    """Memory vectors, trained through segments with the model around which they are."""

    mostly_slow = True

    def run(self):
        reader = RecurrentMemory(self.model, memory=2, segment=16)
        before = reader.memory.detach().clone()
        found = train_memory(
            reader,
            TEXT,
            train_tokens=4 * STEPS * 64,
            segments=2,
            folder=self.folder,
            lr=1e-2,
            progress=self.progress,
            overrides=self.overrides,
        )
        self.falls = found["losses"][0]["loss"], found["losses"][-1]["loss"]
        self.measured = self.expected = None
        assert reader.memory.dtype == before.dtype
        assert torch.isfinite(reader.memory).all()
        assert not torch.equal(reader.memory, before)


class Shearing(Flow):
    def run(self):
        data = Domains(self.tokens, LENGTH)
        shared = dict(batch=2, progress=self.progress, overrides=self.overrides)
        self.result, _ = learn_masks(
            copy.deepcopy(self.model),
            Target(heads=4, ffn=48),
            data,
            tokens=8 * 2 * LENGTH,
            **shared,
        )
        self.result.train()
        found = continue_training(
            self.result,
            data,
            reference_losses(self.result, data),
            tokens=8 * 2 * LENGTH,
            lr=3e-3,
            teacher=self.parent,
            **shared,
        )
        self.falls = None
        self.measured = found["record"][-1]["losses"]
        self.expected = reference_losses(self.result, data).tolist()

    def fresh(self):
        config = copy.deepcopy(self.result.config)
        model = AutoModelForCausalLM.from_config(config, dtype=self.result.dtype)
        model.load_state_dict(self.result.state_dict())
        return model.eval()


FLOWS = [
    Conversion,
    Latent,
    Recovery,
    Fitting,
    Transfer,
    Distillation,
    LowRank,
    Monarch,
    Extension,
    LowRankExtension,
    Segmented,
    LongLora,
    TunedRule,
    Recurrent,
    Shearing,
]


def cases(dtypes, modes, usual) -> list:
    """Each flow in each dtype and mode. Slow are the dtypes beside the `usual` ones, since one
    mechanism serves all flows there: a single flow, that which needs least, always tries them. Of
    flows that are mostly slow a single case is usual."""

    def tried(flow, dtype, bf16) -> bool:
        if flow.mostly_slow:
            return bf16 and dtype == torch.bfloat16
        return dtype in usual or flow is Distillation

    return [
        pytest.param(
            flow,
            dtype,
            bf16,
            id=f"{'autocast' if bf16 else 'plain'}-{dtype}-{flow.__name__}",
            marks=() if tried(flow, dtype, bf16) else pytest.mark.slow,
        )
        for bf16, dtype, flow in itertools.product(modes, dtypes, FLOWS)
    ]


def ready(flow, *given, **named) -> Flow:
    made = flow(*given, **named)
    made.prepare()
    made.prepared = copy.deepcopy(made.model)
    return made


def flags(model: nn.Module) -> dict:
    """All that training could leave behind, besides the values of weights."""
    return {
        "modules": {name: module.training for name, module in model.named_modules()},
        "parameters": {
            name: (p.requires_grad, p.dtype, p.grad) for name, p in model.named_parameters()
        },
        "attributes": {
            (name, key) for name, module in model.named_modules() for key in vars(module)
        },
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "config": (model.config.use_cache, str(model.config.dtype)),
    }


@pytest.mark.parametrize(("flow", "dtype", "bf16"), cases(DTYPES, (True, False), usual=DTYPES[:2]))
def test_a_trained_model_is_its_own(flow, dtype, bf16, tokens, tmp_path):
    made = ready(flow, tokens, tmp_path, dtype, bf16)
    parent, student = flags(made.parent), flags(made.model)
    weights = {name: p.clone() for name, p in made.parent.named_parameters()}
    made.run()
    assert flags(made.parent) == parent
    assert all(torch.equal(p, weights[name]) for name, p in made.parent.named_parameters())
    if made.result is made.model:
        assert flags(made.model) == student
    else:
        assert {p.dtype for p in made.result.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in made.result.parameters())
    assert not any("forward" in vars(module) for module in made.result.modules())
    with torch.no_grad():
        ids = tokens[None, :LENGTH]
        found = made.result.eval()(ids).logits
        assert torch.equal(found, made.fresh()(ids).logits)
        assert not torch.equal(found, made.parent.eval()(ids).logits)
    if made.falls:
        assert made.falls[1] < made.falls[0]
    assert made.measured == made.expected


class Stop(BaseException):
    """As Ctrl-C is."""


@pytest.mark.parametrize(("flow", "dtype", "bf16"), cases(DTYPES[:3], (True,), usual=DTYPES[1:2]))
def test_an_interrupted_model_is_its_own(flow, dtype, bf16, tokens, tmp_path):
    def stop(done, total):
        raise Stop

    made = ready(flow, tokens, tmp_path, dtype, bf16, progress=stop)
    parent, student = flags(made.parent), flags(made.model)
    with pytest.raises(Stop):
        made.run()
    assert flags(made.parent) == parent
    assert flags(made.model) == student


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "plain"])
def test_half_precision_trains_as_fp32_does(dtype, bf16, tokens, tmp_path):
    """The weights of the same run in fp32, rounded once."""
    half = Conversion(tokens, tmp_path, dtype, bf16)
    half.prepare()
    single = copy.deepcopy(half.model).float()
    teacher = copy.deepcopy(half.parent).float()
    for student in (half.model, single):
        uptrain(
            student,
            teacher,
            tokens,
            train_tokens=512,
            length=LENGTH,
            folder=tmp_path,
            overrides=half.overrides,
        )
    for (name, found), expected in zip(
        half.model.named_parameters(), single.parameters(), strict=True
    ):
        assert torch.equal(found, expected.to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_a_killed_run_goes_on_from_its_masters(dtype, tokens, tmp_path):
    """Checkpoints of a half-precision run hold fp32 weights: rounded ones would end elsewhere."""

    def stop(done, total):
        if done == 3:
            raise Stop

    settings = {"train_tokens": 6 * LENGTH, "length": LENGTH, "batch": 1, "save_every": 2}
    ends = []
    for name in ("whole", "killed"):
        made = ready(Conversion, tokens, tmp_path / name, dtype, True)
        settings |= {"folder": made.folder, "overrides": {"use_cpu": True, "bf16": True}}
        if name == "killed":
            with pytest.raises(Stop):
                uptrain(copy.deepcopy(made.model), made.parent, tokens, progress=stop, **settings)
            assert (made.folder / "checkpoint-2").is_dir()
        uptrain(made.model, made.parent, tokens, **settings)
        ends.append(made.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "plain"])
def test_adapters_leave_frozen_bf16_weights_alone(dtype, bf16, tokens, tmp_path):
    """In memory, too: only fp16 weights are in fp32 beneath them."""
    pytest.importorskip("peft")
    seen = {}

    def look(done, total):
        for name, parameter in made.model.named_parameters():
            seen.setdefault("lora" if "lora_" in name else "frozen", set()).add(parameter.dtype)

    made = ready(LowRankExtension, tokens, tmp_path, dtype, bf16, progress=look)
    made.run()
    beneath = torch.float32 if dtype == torch.float16 else dtype
    assert seen == {"lora": {torch.promote_types(dtype, torch.float32)}, "frozen": {beneath}}


def test_what_the_dtype_cannot_hold_is_refused():
    model = tiny("llama", dtype=torch.float16)
    weight = model.model.layers[1].mlp.up_proj.weight
    with (
        pytest.raises(
            FloatingPointError,
            match=r"layers.1.mlp.up_proj.weight has come to 7e\+04, beyond torch.float16",
        ),
        training.lent(model),
    ):
        weight.data[0, 0] = 7e4
    assert weight.dtype == torch.float32
    assert weight[0, 0] == 7e4
    for dtype in DTYPES:
        model = tiny("llama", dtype=dtype)
        with (
            pytest.raises(FloatingPointError, match=r"norm.weight is not finite any more"),
            training.lent(model),
        ):
            model.model.norm.weight.data[0] = float("nan")


def test_masters_that_do_not_fit_leave_the_model_alone(monkeypatch):
    model = tiny("llama", dtype=torch.float16)
    before, weights = flags(model), copy.deepcopy(model.state_dict())
    single, calls = torch.Tensor.float, []

    def float_(tensor):
        calls.append(tensor)
        if len(calls) > 3:
            raise MemoryError
        return single(tensor)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    with pytest.raises(MemoryError), training.lent(model):
        pass
    assert flags(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "plain"])
def test_nothing_of_a_trainer_stays(bf16, tokens, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    before = flags(model)
    with training.lent(model):
        arguments = training.arguments(
            tmp_path,
            steps=2,
            batch=1,
            lr=1e-3,
            warmup=0,
            save_every=1,
            bf16=bf16,
            activation_checkpointing=True,
        )
        training.train(
            Trainer(model, arguments, train_dataset=training.TokenWindows(tokens, LENGTH, 2))
        )
        assert flags(model) != before
    assert flags(model) == before
    assert not model.model.gradient_checkpointing


@pytest.mark.parametrize("pays", [True, False], ids=["units", "emulated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruning_gives_the_dtype_back(dtype, pays, tokens, monkeypatch):
    """Layers run in bf16 where that pays, and in fp32 elsewhere: what is pruned differs no more
    than by rounding.
    """
    monkeypatch.setattr(training, "bf16_pays", lambda on_cpu=None: pays)
    model = tiny("llama", dtype=dtype)
    before = flags(model)
    effattn.prune.oneshot(model, tokens, method="sparsegpt", sparsity=0.5, length=64)
    assert flags(model) == before
    exact = tiny("llama", dtype=dtype).double()
    effattn.prune.oneshot(exact, tokens, method="sparsegpt", sparsity=0.5, length=64)
    for found, expected in zip(
        model.model.layers.parameters(), exact.model.layers.parameters(), strict=True
    ):
        if found.dim() == 2:
            assert (found == 0).float().mean() == 0.5
            assert ((found == 0) != (expected == 0)).float().mean() < 0.01


def test_bf16_is_asked_of_the_device_that_trains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert bf16_pays()
    assert not bf16_pays(on_cpu=True)


@pytest.mark.parametrize(
    "pattern",
    [pytest.param(one, marks=() if one == "dense" else pytest.mark.slow) for one in eighths(32)],
)
def test_the_arena_learns_in_autocast_as_in_fp32(pattern, monkeypatch):
    """Every bidirectional pattern, trained from scratch; its encoder's weights stay in fp32."""
    budget = Budget(length=32, width=16, heads=2, examples=200, tested=50, steps=40, lr=3e-3)
    losses, forward = [], Encoder.forward
    for bf16 in (False, True):  # around the forward call alone, as a Trainer has it
        inside = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(forward)
        monkeypatch.setattr(Encoder, "forward", inside)
        losses.append(train(TASKS["listops"], pattern, budget, lambda done, total: None)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]
    assert losses[0] < 2.30, "less than one who knows nothing of ten classes"
