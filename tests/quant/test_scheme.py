"""Schemes by name and option, overrides from files, and what each says when it does not understand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestc.errors import QuantizationError
from nestc.quant.overrides import parse, read_overrides
from nestc.quant.scheme import SCHEMES, Format, scheme_named


def test_the_schemes_of_the_contract() -> None:
    assert list(SCHEMES) == ["int8", "int8-symmetric", "int8-pow2", "int16", "bf16", "weight-int8", "weight-int4"]
    int8 = SCHEMES["int8"]
    assert int8.activation == Format("uint8", symmetric=False)
    assert int8.weight == Format("int8", per_channel=True, narrow=True)
    assert (int8.weight.low, int8.weight.high, int8.weight.granularity) == (-127, 127, "channel")
    pow2 = SCHEMES["int8-pow2"]
    assert pow2.activation is not None and pow2.activation.pow2 and pow2.weight.pow2 and pow2.method == "mse"
    assert SCHEMES["weight-int4"].weight.granularity == "block"
    assert [name for name, scheme in SCHEMES.items() if scheme.integer] == list(SCHEMES)[:4]


def test_options_change_a_scheme() -> None:
    scheme = scheme_named("int8:granularity=tensor, method=percentile:99.9,weight-method=mse")
    assert (scheme.weight.granularity, scheme.method, scheme.weight_method) == ("tensor", "percentile:99.9", "mse")
    assert scheme_named("int16:weight=int8").weight.dtype == "int8"
    assert scheme_named("weight-int4:granularity=block:64").weight.block == 64
    assert scheme_named("weight-int8:granularity=block:32").weight.granularity == "block"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int9", "there is no scheme 'int9', did you mean 'int8'?"),
        ("nonsense", "weight-int8, weight-int4, auto"),
        ("auto", "scheme auto is a search for a whole model"),
        ("int8:granularty=tensor", "did you mean 'granularity'?"),
        ("int8:granularity=row", "choose tensor, channel or block:SIZE"),
        ("int8:granularity=block:32", "use weight-int8 or weight-int4"),
        ("int8:granularity=block", "choose tensor, channel or block:SIZE"),
        ("int8:weight=int7", "cannot have weights of type 'int7'"),
        ("bf16:weight=int8", "cannot have weights of type 'int8'"),
        ("int8:method=msee", "did you mean 'mse'?"),
    ],
)
def test_unknown_schemes_and_options(text: str, said: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        scheme_named(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_read_from_the_simplest_yaml(tmp_path: Path) -> None:
    path = tmp_path / "overrides.yaml"
    path.write_text(
        "---\n"
        "# comment\n"
        "stem: float\n"
        '"blocks.*.p#": int16  # why\n'
        "'it''s': int8:granularity=tensor\n"
        "\n"
        "a#b: float\n"
        '/x/Conv_1: "int8"\n',
        encoding="utf-8",
    )
    found = read_overrides(path)
    assert {key: scheme and scheme.name for key, scheme in found.items()} == {
        "stem": None,
        "blocks.*.p#": "int16",
        "it's": "int8:granularity=tensor",
        "a#b": None,
        "/x/Conv_1": "int8",
    }


def test_overrides_may_be_json() -> None:
    assert parse('{"a": "float", "b*": "int16"}') == {"a": "float", "b*": "int16"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*x: float", "a key that begins with '*' has to stand in quotes"),
        ("a int8", "line 1: 'a int8' is not of the form `node: scheme`"),
        ("a:", "is not of the form"),
        (" a: int8", "without indentation"),
        ("a: float\na: int8", "line 2: 'a' stands there twice"),
        ("a: int9", "'a': there is no scheme 'int9', did you mean 'int8'?"),
        ('{"a": 1}', "has to be a text"),
        ('{"a": ', "is none"),
    ],
)
def test_overrides_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "overrides.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QuantizationError) as caught:
        read_overrides(path)
    assert said in str(caught.value) and "overrides.yaml" in str(caught.value)


def test_overrides_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="cannot read the overrides"):
        read_overrides(tmp_path / "none.yaml")
