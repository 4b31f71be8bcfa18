"""What is fed: documents end once, empty and null rows give nothing, long ones are read in
pieces.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from effattn import embedded, encoding
from effattn.dataset_rows import read_dataset
from effattn.extending.texts import long_sequences
from effattn.textdata import encode, streams

pytest.importorskip("datasets")

LINE = "the quick brown fox jumps over the lazy dog \n"
CONFIGS = """---
configs:
- config_name: raw
  data_files: a.jsonl
- config_name: tok
  data_files: b.jsonl
---
"""


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.tokenizer()


def folder(path, rows, other=None, readme: str = ""):
    path.mkdir()
    for name, some in (("a.jsonl", rows), ("b.jsonl", other)):
        if some is not None:
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    if readme:
        (path / "README.md").write_text(readme)
    return str(path)


# ---- documents and their ends
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", " ", "\n", " \n\t"])
def test_documents_end_once_and_empty_ones_give_nothing(empty, tokenizer):
    end = tokenizer.eos_token_id
    found = encode([empty, "one", empty, empty, "two\n", empty], tokenizer)
    assert torch.equal(found, encode(["one", "two\n"], tokenizer))
    assert int((found == end).sum()) == 2
    assert found[-1] == end
    assert len(encode([empty], tokenizer)) == 0


def test_a_text_that_ends_itself_has_one_end(tokenizer):
    end = tokenizer.eos_token
    found = encode([f"one{end}", f"{end}two{end}{end}", end, f"a{end}b"], tokenizer)
    assert torch.equal(found, encode(["one", "two", f"a{end}b"], tokenizer))
    assert not (
        (found[1:] == tokenizer.eos_token_id) & (found[:-1] == tokenizer.eos_token_id)
    ).any()


def test_a_limit_is_kept(tokenizer):
    whole = encode(["one two three", "", "four five"], tokenizer)
    for limit in range(1, len(whole) + 2):
        assert torch.equal(
            encode(["one two three", "", "four five"], tokenizer, limit), whole[:limit]
        )


# ---- long documents
# -------------------------------------------------------------------------------------------------


def words(count: int, seed: int = 0) -> str:
    """Text of all kinds: words, numbers, indentation, blank lines, other alphabets, emoji, accents
    in two forms.
    """
    source = random.Random(seed)
    parts = [
        "alpha",
        "Beta's",
        "12345",
        "x_y = f(z)",
        "    ",
        "\n\n",
        "\t",
        "été",
        "e\u0301t",
        "漢字仮名",
        "🙂🙃",
        "...",
        "<s>",
    ]
    return " ".join(source.choice(parts) for _ in range(count))


def trained(kind: str):
    """A small fast tokenizer of each kind that there is, trained on `words`."""
    text = [words(3000, seed=1)]
    special = ["<unk>", "</s>"]
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "llama":  # no pre-tokenizer: a prefix, and "▁" for spaces
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        elif kind == "nfkc":
            made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        else:
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, max_token_length=12)
    made.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "prefix", "llama", "nfkc", "unigram", "wordpiece"])
def test_pieces_give_the_tokens_of_the_whole(kind, monkeypatch):
    """Whatever the tokenizer does at the beginning of a text, or across words."""
    tokenizer, document = trained(kind), words(6000)
    whole = tokenizer(document, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    for piece in (1000, 1777, 4096):
        monkeypatch.setattr(encoding, "PIECE", piece)
        assert None not in list(encoding._pieces(document, tokenizer))
        assert encoding.token_ids(document, tokenizer) == whole
        some = encoding.token_ids(document, tokenizer, 500)
        assert 500 <= len(some) < len(whole)
        assert some == whole[: len(some)]


@pytest.mark.parametrize("length", [1000, 1001, 1599, 1600, 1601, 2200, 2201])
def test_borders_of_pieces(length, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    monkeypatch.setattr(encoding, "PIECE", 1000)
    document = words(2000)[:length]
    assert (
        encoding.token_ids(document, tokenizer)
        == tokenizer(document, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("document", ["a" * 5000, " " * 5000, "ab" * 3000, "x" + "\n" * 5000])
def test_where_pieces_do_not_agree_the_whole_is_taken(document, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    monkeypatch.setattr(encoding, "PIECE", 1003)
    assert (
        encoding.token_ids(document, tokenizer)
        == tokenizer(document, add_special_tokens=False)["input_ids"]
    )


def test_a_small_share_of_a_long_document_is_little_work(tokenizer):
    """Two pieces, however long the document is."""
    document, seen = LINE * 60_000, []

    class Counting:
        is_fast, eos_token_id = True, tokenizer.eos_token_id

        def __call__(self, text, **more):
            seen.append(len(text))
            return tokenizer(text, **more)

    found = encode([document], Counting(), 1000)
    assert len(found) == 1000
    assert sum(seen) <= 2 * encoding.PIECE < len(document)
    assert torch.equal(found, encode([LINE * 500], tokenizer, 1000))


def test_long_sequences_are_the_same_by_pieces(tokenizer, monkeypatch):
    texts = [words(800, seed) for seed in range(3)]
    expected = long_sequences(texts, tokenizer, 5, 128)
    monkeypatch.setattr(encoding, "PIECE", 1000)
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    assert torch.equal(long_sequences(texts, tokenizer, 5, 128), expected)


# ---- datasets
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nulls", [[1], [0], [0, 1, 2], [9]])
def test_null_rows_give_nothing(nulls, tmp_path):
    rows = [{"id": i, "text": None if i in nulls else f"row {i}"} for i in range(10)]
    found = list(read_dataset(folder(tmp_path / "d", rows)))
    assert found == [f"row {i}" for i in range(10) if i not in nulls]
    assert list(read_dataset(str(tmp_path / "d"), "text")) == found


def test_other_columns_may_be_null(tmp_path):
    rows = [
        {"title": None, "body": "one"},
        {"title": "t", "body": None},
        {"title": None, "body": "two"},
    ]
    name = folder(tmp_path / "d", rows)
    assert list(read_dataset(name)) == ["one", "two"]
    assert list(read_dataset(name, "title")) == ["t"]


def test_a_column_is_named_where_it_is_wrong(tmp_path):
    name = folder(tmp_path / "d", [{"n": 1, "text": "one"}])
    with pytest.raises(ValueError, match=r"column: got 'txt', .* has the text columns 'text'"):
        list(read_dataset(name, "txt"))
    with pytest.raises(ValueError, match=r"column: got 'n', .* has the text columns 'text'"):
        list(read_dataset(name, "n"))
    with pytest.raises(ValueError, match="has no text columns, only 'n'"):
        list(read_dataset(folder(tmp_path / "e", [{"n": 1}])))
    with pytest.raises(ValueError, match="holds no text in any of 2 rows"):
        list(read_dataset(folder(tmp_path / "f", [{"text": None}, {"text": None}]), "text"))


def test_configurations_are_named_or_listed(tmp_path, tokenizer):
    name = folder(tmp_path / "d", [{"text": "raw text"}], [{"text": "tok text"}], CONFIGS)
    assert list(read_dataset(f"{name}:raw")) == ["raw text"]
    assert list(read_dataset(f"{name}:tok", "text")) == ["tok text"]
    with pytest.raises(
        ValueError, match=r"has several configurations, valid is one of .*d:raw, .*d:tok$"
    ):
        list(read_dataset(name))
    with pytest.raises(
        ValueError, match=r"no configuration 'row' \(did you mean 'raw'\?\); valid are 'raw', 'tok'"
    ):
        list(read_dataset(f"{name}:row"))
    with pytest.raises(ValueError, match="several configurations"):
        streams(tokenizer, train=10, evaluation=5, dataset=name)
    assert len(streams(tokenizer, train=2, evaluation=1, dataset=f"{name}:tok").train) == 2


def test_a_default_configuration_needs_no_name(tmp_path):
    readme = CONFIGS.replace("config_name: tok", "config_name: tok\n  default: true")
    name = folder(tmp_path / "d", [{"text": "raw text"}], [{"text": "tok text"}], readme)
    assert list(read_dataset(name)) == ["tok text"]


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    assert list(read_dataset(folder(tmp_path / "a:b", [{"text": "one"}]))) == ["one"]


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"dataset: .*nothing.* could not be loaded") as told:
        list(read_dataset(str(tmp_path / "nothing")))
    assert "\n" not in str(told.value)


# ---- what is held out
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two files, one three times as long, whose words tell them apart."""
    place = tmp_path_factory.mktemp("books")
    for name, count in (("long", 9000), ("short", 3000)):
        (place / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(count)))
    return place


def test_what_was_asked_for_is_held_out(books, tokenizer):
    """A tenth of what is read was the most before."""
    whole = encode([(books / "long.txt").read_text()], tokenizer)
    for train, evaluation in ((1000, 5000), (1, 2000), (10, 1)):
        found = streams(
            tokenizer,
            train=train,
            evaluation=evaluation,
            text=[books / "long.txt"],
        )
        assert torch.equal(torch.cat([found.train, found.evaluation]), whole[: train + evaluation])
        assert len(found.evaluation) == evaluation
    assert found.source == str(books / "long.txt")
    assert found.evaluation_source == f"{found.source}, held out"
    # as much as there is: the last part of the file
    found = streams(
        tokenizer,
        train=10**7,
        evaluation=500,
        text=[books / "long.txt"],
    )
    assert torch.equal(found.evaluation, whole[-500:])
    assert torch.equal(found.train, whole[:-500])


def test_too_little_text_is_one_line(books, tokenizer, tmp_path):
    count = len(encode([(books / "short.txt").read_text()], tokenizer))
    with pytest.raises(ValueError, match="are to be held out to measure on") as told:
        streams(
            tokenizer,
            train=10,
            evaluation=count,
            text=[books / "short.txt"],
        )
    assert f"{count:,}" in str(told.value)
    assert f"{count - 1:,}" in str(told.value)
    assert "\n" not in str(told.value)
    apart = [books / "short.txt"]
    with pytest.raises(ValueError, match=r"evaluation_text: .* are to be held out"):
        streams(
            tokenizer,
            train=10,
            evaluation=10**6,
            evaluation_text=apart,
        )
    name = folder(tmp_path / "d", [{"text": "one two three"}])
    with pytest.raises(ValueError, match="dataset: 1,000 tokens are to be held out"):
        streams(
            tokenizer,
            train=10,
            evaluation=1000,
            dataset=name,
        )


def test_files_are_taken_in_proportion(books, tokenizer):
    paths = [books / "long.txt", books / "short.txt"]
    both = streams(
        tokenizer,
        train=8000,
        evaluation=2000,
        text=paths,
    )
    assert len(both.train) == 8000
    assert len(both.evaluation) == 2000
    assert both.source == ", ".join(map(str, paths))
    sizes = [path.stat().st_size for path in paths]
    assert "short" in tokenizer.decode(both.train[:5000].tolist())
    for part in (both.train, both.evaluation):
        said = tokenizer.decode(part.tolist())
        share = said.count("long") / (said.count("long") + said.count("short"))
        assert abs(share - sizes[0] / sum(sizes)) < 0.1
    alone = streams(
        tokenizer,
        train=10,
        evaluation=10,
        text=paths,
    )
    assert len(alone.train) == len(alone.evaluation) == 10
    assert alone.source == str(paths[0])  # the other one would be a few tokens


def test_what_one_file_lacks_others_give(tmp_path, tokenizer):
    """Tokens of a file are not as many as its characters say."""
    (tmp_path / "blank.txt").write_text("x" + "\n" * 40_000 + "y")
    (tmp_path / "dense.txt").write_text("q9 " * 20_000)
    paths = [tmp_path / "blank.txt", tmp_path / "dense.txt"]
    found = streams(
        tokenizer,
        train=20_000,
        evaluation=1000,
        text=paths,
    )
    assert len(found.train) == 20_000
    assert len(found.evaluation) == 1000


def test_evaluation_text_is_apart(books, tokenizer):
    long, short = books / "long.txt", books / "short.txt"
    found = streams(
        tokenizer,
        train=10**7,
        evaluation=700,
        text=[long],
        evaluation_text=[short],
    )
    assert torch.equal(found.train, encode([long.read_text()], tokenizer))
    assert torch.equal(found.evaluation, encode([short.read_text()], tokenizer)[:700])
    assert (found.source, found.evaluation_source) == (str(long), str(short))
    # beside the embedded corpus, too
    found = streams(
        tokenizer,
        train=100,
        evaluation=700,
        evaluation_text=[short],
    )
    assert torch.equal(found.train, embedded.tokens("train", 100))
    assert found.evaluation_source == str(short)


def test_no_more_is_read_than_is_asked_for(tmp_path, tokenizer):
    """Of a long file a little more than those tokens, not all of it, nor `PIECE`."""
    path, seen = tmp_path / "long.txt", []
    path.write_text(LINE * 60_000)

    class Counting:
        is_fast, eos_token_id, bos_token_id = True, tokenizer.eos_token_id, None

        def __call__(self, text, **more):
            seen.append(len(text))
            return tokenizer(text, **more)

    found = streams(
        Counting(),
        train=1000,
        evaluation=500,
        text=[path],
    )
    assert len(found.train) + len(found.evaluation) == 1500
    assert sum(seen) < 100_000 < path.stat().st_size / 10


def test_a_long_run_of_blanks_costs_no_whole_document(tokenizer, monkeypatch):
    """Pieces are joined at another place then."""
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    monkeypatch.setattr(encoding, "PIECE", 4000)
    document = words(600)[:3500] + " " * 450 + words(3000, seed=4)
    assert None not in list(encoding._pieces(document, tokenizer))
    assert (
        encoding.token_ids(document, tokenizer)
        == tokenizer(document, add_special_tokens=False)["input_ids"]
    )
