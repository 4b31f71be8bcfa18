"""`make real`: its text, its table of steps, its loop, and the page that shows what it found."""

from __future__ import annotations

import importlib
import io
import json
import lzma
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench import docs
from bench.real import __main__ as command
from bench.real import page, running, text
from bench.real.steps import Place, Step, Subject, Target, find, subjects
from effattn import embedded
from effattn.errors import check_choice
from effattn.hf.gguf_files import cache_folder

ROOT = Path(__file__).parents[2]
PATTERN = "block(block=512, look_back=1)"


# The text
# -------------------------------------------------------------------------------------------------


def package(pages: dict[str, str]) -> bytes:
    """A .deb: an `ar` archive with a tar archive in it."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name, content in pages.items():
            one = tarfile.TarInfo(name)
            one.size = len(content.encode())
            archive.addfile(one, io.BytesIO(content.encode()))
    parts = {"debian-binary": b"2.0\n", "data.tar.xz": lzma.compress(body.getvalue())}
    deb = b"!<arch>\n"
    for name, part in parts.items():
        head = f"{name:16}{'0':12}{'0':6}{'0':6}{'100644':8}{len(part):<10}`\n"
        deb += head.encode() + part + b"\n" * (len(part) % 2)
    return deb


def test_the_handbook_is_the_english_pages_without_their_html(tmp_path):
    html = "<html><head><title>no</title></head><body><p>One <b>bold</b>\n word</p><ul><li>two"
    hidden = "<script>no()</script>three &amp; four</ul></body>"
    german = text.PAGES.replace("en-US", "de-DE")
    pages = {f"{text.PAGES}b.html": "<p>last", f"{text.PAGES}a.html": html + hidden}
    deb = tmp_path / "debian-handbook_1_all.deb"
    deb.write_bytes(package(pages | {f"{german}a.html": "nein", f"{text.PAGES}a.css": "no"}))
    assert text.package(tmp_path) == deb  # nothing is fetched again
    assert text.handbook(deb) == "One bold\nword\ntwothree & four\n\nlast\n"
    with pytest.raises(ValueError, match="no Debian package"):
        text.contents(b"PK\3\4")


def test_parts_are_all_of_the_text_and_one_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LEAST", 1000)
    body = "\n".join(f"line {number}" for number in range(400)) + "\n"
    (tmp_path / "book.txt").write_text(body, encoding="utf-8")
    files, held_out = text.prepare(tmp_path / "work", tmp_path / "book.txt")
    assert len(files) == text.PARTS - 1
    assert held_out not in files
    parts = [one.read_text(encoding="utf-8") for one in sorted([*files, held_out])]
    assert "".join(parts) == body
    assert all(part.endswith("\n") and 200 < len(part) < 400 for part in parts)
    monkeypatch.setattr(text, "LEAST", 10_000)
    with pytest.raises(ValueError, match="characters, valid are 10,000 or more"):
        text.prepare(tmp_path / "work", tmp_path / "book.txt")


def test_text_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs apt-get, .* valid is --text FILE"):
        text.prepare(tmp_path)


# The steps
# -------------------------------------------------------------------------------------------------


class Reached(Exception):
    """A step came as far as its work."""


RECIPES = ("convert_gqa", "quantize_kv", "prune_oneshot", "prune_structured", "swap_backend",
           "linearize", "measure")  # fmt: skip


def test_every_step_is_one_that_its_recipe_takes(tmp_path, monkeypatch):
    def reached(code):
        def run(settings):
            code.check(settings)  # all that can be wrong before a model is loaded
            assert settings.model == "embedded"
            raise Reached

        return run

    def load_model(name, **options):
        raise Reached

    for name in RECIPES:
        code = importlib.import_module(f"effattn.recipes.{name}")
        monkeypatch.setattr(code, "run", reached(code))
    monkeypatch.setattr("effattn.surgery.checkpoint.load_model", load_model)
    files = [tmp_path / name for name in ("b.txt", "output", "measured.json")]
    place = Place("embedded", [tmp_path / "a.txt"], *files)
    for subject, step in command.chosen([]):
        for small in (False, True):
            with pytest.raises(Reached):
                step.run(place, **step.scaled(small))
        names = [one.name for one in subjects()[subject].steps]
        assert names.count(step.name) == 1


def test_small_steps_read_less_and_enough_to_solve_with():
    step = Step("x", dict, {"calibration_tokens": 32768, "stream_tokens": 8192, "length": 512})
    assert step.scaled(small=False) == step.settings
    small = {"calibration_tokens": 12288, "stream_tokens": 1024, "length": 512}
    assert step.scaled(small=True) == small


def test_names_of_steps():
    assert [step.name for _, step in command.chosen(["caches/int4", "caches/int8"])] == [
        "int4",
        "int8",
    ]
    assert {name for name, _ in command.chosen(["heads"])} == {"heads"}
    with pytest.raises(ValueError, match="did you mean 'caches'"):
        command.chosen(["cache"])
    with pytest.raises(ValueError, match="did you mean 'int4'"):
        find("caches", "int44")


# The loop
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> running.Job:
    """The embedded model, and a text for it."""
    files = [tmp_path / "a.txt", tmp_path / "held_out.txt"]
    bodies = [body for _, body in embedded.corpus.documents("validation")]
    for file, body in zip(files, ["".join(bodies[:2]), "".join(bodies[2:8])], strict=True):
        file.write_text(body, encoding="utf-8")
    return running.Job("embedded", files[:1], files[1], tmp_path / "work", small=True)


def test_a_step_is_run_once_in_a_process_of_its_own(job, tmp_path, monkeypatch):
    steps, said = command.chosen([f"patterns/{PATTERN}"]), []
    kept = {}

    def keep(subject, step, row):
        kept[step] = row
        running.keep(tmp_path / "results" / f"{subject}.json", subject, step, row)

    assert running.run(job, steps, keep, said.append) == []
    row = kept[PATTERN]
    assert row["found"]["tokens"] == 1024
    assert 1 < row["found"]["before"] < 5
    assert row["cpu_seconds"] > 1
    assert row["peak_bytes"] > 100 * 2**20
    assert row["settings"]["stream_tokens"] == 1024
    assert str(tmp_path) not in json.dumps(row)  # no path of this machine
    assert not list((tmp_path / "work" / "running").rglob("*.json"))

    # what is done is not done again
    monkeypatch.setattr(running, "once", lambda *_: {"error": "it should not run"})
    assert running.run(job, steps, keep, said.append) == []
    # with other code, text or settings it is, and what fails leaves the rest to run
    monkeypatch.setattr(running, "digest_of", lambda _: "other code")
    assert running.run(job, steps, keep, said.append) == [f"patterns/{PATTERN}"]
    assert "FAILED: it should not run" in said[-1]
    assert page.steps_in(tmp_path / "results" / "patterns.json") == kept


def test_a_step_that_fails_says_why(job):
    broken = replace(job, held_out=job.work / "nothing.txt", model="embedded")
    (step,) = [step for _, step in command.chosen([f"patterns/{PATTERN}"])]
    assert "does not exist" in running.once(broken, "patterns", step, "a digest")["error"]


def test_an_unfinished_step_goes_on_and_another_starts_anew(job, monkeypatch):
    class Killed:
        """A process that leaves half of its work."""

        pid = 0

        def __init__(self, command, **_):
            (Path(command[3]).parent / "half").touch()

    (step,) = [step for _, step in command.chosen([f"patterns/{PATTERN}"])]
    folder = job.work / "running" / "patterns" / "block-block-512--look-back-1"
    monkeypatch.setattr(running.subprocess, "Popen", Killed)
    monkeypatch.setattr(running.os, "wait4", lambda *_: (0, 9, None))
    running.once(job, "patterns", step, "one")
    (folder / "before").touch()
    running.once(job, "patterns", step, "one")
    assert (folder / "before").exists()
    assert running.once(job, "patterns", step, "two") == {"error": "exit code -9"}
    assert not (folder / "before").exists()


# The page
# -------------------------------------------------------------------------------------------------


def row(after: float) -> dict:
    """A step's result."""
    return {
        "settings": {"calibration_tokens": 4096},
        "read": {"model": "some", "model_digest": "ab" * 32, "text": "cd" * 32},
        "found": {"before": 1.0, "after": after},
        "environment": {
            "device": "a CPU",
            "threads": 1,
            "torch": "2",
            "transformers": "5",
            "date": "2026-01-01T00:00",
        },
        "cpu_seconds": 12.3,
        "wall_seconds": 45.6,
        "peak_bytes": 2**30,
    }


def test_tables_and_targets(tmp_path, monkeypatch):
    subject = Subject(
        "A title",
        [Step("one", dict), Step("two", dict)],
        {"after": lambda found: f"{found['after']:.1f}"},
        [
            Target("one", 2.0, lambda steps: steps.get("one", {}).get("after")),
            Target("two", 2.0, lambda steps: steps.get("two", {}).get("after")),
        ],
    )
    monkeypatch.setattr(page, "subjects", lambda: {"heads": subject})
    where = tmp_path / "results" / "here" / "real" / "heads.json"
    old = (
        "a\n<!-- real:here/targets -->\n<!-- /real -->\n<!-- real:here/heads -->\nx\n<!-- /real -->"
    )
    empty = page.update(old, tmp_path)
    assert "*Not measured yet (`make real`): `one`, `two`.*" in empty
    assert "| two | 2 | not yet |  |" in empty
    running.keep(where, "heads", "one", row(3.0))
    running.keep(where, "heads", "gone", row(9.0))  # a step that the table has no more
    new = page.update(empty, tmp_path)
    assert "| one | 3.0 | 4,096 | 12 | 46 | 1,024 |" in new
    assert "| one | 2 | 3 | no |" in new
    assert "some (weights abababab, text cdcdcdcd); a CPU" in new
    assert "9.0" not in new
    assert page.update(new, tmp_path) == new
    other = row(4.0)
    other["read"] = other["read"] | {"text": "ef" * 32}
    running.keep(where, "heads", "two", other)
    both = page.update(new, tmp_path)  # rows of different texts: each says which
    assert re.search(r"text cdcdcdcd\);[^<]*: one<br>[^<]*text efefefef\);[^<]*: two; `", both)
    with pytest.raises(ValueError, match="a marker is not"):
        page.update("<!-- real:here/heads -->", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'heads'"):
        page.update(old.replace("/heads", "/head"), tmp_path)


def test_the_page_is_up_to_date():
    file = ROOT / "docs" / "real-models.md"
    said = file.read_text(encoding="utf-8")
    assert page.update(said, ROOT) == said, "run `make pages`"
    for name in subjects():
        assert f"/{name} -->" in said, f"{name}: has no mark on the page"


def test_results_name_no_path_and_every_subject_is_known():
    for file in (ROOT / "results").glob(f"*/{docs.REAL}/*.json"):
        check_choice("file", file.stem, list(subjects()))
        assert '": "/' not in file.read_text(encoding="utf-8"), file


@pytest.mark.slow
def test_a_small_part_on_the_real_model(tmp_path):
    model = next((cache_folder() / "smollm2").glob("*.gguf"), None)
    book = ROOT / command.WORK / "text" / "handbook.txt"
    if model is None or not book.is_file():
        pytest.skip(f"needs what `make real` fetches: {model or 'smollm2'}, {book}")
    files, held_out = text.prepare(tmp_path / "text", book)
    job = running.Job("smollm2", files, held_out, tmp_path, small=True)
    found = {}
    steps = command.chosen(["patterns/sliding(window=512, sinks=4)", "positions/as it is"])
    failed = running.run(job, steps, lambda subject, _, row: found.update({subject: row["found"]}))
    assert failed == []
    stream = found["patterns"]
    assert 2 < stream["before"] < 4  # nats a token: trained
    assert stream["after"] < stream["without_sinks"]
