"""BOS: whose windows begin with it, that it takes the first token's place, and is never scored."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import effattn
from effattn import encoding
from effattn.calibration import layerwise
from effattn.evaluate.curve import token_scores
from effattn.evaluate.loss import compare, token_losses
from effattn.evaluate.streaming import stream_losses
from effattn.hf.beginning import bos_of, settle
from effattn.prune.shearing.batch_loading import Domains, DomainWindows, LoadingWeights
from effattn.prune.shearing.ranking import calibration_windows
from effattn.prune.unstructured import from_files
from effattn.quant.sensitivity.tokenwise import tokenwise
from effattn.surgery.checkpoint import load_model
from effattn.training.lending import TokenWindows

BOS = 1
MASSIVE = 40.0  # of the embedding of BOS: what a window has without it is another model's


def words(begins: bool) -> PreTrainedTokenizerFast:
    """A word is its number, w5 is 5; `begins`: it puts BOS before every text."""
    vocabulary = {"<unk>": 0, "<bos>": BOS, "<eos>": 2} | {f"w{i}": i for i in range(3, 96)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def model_of(**options):
    """A model that begins with BOS: that token alone is massive, and all others look at it."""
    model = tiny("llama", **options)
    model.config.bos_token_id = BOS
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= MASSIVE
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["begins", "does not"])
def saved(request, tmp_path_factory):
    """(folder of a checkpoint with a tokenizer, the token that its texts begin with)."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    effattn.save(model_of(dtype=torch.float32), folder, words(request.param))
    return folder, BOS if request.param else None


# ---- who begins with it
# -------------------------------------------------------------------------------------------------


def test_the_tokenizer_beside_the_checkpoint_decides(saved):
    folder, expected = saved
    model = effattn.load(folder)
    assert bos_of(model) == expected
    assert bos_of(copy.deepcopy(model)) == expected
    assert bos_of(model, True) == BOS
    assert bos_of(model, False) is None
    assert bos_of(load_model(folder)[0]) == expected
    # settled once, whatever lies there
    for asked, told in ((True, BOS), (False, None)):
        assert bos_of(copy.deepcopy(load_model(folder, bos=asked)[0])) == told


def test_a_config_alone_says_nothing():
    model = tiny("llama")
    assert model.config.bos_token_id is not None
    assert bos_of(model) is None
    assert bos_of(model, True) == model.config.bos_token_id
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match=r"bos: got True, neither .* has a BOS token"):
        bos_of(model, True)
    with pytest.raises(ValueError, match="bos: got 1, valid is True, False or None"):
        bos_of(model, 1)


def test_a_tokenizer_without_bos():
    plain = words(True)
    plain.bos_token = None
    assert encoding.beginning(plain) is None
    with pytest.raises(ValueError, match="bos: got True, the tokenizer has no BOS token"):
        settle(tiny("llama"), True, plain)


def test_the_embedded_model_has_none():
    model, _ = load_model("embedded")
    assert bos_of(model) is None
    assert bos_of(effattn.embedded.load()[0]) is None


def test_a_window_that_begins_with_it_stays(tokens):
    row = tokens[:8].clone()
    begun = encoding.begun(row, BOS)
    assert begun[0] == BOS
    assert torch.equal(begun[1:], row[1:])
    assert torch.equal(encoding.begun(begun, BOS), begun)
    assert encoding.begun(row, None) is row


# ---- where windows are cut
# -------------------------------------------------------------------------------------------------


def rows_of(ids, length):
    """What windows of `length` of a stream are with BOS: (inputs, next tokens)."""
    rows = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length).clone()
    truth = rows[:, 1:].clone()
    rows[:, 0] = BOS
    return rows[:, :-1], truth


def nats_of(model, inputs, truth):
    logits = model(input_ids=inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), truth, reduction="none")


@torch.no_grad()
def test_evaluation(tokens):
    model, ids = model_of(), tokens[:97]
    inputs, truth = rows_of(ids, 32)
    expected = nats_of(model, inputs, truth).flatten()
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(token_losses(model, ids, 32, bos=True), expected, **near)
    assert not torch.allclose(token_losses(model, ids, 32), expected, **near)
    assert effattn.perplexity(model, ids, 32, bos=True) == pytest.approx(
        expected.mean().exp().item(), rel=1e-4
    )
    # overlapping windows, the context that is not scored included
    found = token_losses(model, ids, 32, 8, bos=True)
    window = ids[8:41].clone()
    last = nats_of(model, encoding.begun(window[:-1], BOS)[None], window[None, 1:])[0, -8:]
    torch.testing.assert_close(found[32:40], last, **near)
    sequences = ids.unfold(0, 33, 32)
    nats, _ = token_scores(model, sequences, bos=True)
    torch.testing.assert_close(nats.flatten(), expected, **near)
    streamed, _ = stream_losses(model, ids[:33], 8, bos=True)
    torch.testing.assert_close(streamed, expected[:32], **near)
    step = tokenwise(model, model, ids[:33], 32, bos=True)
    assert step["cross_entropy"] == pytest.approx(expected[:32].mean().item(), rel=1e-4)
    other = model_of(seed=3)
    both = compare(model, other, ids, 32, bos=True)
    assert both["cross_entropy"] == pytest.approx(
        nats_of(other, inputs, truth).mean().item(), rel=1e-4
    )


def test_calibration_and_training_windows(tokens):
    batches = layerwise.windows(tokens[:100], 32, 2, BOS)
    assert [len(batch) for batch in batches] == [2, 1]
    rows = torch.cat(batches)
    assert torch.equal(rows[:, 1:], tokens[:96].view(3, 32)[:, 1:])
    assert (rows[:, 0] == BOS).all()
    plain, begun = (TokenWindows(tokens, 32, 40, seed=1, bos=bos) for bos in (None, BOS))
    for index in range(40):
        one, other = (rows[index]["input_ids"] for rows in (plain, begun))
        assert other[0] == BOS
        assert torch.equal(one[1:], other[1:])
        assert torch.equal(begun[index]["labels"], other)
    domains = Domains({"a": tokens[:1000], "b": tokens[1000:]}, 32, bos=BOS)
    assert all((rows[:, 0] == BOS).all() for rows in domains.held_out.values())
    assert all((rows[:, 0] == BOS).all() for rows in calibration_windows(domains))
    weights = LoadingWeights(domains.proportions, 1)
    assert DomainWindows(domains, weights, 4, 2, 4)[0]["input_ids"][0] == BOS


def seen_by(monkeypatch, run):
    """The first tokens of all windows that `run` gives a model."""
    first, real = [], layerwise.windows

    def noted(tokens, length, batch, bos=None):
        first.append(bos)
        return real(tokens, length, batch, bos)

    for module in (
        "effattn.heads.converting",
        "effattn.prune.unstructured.calibration",
        "effattn.surgery.codebooks",
        "effattn.surgery.replace",
        "effattn.calibration.layerwise",
        "effattn.training.transfer",
    ):
        monkeypatch.setattr(f"{module}.windows", noted)
    run()
    return set(first)


@pytest.mark.parametrize("bos", [None, True, False])
def test_methods_are_calibrated_as_the_model_is_used(saved, bos, tokens, monkeypatch, tmp_path):
    folder, own = saved
    expected = {None: own, True: BOS, False: None}[bos]

    def convert():
        report = effattn.convert_gqa(effattn.load(folder), 1, tokens, length=64, bos=bos)
        assert report.settings["bos"] == (expected is not None)

    def oneshot():
        report = effattn.prune.oneshot(effattn.load(folder), tokens, length=64, bos=bos)
        assert report.data["settings"]["bos"] == (expected is not None)

    def files():
        told = from_files.prune_files(folder, tmp_path / "out", tokens, length=64, bos=bos)
        assert told["settings"]["bos"] == (expected is not None)

    def structured():
        model = effattn.load(folder)
        _, report = effattn.prune.structured(model, tokens, ffn=0.5, length=64, bos=bos)
        assert report.data["settings"]["bos"] == (expected is not None)

    for run in (convert, oneshot, files, structured):
        assert seen_by(monkeypatch, run) == {expected}, run.__name__


def test_swaps_are_calibrated_so_too(saved, tokens, monkeypatch):
    folder, own = saved

    for bos, expected in ((None, own), (True, BOS), (False, None)):

        def swap(bos=bos):
            effattn.swap(effattn.load(folder), "vq(codes=8)", calibration=tokens, bos=bos)
            given = "monarch(blocks=4, method='data')"
            effattn.swap(effattn.load(folder), projections=given, calibration=tokens, bos=bos)
            effattn.swap(effattn.load(folder), heads="mqa", calibration=tokens, bos=bos)

        assert seen_by(monkeypatch, swap) == {expected}
    model = effattn.load(folder)
    effattn.swap(model, "sliding", window=8, bos=not own)
    assert bos_of(model) == own


def test_retrieval_begins_with_it(saved, monkeypatch):
    from effattn.evaluate import retrieval

    folder, own = saved
    model, first = effattn.load(folder), []
    prompts = retrieval.Prompts(
        torch.full((2, 20), 7), torch.full((2, 1), 9), torch.ones(1, dtype=torch.bool)
    )
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: first.append(int(args[0][0, 0]))
    )
    for bos, expected in ((None, own or 7), (True, BOS), (False, 7)):
        first.clear()
        retrieval.answer(model, prompts, chunk=8, bos=bos)
        assert first == [expected, 7, 7, 9]
    handle.remove()


def test_recipes_say_and_do_it(saved, tmp_path):
    """convert-gqa from a file: measured, calibrated and trained with BOS, on text held out of it,
    and the report says so."""
    from effattn.recipes.convert_gqa import Settings, run

    folder, own = saved
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i * i % 90}" for i in range(3000)))
    report = run(
        Settings(
            kv_heads=1,
            model=str(folder),
            output=tmp_path / "out",
            text=[text],
            calibration_tokens=1000,
            evaluation_tokens=700,
            uptrain_tokens=256,
            length=64,
            decode_contexts=(),
            overrides={"bf16": False},
        )
    )
    assert report.quality["tokens"] == 700
    assert report.settings["bos"] == report.quality["bos"] == (own is not None)
    assert report.settings["calibration_source"] == str(text)
    assert report.settings["evaluation_source"] == f"{text}, held out" == report.quality["source"]
    said = "each begun with BOS" in (tmp_path / "out" / "report.md").read_text()
    assert said == (own is not None)
    ids = encoding.encode([text.read_text()], words(False), 1700)[-700:]
    expected = effattn.perplexity(effattn.load(folder), ids, 64)
    assert report.measured("before") == pytest.approx(expected, rel=1e-4)
