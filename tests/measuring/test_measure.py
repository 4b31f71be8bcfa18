"""`effattn.measure` and `effattn measure`: what is measured is what is said, on tiny models; every
way to get it wrong is one line before anything is measured; a killed run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import tiny
from typer.testing import CliRunner

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.measuring import measurement as jobs
from effattn.measuring.lanes import BESIDE_STEPS, Lane
from effattn.measuring.operations import OperationTimer
from effattn.measuring.report import Report
from effattn.measuring.variants import Variant, build, own_bytes, parse, parse_all, split_name
from effattn.profiling.device import Peaks
from effattn.recipes.cli import app
from effattn.reports.tables import data_size
from effattn.stages import Quiet
from effattn.surgery.swapping import active

ROOT = Path(__file__).parents[2]
SINKS = "sliding(window=16, sinks=2)"
TOKEN = 2 * 2 * 8 * 8 * 4  # KV bytes of a token in fp32: layers, k and v, heads, head size
LIMITS = Peaks(
    device="a device",
    kind="cpu",
    threads=1,
    date="2026-01-01T00:00:00+00:00",
    versions={},
    copy_bytes_per_s=1e10,
    read_bytes_per_s=2e10,
    write_bytes_per_s=None,
    matmul_flops={"float32": 1e11},
    launch_seconds=1e-6,
)
SMALL = {"contexts": [24, 40], "steps": 3, "seconds": 0.01}


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch):
    monkeypatch.setattr(jobs, "peaks", lambda device: LIMITS)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def report(model) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "peaks", lambda device: LIMITS)
        asked = [f"window={SINKS}", "few=heads=gqa(kv_heads=2); pattern=dense"]
        return effattn.measure(model, asked, batches=[1, 2], name="tiny", **SMALL)


# ---- variants
# -------------------------------------------------------------------------------------------------


def test_variants_are_read_as_they_are_written():
    assert [v.name for v in parse_all(None)] == ["plain"]
    first, window, both = parse_all(
        ["w=sliding( window=8,sinks=1 )", "heads=gqa(kv_heads=2); pattern=dense"]
    )
    assert (first.name, first.axes) == ("plain", {})
    assert (window.name, window.axes) == ("w", {"pattern": "sliding(window=8, sinks=1)"})
    assert both.name == "heads=gqa(kv_heads=2); pattern=dense"
    assert both.axes == {"heads": "gqa(kv_heads=2)", "pattern": "dense"}
    # the user's order, own base
    assert [v.name for v in parse_all({"w": SINKS, "base": "plain"})] == ["w", "base"]
    assert parse("x", "dense").axes == parse("x", "plain").axes == {}  # the model unchanged
    assert split_name("my run=block(block=4)") == ("my run", "block(block=4)")
    assert split_name("block(block=4)") == ("block(block=4)", "block(block=4)")
    assert parse("x", '{"0": "dense", "1-": "block(block=4)"}').axes["pattern"] == {
        "0": "dense",
        "1-": "block(block=4)",
    }
    assert parse("x", window.spec).axes == window.axes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "w=slidding(window=8)",
            r"variant 'w' = 'slidding\(window=8\)': .*did you mean 'sliding'\?\).*valid is "
            r"name=spec",
        ),
        ("w=sliding(windw=8)", "did you mean 'window'"),
        ("w=sliding(window=8", "cannot be parsed"),
        ("w=head=gqa(kv_heads=2)", r"axis: got 'head' \(did you mean 'heads'\?\)"),
        ("w=pattern=dense; pattern=dense", "pattern is given twice"),
        ("w=", "is empty"),
        ("w= ; ", "is empty"),
        ("nonsense", "variant 'nonsense': backend: got 'nonsense'"),
    ],
)
def test_a_variant_that_does_not_parse_is_shown_with_the_grammar(given, message):
    with pytest.raises(ValueError, match=message):
        parse_all([given])


def test_names_are_unique():
    with pytest.raises(ValueError, match="variant: w given twice"):
        parse_all(["w=dense", "w=block(block=4)"])


def test_variants_share_weights_and_leave_the_model_alone(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    window, few = Variant("w", {"pattern": SINKS}), Variant("f", {"heads": "gqa(kv_heads=2)"})
    swapped, merged = build(model, window), build(model, few)
    assert all(p is q for p, q in zip(model.parameters(), swapped.parameters(), strict=True))
    assert active(swapped) is not None
    assert active(model) is None
    assert anatomy.of(merged).kv_heads == 2
    assert merged.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert own_bytes(model, window) == 0
    assert own_bytes(model, few) == sum(
        p.nbytes for x in model.model.layers for p in x.self_attn.parameters()
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.config.num_key_value_heads == 8
    assert active(model) is None


def test_a_swapped_model_is_measured_beside_its_plain_self(model):
    swapped = effattn.swap(build(model, Variant("plain")), "sliding", window=8)
    found = effattn.measure(swapped, contexts=[30], steps=2, seconds=0.01)
    assert found.variants == ["plain", "as given"]
    assert found.row("plain", 30, 1)["kv_bytes_held"] == 30 * TOKEN
    assert found.row("as given", 30, 1)["kv_bytes_held"] < 30 * TOKEN
    assert active(swapped) is not None


# ---- what is measured
# -------------------------------------------------------------------------------------------------


def test_rows_say_what_was_moved_and_held(report, model):
    assert [(row["context"], row["batch"], row["variant"]) for row in report.rows] == [
        (context, batch, name)
        for context in (24, 40)
        for batch in (1, 2)
        for name in ("plain", "window", "few")
    ]
    assert all(row["status"] == "measured" and row["alternated"] for row in report.rows)
    plain, window, few = (report.row(name, 40, 2) for name in ("plain", "window", "few"))
    assert plain["kv_bytes_held"] == plain["kv_bytes"] == 2 * 40 * TOKEN
    assert few["kv_bytes_held"] == few["kv_bytes"] == 2 * 40 * TOKEN // 4
    assert 2 * 18 * TOKEN <= window["kv_bytes_held"] <= 2 * (18 + 16) * TOKEN + 64
    # not what the ring keeps beside
    assert window["decode"]["kv_read_bytes"] == pytest.approx(2 * 18 * TOKEN, rel=0.1)
    assert plain["weight_bytes"] == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    assert few["weight_bytes"] < plain["weight_bytes"]
    # the middle one of three steps, after three others
    assert report.rows[0]["decode"]["past"] == 24 + 3 + 1
    for row in report.rows:
        for phase in ("prefill", "decode"):
            one = row[phase]
            assert 0 < one["ms_p20"] <= one["ms_p50"] <= one["ms_p80"]
            assert one["rounds"] == 3
            moved, seconds = one["read_bytes"] + one["write_bytes"], one["ms_p50"] / 1000
            assert sum(one["bytes_by_kind"].values()) == moved
            assert one["intensity"] == one["flops"] / moved
            assert one["bytes_per_s"] == pytest.approx(moved / seconds)
            assert one["bandwidth_share"] == pytest.approx(moved / seconds / 2e10)
            assert one["compute_share"] == pytest.approx(one["flops"] / seconds / 1e11)
        assert row["decode"]["tokens_per_s"] == pytest.approx(
            1000 * row["batch"] / row["decode"]["ms_p50"]
        )


def test_peaks_are_foreseen(report):
    """To 10 % where transformers' own attention runs; our tiles take more than their share of a
    model this small.
    """
    for row in report.rows:
        for phase in ("prefill", "decode"):
            one, off = row[phase], 0.1 if row["variant"] == "plain" else 0.25
            assert one["peak_bytes"] == pytest.approx(one["peak_bytes_predicted"], rel=off), (
                row["variant"],
                phase,
            )


def test_operations_are_all_there_with_their_cost(report):
    row = report.row("plain", 40, 1)
    inside = {"q_proj", "k_proj", "v_proj", "attention", "o_proj", "ffn", "norms"}
    for phase in ("prefill", "decode"):
        found = {(one["layer"], one["name"]): one for one in row[phase]["operations"]}
        ends = {(None, name) for name in ("embedding", "norms", "head", "other")}
        assert found.keys() == ends | {(layer, name) for layer in (0, 1) for name in inside}
        assert all(one["ms_p20"] <= one["ms_p50"] <= one["ms_p80"] for one in found.values())
        known = [one for one in found.values() if one["bytes"] is not None]
        assert sum(one["flops"] for one in known) == row[phase]["flops"]
        assert (
            sum(one["bytes"] for one in known)
            == row[phase]["read_bytes"] + row[phase]["write_bytes"]
        )
        assert found[None, "other"]["bytes"] is None
    assert found[0, "q_proj"]["flops"] == 2 * 64 * 64


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3", "opt", "qwen3", "gemma2"])
def test_operation_times_are_exclusive_and_add_up(kind, tokens, monkeypatch):
    extra = {"ffn_dim": 96, "word_embed_proj_dim": 64} if kind == "opt" else {}
    model, marks = tiny(kind, dtype=torch.float32, **extra), iter(range(10_000))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with OperationTimer(model) as timer, torch.no_grad():
        # every mark is one tick after the one before
        monkeypatch.setattr(timer, "_mark", lambda: next(marks))
        model(tokens[None, :9])
        found = timer.read()
        assert sum(found.values()) == next(marks) - 1  # from the first mark to the last
        model(tokens[None, :9])
        assert timer.read() == found
    fused = kind in ("gpt_neox", "phi3")
    assert found[0, "qkv_proj" if fused else "q_proj"] == 1  # nothing timed runs inside
    norms = 2 if kind == "qwen3" else 0
    # projections in, the one out, norms of queries and keys
    children = (1 if fused else 3) + 1 + norms
    assert found[0, "attention"] == 1 + children
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_pass_is_a_real_one_and_variants_take_turns(model, monkeypatch):
    """Prefill asks for the last logits only; a step sees everything before it; no lane runs twice
    in a row.
    """
    calls = []
    forward = Lane._forward
    monkeypatch.setattr(
        Lane,
        "_forward",
        lambda lane, ids: (calls.append((lane.name, ids.shape[1])), forward(lane, ids)),
    )
    effattn.measure(model, {"a": "plain", "b": SINKS}, [20], steps=4, seconds=1e-9)
    prefills = [name for name, length in calls if length == 20]
    # one each with hooks, then at least three rounds, in turns
    assert prefills == ["a", "b", *"abbaba"]
    steps = [name for name, length in calls if length == 1]
    rounds = len(steps) - 2 - 2 * BESIDE_STEPS  # without the two that warm up
    assert rounds == 2 * 3
    lane = Lane("a", model, torch.zeros(1, 20, dtype=torch.long))
    assert lane.last_only == {"logits_to_keep": 1}
    lane.prefill()
    assert lane.cache.get_seq_length() == 20
    lane.step()
    with torch.no_grad():
        both = model(torch.cat([lane.ids, torch.zeros(1, 1, dtype=torch.long)], 1)).logits
    assert lane.cache.get_seq_length() == 21
    assert both.shape[1] == 21


def test_steps_decode_what_generate_does(model, tokens):
    for spec in ("plain", SINKS):
        twin = build(model, parse("x", spec))
        expected = twin.generate(
            tokens[None, :30], max_new_tokens=6, min_new_tokens=6, do_sample=False
        )[0, 30:]
        lane = Lane("x", twin, tokens[None, :30])
        lane.prefill()
        found = [int(lane.token)]
        for _ in range(5):
            lane.step()
            found.append(int(lane.token))
        assert found == expected.tolist()


def test_the_embedded_model_reads_fewer_bytes_with_a_window():
    model, _ = effattn.embedded.load()
    found = effattn.measure(model, "w=sliding(window=64, sinks=4)", [512], steps=2, seconds=0.01)
    plain, window = found.row("plain", 512, 1), found.row("w", 512, 1)
    assert plain["kv_bytes_held"] == 512 * 8192
    assert plain["decode"]["kv_read_bytes"] / window["decode"]["kv_read_bytes"] == pytest.approx(
        516 / 68, rel=0.05
    )
    assert "w reads 7.6x fewer KV bytes" in found.headline
    assert not any("trained at" in line for line in found.to_markdown().splitlines())


# ---- memory
# -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(model, monkeypatch):
    needs = {context: jobs.predict(model, context, 1).peak for context in (24, 400)}
    room = int((needs[24] + needs[400]) / 2 / jobs.MEMORY_SHARE)
    monkeypatch.setattr(jobs, "available_bytes", lambda device: room)
    found = effattn.measure(model, {"plain": "plain", "w": SINKS}, [24, 400], steps=2, seconds=0.01)
    status = {(row["context"], row["variant"]): row["status"] for row in found.rows}
    assert status[24, "plain"] == "measured"
    assert status[400, "plain"] == "does not fit"
    lost = next(row for row in found.rows if row["status"] != "measured")
    assert lost["needs_bytes"] == needs[400]
    assert lost["available_bytes"] == room
    assert found.headline.endswith(f"plain at 400 does not fit: needs {data_size(needs[400])}.")
    assert "does not fit: needs" in found.to_markdown()
    assert json.loads(found.summary())["rows"][-2]["status"] == "does not fit"


def test_variants_that_only_fit_one_by_one_are_measured_one_by_one(model, monkeypatch):
    need = jobs.predict(model, 40, 1)
    monkeypatch.setattr(
        jobs, "available_bytes", lambda device: int((need.peak + need.kept / 2) / jobs.MEMORY_SHARE)
    )
    found = effattn.measure(
        model, {"a": "plain", "b": "pattern=dense"}, [40], steps=2, seconds=0.01
    )
    assert [(row["status"], row["alternated"]) for row in found.rows] == [("measured", False)] * 2
    assert "measured one after the other" in found.to_markdown()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        pytest.param(MemoryError(), marks=pytest.mark.slow),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_no_crash(model, monkeypatch, error):
    prefill = Lane.prefill

    def fails(lane):
        if lane.ids.shape[1] == 40:
            raise error
        prefill(lane)

    monkeypatch.setattr(Lane, "prefill", fails)
    found = effattn.measure(model, contexts=[40, 50], steps=2, seconds=0.01)
    assert [row["status"] for row in found.rows] == ["does not fit", "measured"]


def test_other_errors_are_not_hidden(model, monkeypatch):
    monkeypatch.setattr(Lane, "step", lambda lane: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        effattn.measure(model, contexts=[20], steps=2, seconds=0.01)


def test_heads_without_room_for_their_weights_are_refused(model, monkeypatch):
    monkeypatch.setattr(jobs, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="variants: those with other heads need"):
        effattn.measure(model, "heads=gqa(kv_heads=2)", [20])


# ---- resuming
# -------------------------------------------------------------------------------------------------


class Interrupts(Quiet):
    """A Ctrl-C in the middle of the stage of that name."""

    def __init__(self, name: str | None = None):
        self.name, self.seen = name, []

    def stage(self, text: str):
        self.seen.append(text)

        def progress(done, total):
            if text == self.name:
                raise KeyboardInterrupt

        return nullcontext(progress)


@pytest.fixture
def _no_page(monkeypatch):
    """Without the page, which takes longer than measuring a tiny model."""
    monkeypatch.setattr(Report, "to_html", lambda report, path=None: "a page")


@pytest.mark.usefixtures("_no_page")
def test_a_stopped_run_goes_on_with_what_it_has(model, tmp_path):
    asked = {
        "variants": f"w={SINKS}",
        "contexts": [24, 40],
        "steps": 2,
        "seconds": 0.01,
        "output": tmp_path,
    }
    with pytest.raises(KeyboardInterrupt):
        effattn.measure(model, show=Interrupts("40 tokens"), **asked)
    assert [path.name for path in tmp_path.iterdir()] == [".measure.partial.json"]
    parts = json.loads((tmp_path / ".measure.partial.json").read_text())["parts"]
    kept = [row for rows in parts.values() for row in rows]
    assert [(row["context"], row["variant"]) for row in kept] == [(24, "plain"), (24, "w")]
    with pytest.raises(
        ValueError, match=r"1 finished cells of a run with other settings \(steps\).*--fresh"
    ):
        effattn.measure(model, **{**asked, "steps": 3})
    with pytest.raises(ValueError, match=r"other settings \(.*parameters.*\)"):
        effattn.measure(tiny("llama", dtype=torch.float32, vocab_size=97), **asked)
    show = Interrupts()
    found = effattn.measure(model, show=show, **asked)
    assert "24 tokens" not in show.seen
    assert found.rows[:2] == kept
    assert [(row["context"], row["variant"]) for row in found.rows[2:]] == [
        (40, "plain"),
        (40, "w"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    with pytest.raises(ValueError, match="holds a finished report; --fresh"):
        effattn.measure(model, **asked)
    effattn.measure(model, fresh=True, **asked)


@pytest.mark.usefixtures("_no_page")
def test_fresh_forgets_and_damage_is_said(model, tmp_path):
    partial = tmp_path / ".measure.partial.json"
    for text in ("{", "[]", '{"rows": [{}]}'):
        partial.write_text(text)
        with pytest.raises(ValueError, match=r"is not an unfinished measurement.*--fresh"):
            effattn.measure(model, contexts=[20], output=tmp_path)
    effattn.measure(model, contexts=[20], steps=1, seconds=0.01, output=tmp_path, fresh=True)
    assert not partial.exists()


# ---- bad input
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"contexts": [0]}, "contexts: got 0, valid is 1 or more"),
        ({"contexts": []}, "contexts: got none"),
        ({"contexts": [2.5]}, r"contexts: got 2\.5"),
        ({"batches": [1, -1]}, "batches: got -1, valid is 1 or more"),
        ({"steps": 0}, "steps: got 0"),
        ({"seconds": 0}, "seconds: got 0"),
        ({"variants": "w=sliding(window=0)"}, "window"),
        ({"variants": "cache=int9"}, r"cache: got 'int9' \(did you mean 'int8'"),
        ({"variants": "heads=gqa(kv_heads=3)"}, "kv_heads: got 3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(model, monkeypatch, changed, message):
    monkeypatch.setattr(jobs, "measure_together", lambda *args: pytest.fail("it began to measure"))
    with pytest.raises(ValueError, match=message):
        effattn.measure(model, **{"contexts": [20], **changed})


def test_learned_positions_end_somewhere_and_rotary_ones_do_not(model):
    opt = tiny("opt", dtype=torch.float32, ffn_dim=96, word_embed_proj_dim=64)  # 128 positions
    said = (
        r"contexts: got 119, OPTForCausalLM has 128 learned positions, .*takes 10; valid is up "
        r"to 118\. .*training"
    )
    with pytest.raises(ValueError, match=said):
        effattn.measure(opt, contexts=[20, 119], steps=2)
    found = effattn.measure(opt, contexts=[118], steps=2, seconds=0.01)
    assert found.rows[0]["status"] == "measured"
    with pytest.raises(ValueError, match="ask for fewer steps"):
        effattn.measure(opt, contexts=[20], steps=500)
    found = effattn.measure(model, contexts=[200], steps=2, seconds=0.01)
    assert "trained at 128 tokens" in found.to_markdown()


def test_encoders_are_refused():
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
        )
    )
    with pytest.raises(Unsupported, match="it does not generate"):
        effattn.measure(bert, contexts=[8])


# ---- the command
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    """A tiny checkpoint with the embedded tokenizer, which measuring does not use."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    effattn.embedded.tokenizer().save_pretrained(folder)
    return folder


def invoke(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app, ["measure", "--steps", "2", "--seconds", "0.01", *map(str, arguments)]
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_what_it_shows(checkpoint, tmp_path):
    files = [
        part
        for kind in ("html", "markdown", "json")
        for part in (f"--{kind}", tmp_path / f"r.{kind}")
    ]
    code, out, err = invoke(
        "--model",
        checkpoint,
        "--contexts",
        "24",
        "--batches",
        "1,2",
        "--variant",
        f"w={SINKS}",
        "--pattern",
        "block(block=8)",
        "--dtype",
        "bfloat16",
        *files,
    )
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert [row["variant"] for row in summary["rows"][:3]] == [
        "plain",
        "pattern=block(block=8)",
        "w",
    ]
    assert summary["finding"].startswith("Decode at 24")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.markdown"]
    found = Report.load(tmp_path / "r.json")
    assert found.data["model"]["dtype"] == "bfloat16"
    assert found.row("plain", 24, 1)["kv_bytes_held"] == 24 * TOKEN // 2
    assert found.row("plain", 24, 1)["prefill"]["compute_share"] is None  # that peak is unknown
    assert (tmp_path / "r.markdown").read_text() == found.to_markdown()


def test_the_recipe_is_the_command():
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / "measure.py", "--contexts", "16,0"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: contexts: got 0, valid is 1 or more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", "w=slidin(window=4)"), "did you mean 'sliding'"),
        (("--model", "no/such-model-anywhere"), "not an existing folder"),
        (("--contexts", "many"), "contexts: got 'many'"),
        (("--batches", "0"), "batches: got"),
        (("--dtype", "float23"), "did you mean 'float32'"),
        (("--device", "gpu"), "device: got 'gpu'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path):
    code, _, err = invoke("--output", tmp_path / "out", *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("option", ["--output", "--html", "--json", "--markdown"])
def test_a_folder_that_cannot_be_written_is_said_before_measuring(option, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = invoke(option, tmp_path / "file" / "inside" / "x")
    assert code == 2
    assert "cannot be written (Not a directory); nothing was measured" in err
    assert "loading" not in err


@pytest.mark.parametrize("keeps", [True, False])
def test_ctrl_c_says_what_was_kept(checkpoint, tmp_path, monkeypatch, keeps):
    monkeypatch.setattr("effattn.recipes.flow.Show", lambda: Interrupts("40 tokens"))
    target = ("--json", tmp_path / "r.json") if keeps else ()
    code, out, err = invoke("--model", checkpoint, "--contexts", "24,40", *target)
    assert code == 130
    if keeps:
        partial = tmp_path / ".r.json.partial.json"
        assert f"stopped; 1 of 2 pairs of context and batch are kept in {partial}" in err
        assert partial.exists()
    else:
        assert "nothing is kept: with --output DIR or --json FILE" in err
    assert out == ""
