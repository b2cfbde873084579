"""Normalisations against float64: ragged rows, several axes, channels, statistics as outputs, tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.normalization import NORMALIZATION
from nestc.kernels.testing import Array, evaluate, host_machine, region_of, run_lowered

MACHINE = host_machine()


def sample(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return np.random.default_rng([7, *shape]).standard_normal(shape).astype(dtype)


def check(
    op: str,
    x: Array,
    others: list[tuple[int, ...]],
    *,
    outputs: int = 1,
    tail: tuple[int, ...] | None = None,
    jit: bool = True,
    tolerance: float = 3e-6,
    **attributes: Any,
) -> None:
    """Compare every output of the lowered node with the reference evaluator in float64."""
    dtype = x.dtype
    feeds = {"x": x, **{f"p{i}": sample(shape, str(dtype)) for i, shape in enumerate(others)}}
    names = ["y", "mean", "factor"][:outputs]
    nodes = [helper.make_node(op, list(feeds), list(names), "n", **attributes)]
    if tail is not None:
        feeds["b"] = sample(tail, str(dtype))
        nodes.append(helper.make_node("Add", ["y", "b"], ["z"], "a"))
        names[0] = "z"
    exact = evaluate(nodes, {n: a.astype(np.float32 if dtype == "float16" else np.float64) for n, a in feeds.items()})
    region = region_of(nodes, {n: a.astype(dtype) for n, a in exact.items()}, names, ["p0"])
    assert NORMALIZATION.refusal(region) is None
    lowered = NORMALIZATION.lower(region, MACHINE, NORMALIZATION.layouts(region, MACHINE, {}))
    got = run_lowered(region, lowered, feeds, MACHINE, jit=jit)
    for name in names:
        np.testing.assert_allclose(got[name].astype(np.float64), exact[name], rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=12)
@given(rows=st.integers(1, 9), n=st.integers(2, 80), bias=st.booleans())
def test_layer_normalization_of_any_size(rows: int, n: int, bias: bool) -> None:
    check("LayerNormalization", sample((rows, n)), [(n,), (n,)] if bias else [(n,)], tolerance=2e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_layer_normalization(jit: bool) -> None:
    check("LayerNormalization", sample((2, 3, 19)), [(19,), (19,)], outputs=3, jit=jit)
    check("LayerNormalization", sample((2, 3, 4)), [(3, 4), (3, 4)], axis=1, outputs=3, tail=(2, 3, 4), jit=jit)
    check("LayerNormalization", sample((3, 16)), [(16,)], tail=(16,), epsilon=0.1, jit=jit)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float16", 4e-3)])
def test_other_dtypes(dtype: str, tolerance: float) -> None:
    check("LayerNormalization", sample((4, 21), dtype), [(21,), (21,)], tolerance=tolerance)
    check("RMSNormalization", sample((4, 21), dtype), [(21,)], tolerance=tolerance)


def test_a_large_mean_does_no_harm() -> None:
    """One pass over sums of squares would lose everything here: the squares are 1e8, the variance is 1."""
    check("LayerNormalization", sample((5, 64)) + np.float32(1e4), [(64,)], tolerance=3e-3)


@pytest.mark.parametrize("jit", [True, False])
def test_rms_normalization(jit: bool) -> None:
    check("RMSNormalization", sample((2, 3, 19)), [(19,)], jit=jit)
    check("RMSNormalization", sample((2, 3, 4)), [(3, 4)], axis=1, tail=(3, 4), jit=jit)


@pytest.mark.parametrize("jit", [True, False])
def test_by_channel(jit: bool) -> None:
    check("InstanceNormalization", sample((2, 3, 5, 4)), [(3,), (3,)], jit=jit, tolerance=1e-5)
    check("InstanceNormalization", sample((2, 3, 16)), [(3,), (3,)], tail=(1, 3, 1), jit=jit, tolerance=1e-5)
    check("GroupNormalization", sample((2, 6, 5, 3)), [(6,), (6,)], num_groups=2, jit=jit, tolerance=1e-5)
    check("GroupNormalization", sample((1, 6, 8)), [(6,), (6,)], num_groups=3, tail=(1, 6, 8), jit=jit, tolerance=1e-5)


def test_refusals() -> None:
    node = helper.make_node("LayerNormalization", ["x", "p"], ["y"], "n", axis=1)
    scale = helper.make_node("Mul", ["y", "b"], ["z"], "m")
    values = {n: sample((2, 3, 4)) for n in "xyz"} | {"p": sample((3, 4)), "b": sample((4,))}
    assert "broadcast along some" in str(NORMALIZATION.refusal(region_of([node, scale], values, ["z"])))
    whole = {"x": np.ones((2, 3), np.int32), "y": np.ones((2, 3), np.int32), "p": np.ones(3, np.int32)}
    assert "int32" in str(NORMALIZATION.refusal(region_of([node], whole, ["y"])))
