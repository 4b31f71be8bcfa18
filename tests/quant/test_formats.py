"""Cache formats: what a spec means, which head dimensions it fits, and its exact bytes."""

import pytest

from effattn.kernels.pack import KINDS, Codes, Coding
from effattn.quant.formats import Format


def test_defaults_are_kivi():
    format = Format.parse("int4")
    assert format.k == Coding("int4", "channel", 64)
    assert format.v == Coding("int4", "token", 64)
    assert (format.residual, format.first, format.pre_rope, format.rotate, format.flush) == (
        128,
        4,
        False,
        "",
        64,
    )
    assert Format.parse("int8").k == Coding("int8", "channel", 128, symmetric=True)
    assert Format.parse("int2").v.group == 32
    # few bits cannot hold attention sinks beside other tokens
    firsts = {"int2": 4, "int2(v=8)": 4, "int2(first=0)": 0, "int4(v=2)": 4, "int8": 0, "fp8": 0}
    assert {spec: Format.parse(spec).first for spec in firsts} == firsts


def test_options():
    format = Format.parse(
        "int4(v=2, residual=64, first=4, k_axis='token', symmetric=True, pre_rope=True, "
        "rotate=True)"
    )
    assert format.k == Coding("int4", "token", 64, symmetric=True)
    assert format.v == Coding("int2", "token", 32, symmetric=True)
    assert (format.residual, format.first, format.pre_rope, format.rotate, format.flush) == (
        64,
        4,
        True,
        "kv",
        32,
    )
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("int5", r"cache: got 'int5' \(did you mean"),
        ("int4(grop=64)", r"'grop' \(did you mean 'group'\?\)"),
        ("int4(group=40)", r"group: got 40 \(nearest: 32\), valid are 16, 32"),
        ("int4(group=True)", "group: got True"),
        ("int4(residual=-1)", "residual: got -1"),
        ("int4(first=0.5)", "first: got 0.5"),
        ("int4(v=3)", r"int4: v: got 'int3'"),
        ("int4(v_axis='tokens')", r"did you mean 'token'\?"),
        ("int4(rotate='q')", "rotate: got 'q'"),
        ("int4(symmetric=None, pre_rope=3)", "pre_rope: got 3"),
    ],
)
def test_bad_specs_are_named(spec, words):
    with pytest.raises(ValueError, match=words):
        Format.parse(spec)


@pytest.mark.parametrize("spec", [["int8"], {"k": "int8"}, 8, None])
def test_what_is_no_spec_is_named(spec):
    with pytest.raises(ValueError, match=f"spec: got {type(spec).__name__}, valid is a string"):
        Format.parse(spec)


def test_equal_formats_keep_their_own_words():
    specs = ("int4", "int4(group=64)")
    fitted = [Format.parse(spec).fit(64)[0] for spec in specs]
    assert fitted[0] == fitted[1]
    assert tuple(one.spec for one in fitted) == specs


def test_groups_adapt_to_the_head_dimension_and_say_so():
    assert Format.parse("int4").fit(128) == (Format.parse("int4"), "")
    format, said = Format.parse("int4").fit(32)
    assert format.v.group == 32
    assert format.k.group == 64  # along time
    assert said == "values: groups of 32 channels instead of 64, head dimension 32"
    assert Format.parse("int4").fit(80)[0].v.group == 40
    assert Format.parse("int8").fit(97)[0].v.group == 97
    assert str(format) == "int4"
    with pytest.raises(
        ValueError,
        match=r"4 numbers share a byte.*head dimension 6; valid there are int8, int4, fp8",
    ):
        Format.parse("int2").fit(6)
    with pytest.raises(ValueError, match="valid groups are 1, 2, 4, 8, 16, 32"):
        Coding("int2", "token", 12).check(16, 32)


def test_bits_of_the_reference_table():
    """Bits an element, of K and V together, as computed by hand: codes, and 16 bits for each scale
    and zero point.
    """
    table = {
        "int8": 8.125,
        "int4(group=128)": 4.25,
        "int4": 4.5,
        "int4(group=32)": 5,
        "int2": 3,
        "fp8": 8.125,
    }
    for spec, bits in table.items():
        assert Format.parse(spec).bytes_per_token(8, 128) == 8 * 2 * 128 * bits / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [8, 80, 128])
def test_predicted_bytes_are_those_allocated(kind, dim):
    format, _ = Format.parse(f"{kind}(group=32, residual=40, first=3)").fit(dim)
    for tokens in (0, 2, 43, 74, 75, 200):
        first, packed, rest = format.held(tokens)
        assert first + packed + rest == tokens
        assert packed % format.flush == 0
        assert not packed or format.residual <= rest < format.residual + format.flush
        held = sum(Codes.empty(side, 2, 3, packed, dim).nbytes for side in (format.k, format.v))
        assert format.nbytes(tokens, 3, dim, batch=2) == held + 2 * 3 * (first + rest) * 2 * dim * 2
    per_token = (format.nbytes(3 + 40 + 320, 1, dim) - format.nbytes(3 + 40, 1, dim)) / 320
    assert per_token == format.bytes_per_token(1, dim)


def test_int4_takes_less_than_0_30_of_bf16_at_32k():
    assert Format.parse("int4").nbytes(32768, 8, 128) <= 0.30 * 32768 * 8 * 2 * 128 * 2
