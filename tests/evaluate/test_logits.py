"""Logits in pieces: the same losses and gradients as from all of them at once, and no tensor that
grows with the vocabulary times the tokens, in whatever makes logits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import effattn
from effattn.calibration.layerwise import windows
from effattn.evaluate import logits
from effattn.evaluate.curve import token_scores
from effattn.evaluate.logits import next_token_losses, training_loss
from effattn.evaluate.loss import compare, token_losses
from effattn.evaluate.retrieval import Prompts, answer
from effattn.evaluate.streaming import stream_losses
from effattn.extending.tuning import tune
from effattn.hf import anatomy as hf
from effattn.hf.last_logits import last_only
from effattn.prune.shearing.batch_loading import Domains
from effattn.prune.shearing.training import Shearing
from effattn.prune.structural import criteria
from effattn.quant.sensitivity.tokenwise import tokenwise
from effattn.training.transfer import transfer
from effattn.training.uptrain import uptrain

PIECE = 7 * 4 * 96  # bytes of seven positions of the tiny models' vocabulary
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt_neox": {},
    "opt": {},
    "phi": {},  # its head has a bias
}


def results(model, make) -> list[torch.Tensor]:
    """A loss, and the gradients of every parameter."""
    model.zero_grad()
    loss = make()
    loss.mean().backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("kind", "settings"), FAMILIES.items(), ids=FAMILIES)
def test_losses_and_gradients_of_pieces_are_those_of_the_whole(kind, settings, tokens, monkeypatch):
    model, ids = tiny(kind, **settings), tokens[:96].view(2, 48)

    def plain() -> torch.Tensor:
        scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")

    expected = results(model, plain)
    whole = results(model, lambda: next_token_losses(model, ids))
    own = results(model, lambda: training_loss(model, ids))
    monkeypatch.setattr(logits, "BYTES", PIECE)
    pieces = results(model, lambda: next_token_losses(model, ids))
    mean = results(model, lambda: training_loss(model, ids))
    assert len(expected) > 10
    for a, b, c, d, e in zip(expected, whole, pieces, own, mean, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(c, a, rtol=1e-11, atol=1e-13)
        # transformers' own is in fp32
        torch.testing.assert_close(d, e, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_a_loss_that_is_more_than_next_tokens_stays_the_models_own(tokens, monkeypatch):
    model, ids = (
        tiny("mixtral", dtype=torch.float32, output_router_logits=True),
        tokens[:96].view(2, 48),
    )
    monkeypatch.setattr(logits, "BYTES", PIECE)
    with torch.no_grad():
        found = training_loss(model, ids)
        assert found == model(input_ids=ids, labels=ids).loss
        assert found > next_token_losses(model, ids).mean() + 1e-3


@pytest.mark.parametrize("taught", [False, True])
def test_shearing_learns_the_same_from_pieces(taught, tokens, monkeypatch):
    model, ids = tiny("llama"), tokens[:96].view(2, 48)
    teacher = tiny("llama", seed=1) if taught else None
    module = Shearing(model, torch.nn.Identity(), teacher=teacher).train()
    whole = results(model, lambda: module(ids)["loss"])
    monkeypatch.setattr(logits, "BYTES", PIECE)
    pieces = results(model, lambda: module(ids)["loss"])
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if taught else {"rtol": 1e-5, "atol": 1e-6}
    tolerance["check_dtype"] = False  # transformers' own loss is in fp32
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.parametrize("name", ["taylor", "michel"])
def test_criteria_rank_the_same_from_pieces(name, tokens, monkeypatch):
    parts, batches = hf.of(tiny("gemma2")), windows(tokens[:128], 32, 2)
    known = criteria.find(name).targets
    whole = criteria.measure(name, parts, batches, known)
    monkeypatch.setattr(logits, "BYTES", PIECE)
    pieces = criteria.measure(name, parts, batches, known)
    for target in known:
        a, b = (getattr(found, target) for found in (whole, pieces))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=0)  # sums over tokens are in fp32


# ---- a large vocabulary
# -------------------------------------------------------------------------------------------------

VOCABULARY = 262_144
LENGTH, BATCH = 32, 2
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
TABLE = VOCABULARY * 8 * 4  # bytes of the embedding: eight positions' logits are as many


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made, forward or backward."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return output


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(VOCABULARY, (512,), generator=torch.Generator().manual_seed(0))


def large(seed: int = 0):
    return tiny("llama", seed=seed, dtype=torch.float32, tie_word_embeddings=True, **SIZES)


def distilled(text, folder, **settings):
    steps = dict(
        train_tokens=LENGTH * BATCH,
        folder=folder,
        length=LENGTH,
        batch=BATCH,
    )
    uptrain(
        large(),
        large(1),
        text,
        **steps,
        **settings,
    )


def tuned(text, folder, **settings):
    steps = dict(
        train_tokens=LENGTH * BATCH,
        folder=folder,
        window=LENGTH,
        batch=BATCH,
    )
    tune(
        large(),
        text,
        target=64,
        **steps,
        **settings,
    )


def transferred(text, folder):
    steps = dict(
        train_tokens=LENGTH * BATCH,
        folder=folder,
        length=LENGTH,
        batch=BATCH,
    )
    transfer(large(), large(1), text, layers=[0, 1], **steps)


def sheared(text, folder, **settings):
    domains, tokens = Domains(text, LENGTH, held_out=2), LENGTH * BATCH
    budgets = dict(
        mask_tokens=tokens,
        recover_tokens=tokens,
        continue_tokens=tokens,
    )
    small = effattn.prune.Target(ffn=8)
    effattn.prune.shear(
        large(),
        small,
        domains,
        **budgets,
        batch=BATCH,
        **settings,
    )


def pruned(text, criterion):
    target = {"layers": 1} if criterion == "block_influence" else {"ffn": 8}
    effattn.prune.structured(
        large(),
        text[:256],
        **target,
        length=64,
        criterion=criterion,
    )


def asked(text):
    prompts = Prompts(
        text[:192].view(2, 96),
        text[:8].view(2, 4),
        torch.ones(4, dtype=torch.bool),
    )
    answer(large(), prompts, batch=2)


FLOWS = {
    "uptrain": distilled,
    "uptrain, all weights": lambda text, folder: distilled(text, folder, trainable="all"),
    "tune": tuned,
    "tune, whole windows": lambda text, folder: tuned(text, folder, sampling=None),
    "tune with LoRA": lambda text, folder: tuned(text, folder, lora=2),
    "transfer": transferred,
    "shear": sheared,
    "shear as in the paper": lambda text, folder: sheared(text, folder, distill=False),
    "convert_gqa": lambda text, _: effattn.convert_gqa(
        large(), kv_heads=2, calibration=text, length=64
    ),
    "oneshot": lambda text, _: effattn.prune.oneshot(large(), text, length=64),
    "perplexity": lambda text, _: token_losses(large(), text[:129], 64),
    "compare": lambda text, _: compare(large(), large(1), text[:129], 64),
    "by position": lambda text, _: token_scores(large(), text[:130].view(2, 65), batch=2),
    "stream": lambda text, _: stream_losses(large(), text[:65], chunk=64),
    "retrieval": lambda text, _: asked(text),
    "token by token": lambda text, _: tokenwise(large(), large(1), text[:65], 32, batch=2),
}
FLOWS |= {
    f"criterion {name}": lambda text, _, name=name: pruned(text, name) for name in criteria.CRITERIA
}


@pytest.mark.parametrize("name", FLOWS)
def test_nothing_grows_with_the_vocabulary_times_the_tokens(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "BYTES", TABLE)
    with Largest() as largest:
        FLOWS[name](text, tmp_path)
    # the embedding, or logits of eight positions: of all tokens of a batch, eight times that
    assert TABLE // 8 < largest.bytes <= TABLE


def test_logits_of_the_last_token_only_where_a_class_has_that():
    assert last_only(tiny("llama")) == {"logits_to_keep": 1}
    assert last_only(torch.nn.Linear(2, 2)) == {}
