"""Every number that a job takes has its bounds where it is declared, in Python and on the command
line alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import typer
from flows import COMMANDS, FLOWS, module_of
from typer.testing import CliRunner

from effattn.evaluate.loss import perplexity_of
from effattn.recipes import options
from effattn.recipes.cli import app
from effattn.recipes.options import contexts_of, count_of, real, whole
from effattn.reports.files import finite

NUMBERS = [
    pytest.param(name, field.name, id=f"{name}-{field.name}")
    for name, flow in FLOWS.items()
    for field in dataclasses.fields(module_of(name).Settings)
    if any(kind in str(field.type) for kind in ("int", "float")) and field.name not in flow.checked
]


@pytest.mark.parametrize(("flow", "name"), NUMBERS)
def test_no_number_of_a_job_is_without_bounds(flow, name):
    job, needed = module_of(flow).Settings, {"output": Path("out"), **FLOWS[flow].needs}
    field = next(one for one in dataclasses.fields(job) if one.name == name)
    bounds = field.metadata["bounds"]
    bad = [math.nan, math.inf, -math.inf, True, "4", 10**30]
    bad += [1.5] if bounds.whole else []
    bad += [-1] if bounds.least is not None or bounds.above is not None else []
    bad += [0] if (bounds.least or 0) > 0 or bounds.above is not None else []
    many = isinstance(field.default, tuple)
    for value in bad:
        for given in ([value], (8, value)) if many else (value,):
            with pytest.raises(ValueError, match=rf"^{name}: got .*, valid is ") as caught:
                job(**{**needed, name: given})
            assert "\n" not in str(caught.value)
    if field.default is None:
        job(**{**needed, name: None})
    else:
        with pytest.raises(ValueError, match=rf"^{name}: got None"):
            job(**{**needed, name: None})


@pytest.mark.parametrize("amount", [-1, 0, math.nan, math.inf, 1.5, -0.25, True])
def test_amounts_of_structured_pruning(amount, tmp_path):
    from effattn.recipes.prune_structured import Settings, run

    with pytest.raises(ValueError, match=r"^ffn: got "):
        run(Settings(output=tmp_path / "out", ffn=amount))
    assert list(tmp_path.iterdir()) == []


def test_the_words_of_bounds():
    @dataclasses.dataclass
    class Job(options.Settings):
        share: float = real(0.5, "a share", least=0, most=1)
        lr: float | None = real(None, "a rate", above=0)
        length: int = whole(8, "a length", least=2, unit="tokens")
        start: float = real(0.0, "a start")
        seed: int = options.random_seed("anything")

    for given, said in {
        "share": "0 to 1",
        "lr": "more than 0",
        "length": "2 tokens or more",
        "start": "any finite number",
        "seed": "0 to 4,294,967,295",
    }.items():
        with pytest.raises(ValueError, match=rf"^{given}: got nan, valid is {said}$"):
            Job(**{given: math.nan})
    assert Job(lr=1, share=1, start=-5, seed=2**32 - 1).lr == 1


@pytest.mark.parametrize(
    "option",
    [
        "convert-gqa --lr nan",
        "convert-gqa --lr 0",
        "convert-gqa --ce-weight -1",
        "convert-gqa --layer-weight inf",
        "convert-gqa --seed -1",
        "convert-gqa --batch 0",
        "convert-gqa --calibration-tokens -5",
        "convert-gqa --decode-contexts 512,-1",
        "linearize --transfer-lr -1e-3",
        "linearize --lora -1",
        "linearize --keep-every -2",
        "extend --lr inf",
        "extend --window 0",
        "extend --seed 99999999999",
        "shear --mask-lr nan",
        "shear --ramp 2",
        "shear --start nan",
        "shear --recover-tokens -1",
        "swap --temperature nan",
        "swap --chunk -1",
        "measure --seconds inf",
        "measure --steps 0",
        "quantize-kv --decode-seconds nan",
        "quantize-kv --budget-bytes-per-token -5",
        "prune oneshot --damping nan",
        "prune oneshot --damping -1",
        "prune oneshot --length 0",
        "prune structured --ffn nan",
        "prune structured --seed -1",
    ],
)
def test_bad_numbers_are_one_line_before_any_work(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *command, name, value = option.split()
    needed = [*COMMANDS[" ".join(command)], "--output", "out"]
    done = CliRunner().invoke(app, [*command, *needed, name, value])
    assert done.exit_code == 2
    lines = [line for line in done.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"error: {name.removeprefix('--').replace('-', '_').removesuffix('_bytes_per_token')}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value", ["inf", "nan", "-inf", "1e400", "1e30", "1.5", "0.0001k", "", "k", "ten"]
)
def test_counts_that_are_none(value):
    with pytest.raises(typer.BadParameter, match="valid is like 50000"):
        count_of(value)
    done = CliRunner().invoke(
        app,
        ["convert-gqa", "--kv-heads", "2", "--output", "out", "--calibration-tokens", value],
    )
    assert done.exit_code == 2
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_counts_as_people_write_them():
    assert [count_of(text) for text in ("1e3", "2.3k", "1_000", "1,000", "0.1M", "-3")] == [
        1000,
        2300,
        1000,
        1000,
        100_000,
        -3,
    ]
    assert contexts_of("4k,1_000") == [4096, 1000]
    for text in ("inf", "1e3", "4k,,8k", "nan"):
        with pytest.raises(ValueError, match="valid is like"):
            contexts_of(text)


def test_a_loss_beyond_what_exp_can_say():
    assert perplexity_of(math.log(7)) == pytest.approx(7)
    assert perplexity_of(709.0) < math.inf
    assert [perplexity_of(loss) for loss in (710.0, 1e9, math.inf)] == [math.inf] * 3
    assert math.isnan(perplexity_of(math.nan))
    assert (
        json.dumps(finite({"perplexity": perplexity_of(1e9)}), allow_nan=False)
        == '{"perplexity": null}'
    )


def kinds_of(cls: type) -> list[type]:
    """A class and all below it."""
    return [cls, *(one for below in cls.__subclasses__() for one in kinds_of(below))]


def test_reports_of_models_that_broke(tmp_path, monkeypatch):
    """Infinite perplexities are shown as such, are null in JSON, and such a report can be read and
    shown again.
    """
    import report_pages

    from effattn.reports.document import Document

    def broken(data):
        if isinstance(data, dict):
            return {
                key: math.inf if key in ("perplexity", "kl") else broken(one)
                for key, one in data.items()
            }
        return [broken(one) for one in data] if isinstance(data, list | tuple) else data

    shown = []
    with monkeypatch.context() as patch:
        for cls in kinds_of(Document):
            if "to_html" in vars(cls):
                patch.setattr(cls, "to_html", lambda self: shown.append(self) or "")
        for make, _ in report_pages.PAGES.values():
            make()
    assert len({type(one) for one in shown}) >= 8
    for report in shown:
        live = type(report)(broken(report.data))
        (tmp_path / "report.json").write_text(live.to_json(), encoding="utf-8")
        for one in (live, type(report).load(tmp_path)):
            assert one.headline
            assert one.to_markdown()
        assert live.to_html()
