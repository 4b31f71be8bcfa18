"""The report of a measurement: the finding, the tables and the page say what the rows say."""

from __future__ import annotations

import copy
import json
import re

import pytest

from effattn.measuring.report import Report, _time
from effattn.measuring.report_tables import main_table, memory_table, operation_table

MIB = 2**20
READ, COMPUTE = 2e10, 1e11


def spread(p50: float, width: float = 0.1) -> dict:
    return {"ms_p20": p50 * (1 - width), "ms_p50": p50, "ms_p80": p50 * (1 + width), "rounds": 9}


def phase(p50: float, flops: float, kv: float, **more) -> dict:
    kinds = {
        "attention weights": 4 * MIB,
        "FFN weights": 8 * MIB,
        "other weights": 3 * MIB,
        "keys and values": kv,
        "activations": MIB,
    }
    moved, seconds = sum(kinds.values()), p50 / 1000
    operations = [
        {"layer": layer, "name": name, **spread(p50 / 5), "flops": flops / 5, "bytes": moved / 5}
        for layer in (0, 1)
        for name in ("attention", "ffn")
    ]
    operations.append(
        {"layer": None, "name": "other", **spread(p50 / 5), "flops": None, "bytes": None}
    )
    return {
        **spread(p50),
        "flops": flops,
        "read_bytes": moved - MIB,
        "write_bytes": MIB,
        "intensity": flops / moved,
        "flops_per_s": flops / seconds,
        "compute_share": flops / seconds / COMPUTE,
        "bytes_per_s": moved / seconds,
        "bandwidth_share": moved / seconds / READ,
        "kv_read_bytes": kv,
        "peak_bytes": 40 * MIB + kv,
        "peak_bytes_predicted": 42 * MIB + kv,
        "peak_source": "torch's CPU allocator",
        "operations": operations,
        "bytes_by_kind": kinds,
        **more,
    }


def row(variant: str, context: int, batch: int, prefill: float, decode: float, kv: float) -> dict:
    return {
        "variant": variant,
        "context": context,
        "batch": batch,
        "status": "measured",
        "alternated": True,
        "weight_bytes": 15 * MIB,
        "kv_bytes": kv,
        "kv_bytes_held": kv,
        "activation_bytes": {"prefill": 9, "decode": 9},
        "prefill": phase(
            prefill, 1e9 * context, 2 * kv, tokens_per_s=1000 * batch * context / prefill
        ),
        "decode": phase(
            decode, 1e7 * batch, kv, tokens_per_s=1000 * batch / decode, past=context + 5.0
        ),
    }


def data() -> dict:
    rows = []
    for context in (1024, 16384):
        for batch in (1, 8):
            kv = 8192 * context * batch
            rows.append(row("plain", context, batch, context * batch, context * batch / 1024, kv))
            rows.append(
                row("window", context, batch, context * batch / 2, 1.75 * batch, 8192 * 528 * batch)
            )
    return {
        "kind": "measure",
        "version": 1,
        "rows": rows,
        "settings": {
            "model": "embedded",
            "contexts": [1024, 16384],
            "batches": [1, 8],
            "steps": 32,
            "seconds": 5.0,
            "seed": 0,
            "variants": [
                {"name": "plain", "spec": "plain", "axes": {}},
                {
                    "name": "window",
                    "spec": "pattern=sliding(window=512)",
                    "axes": {"pattern": "sliding(window=512)"},
                },
            ],
        },
        "model": {
            "name": "embedded",
            "class": "LlamaForCausalLM",
            "dtype": "float32",
            "trained_length": 512,
            "parameters": 4_000_000,
        },
        "peaks": {
            "device": "a device",
            "kind": "cpu",
            "threads": 2,
            "date": "2026-01-01",
            "versions": {"cuda": None},
            "copy_bytes_per_s": None,
            "read_bytes_per_s": READ,
            "write_bytes_per_s": 1e10,
            "matmul_flops": {"float32": COMPUTE, "int8": None},
            "launch_seconds": 1e-6,
        },
        "environment": {"device": "a device", "torch": "2", "threads": 2, "cuda": None},
    }


def with_row(new: dict) -> dict:
    """The same, with another row in the place of one."""
    made = data()
    place = (new["variant"], new["context"], new["batch"])
    made["rows"] = [
        new if (one["variant"], one["context"], one["batch"]) == place else one
        for one in made["rows"]
    ]
    return made


def test_the_finding_is_the_longest_context_beside_the_first_variant():
    assert Report(data()).headline == (
        "Decode at 16k: window reads 31x fewer KV bytes and is 9.1x faster than plain (1.75 ms "
        "against 16 ms a token); its first token comes 2.0x sooner (8.19 s against 16.4 s)."
    )


@pytest.mark.parametrize(
    ("decode", "prefill", "said"),
    [
        (
            32.0,
            32768.0,
            "fewer KV bytes but is 2.0x slower than plain (32 ms against 16 ms a token); its "
            "first token comes 2.0x later (32.8 s against 16.4 s).",
        ),
        (
            16.1,
            16384.0,
            "but is as fast as plain (16.1 ms against 16 ms a token); its first token comes as "
            "soon (16.4 s",
        ),
        (14.0, 16384.0, "but is, within the spread, as fast as plain (14 ms against 16 ms"),
    ],
)
def test_the_finding_says_no_more_than_the_spread_allows(decode, prefill, said):
    new = row("window", 16384, 1, prefill, decode, 8192 * 528)
    assert said in Report(with_row(new)).headline


def test_more_bytes_and_no_other_variant_are_said_too():
    new = row("window", 16384, 1, 8192.0, 8.0, 3 * 8192 * 16384)
    assert "window reads 3.0x more KV bytes but is 2.0x faster" in Report(with_row(new)).headline
    alone = data()
    alone["rows"] = [one for one in alone["rows"] if one["variant"] == "plain"]
    alone["settings"]["variants"] = alone["settings"]["variants"][:1]
    found = Report(alone)
    assert found.headline.startswith(
        "Decode at 16k: plain makes 62.5 tokens/s over 128.0 MiB of KV cache (9.4 GB/s,"
    )
    assert "vs plain" not in found.to_markdown()


def lost(made: dict, *which: tuple[str, int]) -> dict:
    for number, one in enumerate(made["rows"]):
        if (one["variant"], one["context"]) in which:
            keep = {
                key: one[key] for key in ("variant", "context", "batch", "weight_bytes", "kv_bytes")
            }
            made["rows"][number] = {
                **keep,
                "status": "does not fit",
                "needs_bytes": 3 * 2**30,
                "available_bytes": 2**30,
            }
    return made


def test_rows_that_do_not_fit_are_in_every_form():
    found = Report(lost(data(), ("plain", 16384)))
    assert found.headline.startswith("Decode at 1k: window reads 1.9x fewer KV bytes")
    assert found.headline.endswith("; plain at 16k does not fit: needs 3.0 GiB.")
    assert main_table(found).rows[4][:4] == ["plain", "16,384", "1", "does not fit: needs 3.0 GiB"]
    assert len({len(line) for line in main_table(found).rows}) == 1
    assert "does not fit: needs 3.0 GiB" in found.to_html()
    nothing = Report(
        lost(
            data(), *((name, context) for name in ("plain", "window") for context in (1024, 16384))
        )
    )
    assert nothing.headline.startswith("Nothing fits: plain at 1k does not fit: needs 3.0 GiB")
    assert "does not fit" in nothing.to_html()
    assert "does not fit" in nothing.to_markdown()


def test_tables_show_ratios_shares_and_what_was_foreseen():
    found = Report(data())
    first = dict(zip(main_table(found).header, main_table(found).rows[5], strict=True))
    assert first["Variant"] == "window"
    assert first["Context"] == "16,384"
    assert first["Decode vs plain"] == "9.14x"
    assert first["First token vs plain"] == "2.00x"
    assert first["KV cache"] == "4.1 MiB"
    assert memory_table(found).rows[0][6:8] == ["56.0 MiB", "58.0 MiB (+3.6 %)"]
    table = operation_table(found)
    assert table.header[1:3] == ("plain, prefill", "plain, decode")
    operations = {cells[0]: cells[1] for cells in table.rows}
    assert operations == {"attention": "6,554 (40%)", "ffn": "6,554 (40%)", "other": "3,277 (20%)"}


def test_what_launching_takes_stands_beside_a_gpus_time():
    new = data()
    for one in new["rows"]:
        if "decode" in one:
            one["decode"]["host_ms"] = 7.5
    table = main_table(Report(new))
    assert table.header[table.header.index("ms/token") + 1] == "Host (ms)"
    assert {line[table.header.index("Host (ms)")] for line in table.rows} == {"7.50"}
    assert "slower of the two" in table.note


def test_unknown_peaks_are_unknown_and_nothing_is_drawn_for_them():
    made = data()
    made["peaks"] |= {"read_bytes_per_s": None, "matmul_flops": {}}
    for one in made["rows"]:
        for name in ("prefill", "decode"):
            one[name] |= {"bandwidth_share": None, "compute_share": None, "peak_bytes": None}
    found = Report(made)
    assert main_table(found).rows[0][-3] == "unknown"
    assert json.loads(found.summary())["rows"][0]["of_read_peak"] is None
    page = found.to_html()
    assert "Roofline" in page
    assert "memory, measured" not in page


def test_the_page_is_complete_and_by_itself():
    made = data()
    made["settings"]["variants"][1]["name"] = bad = "<b>x</b> | $"
    for one in made["rows"]:
        one["variant"] = bad if one["variant"] == "window" else one["variant"]
    found = Report(made)
    page = found.to_html()
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles == [
        "Time to the first token",
        "Time per output token",
        "Roofline at 16k tokens, batch 1",
        "Bytes that a decode step moves, 16k tokens, batch 1",
        "Memory at the peak, predicted, 16k tokens, batch 1",
        "Time of a prefill, 16k tokens, batch 1",
        "Time of a decode step, 16k tokens, batch 1",
        "Peak memory, measured",
        "KV cache held",
    ]
    assert "<b>x" not in page
    assert "reads 31x fewer KV bytes" in page
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(link|img|iframe)\b|<script[^>]+src", page)
    assert "\\<b>x" in found.to_markdown()


def test_notes_say_what_a_reader_must_know():
    assert "trained at 512 tokens" in Report(data()).to_markdown()
    made = data()
    made["model"]["trained_length"] = None
    made["settings"]["variants"][1]["axes"] = {"heads": "gqa(kv_heads=2)"}
    text = Report(made).to_markdown()
    assert "trained at" not in text
    assert "converted without data" in text


def test_one_line_of_json_and_files_that_read_back(tmp_path):
    found = Report(data())
    summary = json.loads(found.summary())
    assert "\n" not in found.summary()
    assert (summary["kind"], summary["version"], summary["finding"]) == (
        "measure",
        1,
        found.headline,
    )
    assert summary["rows"][5]["decode_ratio"] == pytest.approx(9.143)
    assert found.to_json(tmp_path / "r.json") == (tmp_path / "r.json").read_text()
    assert Report.load(tmp_path / "r.json").data == found.data
    found.to_markdown(tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text() == found.to_markdown()
    found.save(tmp_path / "all")
    assert Report.load(tmp_path / "all").headline == found.headline
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "swap_backend"}, "kind: got 'swap_backend', a measurement has 'measure'"),
        ({"version": 0}, "version: got 0, from an older effattn"),
        ({"version": None}, "from an older effattn; this one reads 1: measure again"),
        ({"version": 2}, "from a newer effattn"),
        ({"rows": []}, "lacks rows: the file is damaged"),
    ],
)
def test_other_kinds_and_versions_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Report(copy.deepcopy(data()) | change)
    file = tmp_path / "r.json"
    file.write_text(json.dumps(data() | change))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        Report.load(file)


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (0.1234, "0.123 ms"),
        (12.34, "12.3 ms"),
        (999.4, "999 ms"),
        (1750.0, "1.75 s"),
        (1_234_567.0, "1,235 s"),
    ],
)
def test_times_are_written_as_people_write_them(milliseconds, said):
    assert _time({"ms_p50": milliseconds}) == said
