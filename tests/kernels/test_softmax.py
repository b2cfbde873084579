"""Softmax and LogSoftmax against float64: every axis, ragged rows, tails, large and infinite inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

from nestc.kernels.softmax import SOFTMAX
from nestc.kernels.testing import Array, evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()


def run(nodes: list[NodeProto], feeds: dict[str, Array], *, jit: bool = True) -> tuple[Array, Array]:
    """The result of the lowered nodes, and the exact one."""
    dtype = feeds["x"].dtype
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in feeds.items()}
    values = evaluate(nodes, wide)
    exact = values[nodes[-1].output[0]]
    region = region_of(nodes, {n: a.astype(dtype) for n, a in values.items()}, [nodes[-1].output[0]], ["b"])
    assert SOFTMAX.refusal(region) is None
    lowered = SOFTMAX.lower(region, MACHINE, SOFTMAX.layouts(region, MACHINE, {}))
    return run_lowered(region, lowered, feeds, MACHINE, jit=jit)[region.outputs[0]], exact


def sample(shape: tuple[int, ...], dtype: str = "float32", scale: float = 3.0) -> Array:
    return (scale * np.random.default_rng([*shape]).standard_normal(shape)).astype(dtype)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 2), st.booleans())
def test_any_axis(shape: list[int], axis: int, log: bool) -> None:
    node = helper.make_node("LogSoftmax" if log else "Softmax", ["x"], ["y"], "s", axis=axis % len(shape))
    got, exact = run([node], {"x": sample(tuple(shape))})
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2e-6 if log else 1e-7)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 11), -1), ((2, 3, 5), 1), ((9,), 0), ((3, 16), 1)])
def test_in_the_interpreter(op: str, shape: tuple[int, ...], axis: int) -> None:
    got, exact = run([helper.make_node(op, ["x"], ["y"], "s", axis=axis)], {"x": sample(shape)}, jit=False)
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("shape", "axis", "b"), [((5, 37), -1, (37,)), ((2, 6, 3, 4), 1, (1, 6, 1, 1))])
def test_tail(shape: tuple[int, ...], axis: int, b: tuple[int, ...]) -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["y"], "s", axis=axis),
        helper.make_node("Mul", ["y", "b"], ["z"], "m"),
    ]
    got, exact = run(nodes, {"x": sample(shape), "b": sample(b)})
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-15), ("float16", 1e-3)])
def test_other_dtypes(dtype: str, tolerance: float) -> None:
    got, exact = run([helper.make_node("Softmax", ["x"], ["y"], "s", axis=-1)], {"x": sample((4, 19), dtype)})
    assert got.dtype == dtype
    np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)


def test_large_values_neither_overflow_nor_cancel() -> None:
    x = np.array([[1e4, 1e4 - 1, -1e4, 0.0] * 5, [-1e38, 1e38] * 10], np.float32)
    below = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    exact = below - np.log(np.exp(below).sum(axis=1, keepdims=True))
    node = helper.make_node("Softmax", ["x"], ["y"], "s", axis=-1)
    np.testing.assert_allclose(run([node], {"x": x})[0], np.exp(exact), rtol=1e-6, atol=1e-6)
    values = {"x": x, "y": exact.astype(np.float32)}
    region = region_of([helper.make_node("LogSoftmax", ["x"], ["y"], "s", axis=-1)], values, ["y"])
    got = run_lowered(region, SOFTMAX.lower(region, MACHINE, {}), {"x": x}, MACHINE)["y"]
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)


def test_masked_inputs_get_zero_and_nan_spreads_over_its_row() -> None:
    x = sample((3, 21))
    x[0, 5:] = -np.inf
    x[2, 3] = np.nan
    with np.errstate(invalid="ignore"):
        got, exact = run([helper.make_node("Softmax", ["x"], ["y"], "s", axis=-1)], {"x": x})
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert np.all(got[0, 5:] == 0)
    assert np.all(np.isnan(got[2]))


def test_long_rows_use_scratch() -> None:
    got, exact = run([helper.make_node("Softmax", ["x"], ["y"], "s", axis=-1)], {"x": sample((2, 30003))})
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=1e-12)


def test_refusals() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], "s", axis=0)
    scale = helper.make_node("Mul", ["y", "b"], ["z"], "m")
    values = {"x": sample((5, 3, 4)), "y": sample((5, 3, 4)), "z": sample((5, 3, 4)), "b": sample((4,))}
    assert "broadcast along some" in str(SOFTMAX.refusal(region_of([node, scale], values, ["z"])))
    empty = {"x": np.zeros((0, 3), np.float32), "y": np.zeros((0, 3), np.float32)}
    assert "no elements" in str(SOFTMAX.refusal(region_of([node], empty, ["y"])))
