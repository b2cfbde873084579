"""DynamicQuantizeLinear against its definition in numpy, element for element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.dynamic_quantize import DYNAMIC_QUANTIZE
from nestc.kernels.testing import evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()


def check(x: np.ndarray, jit: bool = True) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], "q")
    expected = evaluate([node], {"x": x})
    region = region_of([node], expected, ["y", "s", "z"])
    assert DYNAMIC_QUANTIZE.refusal(region) is None
    lowered = DYNAMIC_QUANTIZE.lower(region, MACHINE, DYNAMIC_QUANTIZE.layouts(region, MACHINE, {}))
    found = run_lowered(region, lowered, {"x": x}, MACHINE, jit=jit)
    for name in ("s", "z", "y"):
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])


@settings(deadline=None, max_examples=12)
@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    low=st.sampled_from([-3.0, 0.0, 2.0]),
    high=st.sampled_from([-1.0, 0.0, 5.0]),
)
def test_any_shape_and_range(shape: list[int], low: float, high: float) -> None:
    check(np.random.default_rng(shape).uniform(min(low, high), max(low, high), shape).astype(np.float32))


@pytest.mark.parametrize("n", [1, 31, 64, 70])
def test_in_the_interpreter(n: int) -> None:
    check(np.random.default_rng(n).standard_normal(n).astype(np.float32), jit=False)


def test_several_items_of_which_the_last_is_short() -> None:
    check(np.random.default_rng(0).standard_normal((137, 301)).astype(np.float32))


def test_others_are_refused() -> None:
    x = np.ones((2, 3), np.float32)
    node = helper.make_node("Relu", ["x"], ["y"], "r")
    assert "alone" in (DYNAMIC_QUANTIZE.refusal(region_of([node], {"x": x, "y": x}, ["y"])) or "")
