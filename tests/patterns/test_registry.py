"""Specs parse to literals only, and back; unknown names get the nearest one."""

import keyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import registry
from effattn.interface import Backend
from effattn.patterns.dense import Dense
from effattn.specs import format_spec, parse_spec

names = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(
    lambda s: not keyword.iskeyword(s)
)
scalars = (
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.booleans()
    | st.none()
)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple), max_leaves=5
)


@settings(deadline=None, max_examples=200)
@given(name=names, options=st.dictionaries(names, values, max_size=4))
def test_parse_undoes_format(name, options):
    text = format_spec(name, options)
    assert parse_spec(text) == (name, options)
    # 1, 1.0 and True are equal, but not the same
    assert repr(parse_spec(text)[1]) == repr(options)
    assert format_spec(*parse_spec(text)) == text


def test_parse():
    assert parse_spec(
        " sliding ( window = 1_024, sinks=-4, d=[1, (2, 'a')], e=None, f=1e-3 ) "
    ) == (
        "sliding",
        {"window": 1024, "sinks": -4, "d": [1, (2, "a")], "e": None, "f": 1e-3},
    )
    assert parse_spec("dense()") == ("dense", {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a.b",
        "a(1)",
        "a(**b)",
        "a(x=1, x=2)",
        "a(x=y)",
        "a(x=__import__('os'))",
        "a(x=1+2j)",
        "a(x={})",
        "a(x={1})",
        "a(x=b'1')",
        "a(x=1e999)",
        "a(x=[1e999])",
        "a(x=2**3)",
        "a()()",
        "[a]",
        "a(x=1",
        "a(x='\0')",
        3,
        None,
        "a(x=" + "(" * 500 + ")" * 500 + ")",
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="spec"):
        parse_spec(text)


def test_a_bare_word_is_answered_with_the_spec_in_quotes():
    with pytest.raises(
        ValueError, match=r"rotate is not a literal value.*\"int4\(rotate='kv', v=2\)\""
    ):
        parse_spec("int4(rotate=kv, v=2)")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a-b", {}),
        ("if", {}),
        ("a", {"lambda": 1}),
        ("ﬁ", {}),
        ("a", {"x": float("nan")}),
        ("a", {"x": {}}),
    ],
)
def test_format_refuses_what_parse_could_not_read(name, options):
    with pytest.raises(ValueError, match="spec"):
        format_spec(name, options)


def test_backend():
    assert registry.backends()["dense"] is Dense
    assert isinstance(registry.backend("dense"), Dense)
    assert registry.backend("dense(impl='reference')").impl == "reference"
    assert registry.backend("dense", impl="torch").impl == "torch"
    for cls in registry.backends().values():
        assert issubclass(cls, Backend)
        assert {
            type(getattr(cls.traits, t)) for t in ("exact", "causal", "bidirectional", "learned")
        } == {bool}


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("dens", {}, "backend: got 'dens' .did you mean 'dense'"),
        ("xyz", {}, "backend: got 'xyz', valid are 'block', 'dense'"),
        (
            "dense(imp='torch')",
            {},
            "dense: option: got 'imp' .did you mean 'impl'.., valid are 'impl'",
        ),
        ("dense", {"windw": 3}, "dense: option: got 'windw', valid are 'impl'"),
        ("dense(impl='torch')", {"impl": "torch"}, "impl given twice"),
    ],
)
def test_mistakes_get_the_nearest_name(spec, options, message):
    with pytest.raises(ValueError, match=message):
        registry.backend(spec, **options)


def test_required_options_and_double_registration(monkeypatch):
    monkeypatch.setattr(registry.BACKENDS, "_known", dict(registry.backends()))

    @registry.register("windowed")
    class Windowed(Dense):
        def __init__(self, window, impl="auto"):
            super().__init__(impl)

    with pytest.raises(
        ValueError, match=r"windowed: window must be given, for example windowed\(window=...\)"
    ):
        registry.backend("windowed")
    with pytest.raises(ValueError, match="registered already"):
        registry.register("windowed")(Windowed)
