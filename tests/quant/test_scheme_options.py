"""Options of schemes: what they change, and what they refuse."""

from __future__ import annotations

import pytest

from nestc.errors import QuantizationError
from nestc.quant.scheme import SCHEMES, scheme_named


def test_fewer_bits_of_the_weights() -> None:
    weight = scheme_named("int8:weight-bits=7").weight
    assert (weight.low, weight.high, weight.dtype) == (-63, 63, "int8")
    assert scheme_named("int8:weight-bits=8").weight == SCHEMES["int8"].weight
    both = scheme_named("int8-symmetric:weight-bits=4,granularity=tensor")
    assert (both.weight.high, both.weight.granularity, both.name) == (
        7,
        "tensor",
        "int8-symmetric:weight-bits=4,granularity=tensor",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int8:weight-bits=9", "choose a number from 2 to 8"),
        ("int8:weight-bits=x", "choose a number from 2 to 8"),
        ("bf16:weight-bits=7", "has no integer weights"),
        ("int8:weight-bit=7", "did you mean 'weight-bits'"),
        ("int9", "did you mean 'int8'"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(QuantizationError, match=reason):
        scheme_named(text)
