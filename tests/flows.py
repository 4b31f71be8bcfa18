"""The flows, a row each: what a test must know to run one. tests/recipes/test_flows.py says that
every recipe has a row, and what is true of every row."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

CPU = {"use_cpu": True, "bf16": False}  # the same arithmetic everywhere
TRAINED = dict(length=32, evaluation_tokens=128, overrides=CPU, seed=1)


@dataclass(frozen=True)
class Flow:
    """A file of recipes.

    command: how `effattn` is asked for it; None where it is a script alone. needs: the settings
    without which it is refused, beside the output. small: settings of a run of a second on a tiny
    model; None where nothing can be killed. reads: the setting that takes files of text. saves: a
    checkpoint, which is proven. trains: the classes of tests/training/test_precision.py that train
    as it does, in every precision. checked: numbers that it checks itself, with words of its own.
    model: the folder in the tiny checkpoint's that has the one it takes, where it is another.
    """

    command: str | None
    needs: dict = field(default_factory=dict)
    small: dict | None = None
    reads: str | None = "text"
    saves: bool = True
    trains: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    model: str | None = None

    def of(self, model: str) -> str:
        """The model of its small run."""
        return model if self.model is None else str(Path(model) / self.model)

    def words(self) -> list[str]:
        """What must be on the command line, the output excepted."""
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in self.needs.items()]
        return [word for pair in pairs for word in pair]


FLOWS = {
    "convert_gqa": Flow(
        "convert-gqa",
        {"kv_heads": 2},
        dict(calibration_tokens=640, uptrain_tokens=4 * 64, batch=2, decode_contexts=(), **TRAINED),
        trains=("Conversion",),
    ),
    "convert_latent": Flow(
        "convert-latent",
        {"ratio": 0.5},
        dict(calibration_tokens=640, uptrain_tokens=4 * 64, batch=2, decode_contexts=(), **TRAINED),
        trains=("Latent",),
    ),
    "convert_mla": Flow(
        "convert-mla",
        {"rank": 8},
        dict(calibration_tokens=640, evaluation_tokens=128, length=32, decode_contexts=()),
    ),
    "fit": Flow(
        "fit",
        {"weight_bytes": "80%"},
        dict(
            weight_bytes="80%",
            allow=("ffn",),
            calibration_tokens=1024,
            score_tokens=64,
            rounds=1,
            recover_tokens=3 * 64,
            retrieval_trials=0,
            decode_steps=0,
            **TRAINED,
        ),
        trains=("Fitting",),
        # amounts with units
        checked=("bytes", "kv_bytes_per_token", "weight_bytes", "parameters", "tokens_per_s"),
    ),
    "linearize": Flow(
        "linearize",
        small=dict(
            pattern="performer(features=8)",
            transfer_tokens=3 * 32,
            distil_tokens=3 * 32,
            **TRAINED,
        ),
        trains=("Transfer", "Distillation", "LowRank", "Monarch"),
    ),
    "extend": Flow(
        "extend",
        {"to": 4096},
        dict(
            to=256,
            rule="yarn(length=256)",
            tune_tokens=3 * 32,
            window=32,
            sequences=0,
            seed=1,
            overrides=CPU,
        ),
        trains=("Extension", "LowRankExtension", "Segmented", "LongLora"),
        checked=("to",),  # against the model
    ),
    "extend_context": Flow(None),
    "lra": Flow(None),
    "export": Flow(
        "export",
        {"to": "transformers"},
        dict(to="transformers", check=True),
        reads=None,
        checked=("kv_skip",),  # against the model's layers
    ),
    "swap_backend": Flow(
        "swap",
        small=dict(
            patterns=("linear(feature_map='hedgehog')",),
            contexts=(16,),
            evaluation_tokens=16,
            stream_tokens=64,
            dense_stream_tokens=32,
            prompt_tokens=8,
            generate_tokens=0,
        ),
    ),
    "measure": Flow(
        "measure", small=dict(contexts=(16, 24), steps=1, seconds=0.01), reads=None, saves=False
    ),
    "quantize_kv": Flow(
        "quantize-kv",
        small=dict(
            formats=("int8(group=16, residual=16)",),
            evaluation_tokens=400,
            sensitivity_tokens=32,
            length=32,
            retrieval_trials=0,
            decode_contexts=(),
        ),
        checked=("bits",),  # names
    ),
    "prune_oneshot": Flow(
        "prune oneshot",
        small=dict(
            methods=("wanda",),
            calibration_tokens=256,
            evaluation_tokens=128,
            length=32,
            measure="no",
        ),
        trains=("Recovery",),
    ),
    "prune_structured": Flow(
        "prune structured",
        {"ffn": "25%"},
        dict(
            ffn=48,
            criteria=("random",),
            compensate=False,
            calibration_tokens=256,
            evaluation_tokens=128,
            length=32,
            decode_contexts=(),
        ),
        checked=("heads", "ffn", "layers"),  # shares or numbers
    ),
    "rehost": Flow("rehost", small=dict(evaluation_tokens=128, length=32), model="gpt_neox"),
    "shear": Flow(
        "shear",
        {"ffn": 48},
        dict(
            heads=4,
            ffn=48,
            mask_tokens=3 * 64,
            recover_tokens=3 * 64,
            batch=2,
            decode_contexts=(),
            warm_start=None,
            **TRAINED,
        ),
        reads="domains",
        trains=("Shearing",),
    ),
    "sweep_gqa": Flow(None),
    "pretrain_embedded": Flow(None),
}

COMMANDS = {flow.command: flow.words() for flow in FLOWS.values() if flow.command}
KILLED = [name for name, flow in FLOWS.items() if flow.small is not None]


def module_of(name: str) -> ModuleType:
    """The module of a recipe, which has `Settings` and `run`."""
    return importlib.import_module(f"effattn.recipes.{name}")


def run_small(name: str, model: str, text: Path, out: Path, show=None, **more):
    """The flow on a tiny checkpoint and a file of text."""
    flow, recipe = FLOWS[name], module_of(name)
    given = flow.needs | flow.small | {"model": flow.of(model), "output": out} | more
    texts = {flow.reads: (text,)} if flow.reads else {}
    return recipe.run(recipe.Settings(**given, **texts), show)


def save_small(root: Path) -> None:
    """The tiny checkpoint, whose tokens are bytes, as root/model, and root/text.txt."""
    import torch
    from conftest import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(vocab_size=257, special_tokens=["<e>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([""], trainers.BpeTrainer(**settings))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>").save_pretrained(root / "model")
    tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained(root / "model")
    # the parent of flows that take another class
    other = root / "model" / "gpt_neox"
    tiny("gpt_neox", dtype=torch.float32, vocab_size=257).save_pretrained(other)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>").save_pretrained(other)
    (root / "text.txt").write_text("".join(f"{n} times {n} is {n * n}, " for n in range(3000)))
