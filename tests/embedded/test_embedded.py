"""The embedded model and corpus: real, reproducible, held out, and better than xz."""

from __future__ import annotations

import lzma

import pytest
import torch

import effattn
from effattn.embedded import corpus
from effattn.evaluate.loss import token_losses
from effattn.recipes import pretrain_embedded
from effattn.recipes.pretrain_embedded import Settings
from effattn.training.lending import TokenWindows


@pytest.mark.quick
def test_the_model_is_the_multi_head_llama_of_its_card():
    model, tokenizer = effattn.embedded.load()
    config, card = model.config, effattn.embedded.card()
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == (
        "llama",
        8,
        8,
    )
    assert config.max_position_embeddings == card["length"] == 512
    assert model.num_parameters() == card["parameters"]
    assert config.use_cache
    assert not model.training
    assert len(tokenizer) == config.vocab_size
    size = sum(file.stat().st_size for file in effattn.embedded.directory().iterdir())
    assert size <= 16 * 2**20
    assert {file.suffix for file in effattn.embedded.directory().iterdir()} == {
        ".json",
        ".safetensors",
    }


def test_it_beats_xz_on_the_same_bytes():
    """On some validation files, here and now (the card's figure is over all of them)."""
    model, tokenizer = effattn.embedded.load()
    nats = size = 0
    texts = [text for _, text in corpus.documents("validation")[:6]]
    for text in texts:
        text = text[:12_000]
        ids = [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        nats += float(token_losses(model, torch.tensor(ids), 512, 256).sum())
        size += len(text.encode())
    bits = nats / torch.tensor(2.0).log().item() / size
    card = effattn.embedded.card()
    assert bits < card["bits_per_byte_xz_9e"]
    assert card["bits_per_byte"] < card["bits_per_byte_xz_9e"]
    assert abs(bits - card["bits_per_byte"]) < 0.4  # the card is about this model


@pytest.mark.quick
def test_the_tokenizer_is_lossless():
    _, tokenizer = effattn.embedded.load()
    for text in (
        "def f(x):\n\treturn  x  # ünïcode ∑\n\n",
        "\r\n\x00 end",
        corpus.documents("validation")[0][1][:3000],
    ):
        assert (
            tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False)
            == text
        )


@pytest.mark.quick
def test_tokens_are_whole_files_end_to_end():
    _, tokenizer = effattn.embedded.load()
    ids = effattn.embedded.tokens("validation", 20_000)
    assert ids.dtype == torch.int64
    assert ids.shape == (20_000,)
    assert torch.equal(ids[:5000], effattn.embedded.tokens("validation", 5000))
    first = corpus.documents("validation")[0][1]
    end = (ids == tokenizer.eos_token_id).nonzero()[0].item()
    assert tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) == first
    ends = (effattn.embedded.tokens("validation") == tokenizer.eos_token_id).nonzero().flatten()
    assert ends.diff().max() > 4096  # contexts of 4096 and more are natural text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 10), "split: got 'test', valid are 'train', 'validation'"),
        (("train", 0), "n: got 0"),
        (("validation", 10**9), "the validation split has"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        effattn.embedded.tokens(*arguments)


@pytest.mark.quick
def test_splits_do_not_share_text():
    train, held_out = (corpus.documents(split) for split in corpus.SPLITS)
    assert not {name for name, _ in train} & {name for name, _ in held_out}
    assert not {text for _, text in train} & {text for _, text in held_out}
    windows = set().union(*(corpus._windows(text) for _, text in held_out))
    for name, text in train:
        own = corpus._windows(text)
        assert len(own & windows) <= corpus.NEAR_DUPLICATE * max(1, len(own)), name
        assert "site-packages" not in name
        assert "/data/" not in name


@pytest.mark.quick
def test_a_file_keeps_its_side_in_every_python():
    """The split is a function of the path alone: pinned here for a few files of the library."""
    names = {name: split for split in corpus.SPLITS for name, _ in corpus.documents(split)}
    assert names["typing.py"] == names["tarfile.py"] == "validation"
    assert names["argparse.py"] == names["json/decoder.py"] == "train"


@pytest.mark.quick
def test_training_windows_visit_everything_once_a_pass():
    tokens = torch.arange(1000)
    data = TokenWindows(tokens, 10, 250, seed=3)
    first, second = (
        [data[i]["input_ids"][0].item() for i in range(p * 99, (p + 1) * 99)] for p in (0, 1)
    )
    assert len(set(first)) == len(set(second)) == 99
    assert sorted(first)[1] - sorted(first)[0] == 10
    assert first != second
    again = TokenWindows(tokens, 10, 250, seed=3)
    assert torch.equal(again[200]["input_ids"], data[200]["input_ids"])  # any order of access
    with pytest.raises(ValueError, match="need at least 2,000"):
        TokenWindows(tokens, 1000, 1)


def test_training_windows_of_documents():
    """Positions begin anew behind each token that closes a document; windows stay the same."""
    tokens = torch.arange(1000) % 7
    plain, packed = (TokenWindows(tokens, 10, 250, seed=3, end=end) for end in (None, 4))
    for n in (0, 120, 249):
        window = packed[n]["input_ids"]
        assert torch.equal(plain[n]["input_ids"], window)
        assert "position_ids" not in plain[n]
        expected, at = [], 0
        for token in window.tolist():
            expected.append(at)
            at = 0 if token == 4 else at + 1
        assert packed[n]["position_ids"].tolist() == expected


def test_pretraining_makes_a_checkpoint_and_a_card(tmp_path, monkeypatch):
    """The whole recipe on three small documents, killed once and resumed to the same weights."""
    texts = {
        "train": [
            ("a.py", "import os\nprint(os.getcwd())\n" * 200),
            ("b.py", "x = [1, 2, 3]\n" * 300),
        ],
        "validation": [("c.py", "import sys\nprint(sys.path, [1, 2])\n" * 150)],
    }
    monkeypatch.setattr(corpus, "documents", texts.__getitem__)
    settings = dict(
        tokens=12 * 64,
        hidden=32,
        layers=1,
        vocabulary=300,
        length=32,
        batch=2,
        overrides={"disable_tqdm": True, "use_cpu": True, "bf16": False},
    )
    card = pretrain_embedded.run(Settings(tmp_path / "whole", **settings))
    assert card["train_tokens"] == 12 * 64
    data = texts["validation"][0][1].encode()
    assert card["validation_bytes"] == len(data)
    assert card["bits_per_byte_xz_9e"] == pytest.approx(
        8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    )
    assert [point for point in card["loss_curve"] if "eval_loss" in point]
    from safetensors.torch import load_file

    whole = load_file(tmp_path / "whole" / "model.safetensors")

    import transformers
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    trainer = transformers.Trainer
    monkeypatch.setattr(transformers, "Trainer", lambda **kw: trainer(**kw, callbacks=[Kill()]))
    with pytest.raises(KeyboardInterrupt):
        pretrain_embedded.run(Settings(tmp_path / "killed", **settings))
    monkeypatch.setattr(transformers, "Trainer", trainer)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    pretrain_embedded.run(Settings(tmp_path / "killed", **settings))
    killed = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
