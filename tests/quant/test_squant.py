"""SQuant's rounding: errors cancel in each kernel and in each output channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_nets import mlp, mobile, ready

from nestc.graph.passes.rewrite import array, operand
from nestc.quant.squant import balanced, squant


def reals(shape: tuple[int, int, int], seed: int, most: float = 6.4) -> np.ndarray:
    """Weights in steps, none of them clipped by integers up to 7, of which single ones can still move."""
    return np.random.default_rng(seed).uniform(-most, most, shape).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(channels=st.integers(1, 5), elements=st.integers(2, 49), seed=st.integers(0, 2**31))
def test_the_error_of_a_lone_kernel_is_below_one_half(channels: int, elements: int, seed: int) -> None:
    real = reals((channels, 1, elements), seed)
    errors = (balanced(real, -7, 7) - real).sum(axis=2)
    assert np.abs(errors).max() <= 0.5 + 1e-4


@settings(deadline=None, max_examples=40)
@given(channels=st.integers(1, 5), kernels=st.integers(2, 40), elements=st.integers(9, 25), seed=st.integers(0, 2**31))
def test_kernels_stay_below_one_and_channels_below_one_half(
    channels: int, kernels: int, elements: int, seed: int
) -> None:
    real = reals((channels, kernels, elements), seed)
    rounded = balanced(real, -7, 7)
    errors = (rounded - real).sum(axis=2)
    assert np.abs(errors).max() <= 1.0 + 1e-4
    assert np.abs(errors.sum(axis=1)).max() <= 0.5 + 1e-3
    assert np.abs(rounded - real).max() < 1.0


def test_few_weights_move_and_those_nearest_to_one_half() -> None:
    real = np.array([[[0.4, 0.3, 0.45, 0.2, 1.0]]], np.float32)
    assert balanced(real, -7, 7).tolist() == [[[0.0, 0.0, 1.0, 0.0, 1.0]]]
    assert balanced(-real, -7, 7).tolist() == [[[0.0, 0.0, -1.0, 0.0, -1.0]]]


def test_what_lies_at_the_end_of_the_range_does_not_move_over_it() -> None:
    real = np.array([[[7.45, 7.45, 6.4]]], np.float32)
    assert np.abs(balanced(real, -7, 7)).max() == 7


def test_results_on_inputs_with_a_mean_are_nearer() -> None:
    random = np.random.default_rng(5)
    real = reals((8, 6, 9), 5)
    inputs = 1.0 + 0.3 * random.standard_normal((200, 6 * 9))
    nearest, moved = (
        np.square(inputs @ (each - real).reshape(8, -1).T).mean() for each in (np.rint(real), balanced(real, -7, 7))
    )
    assert moved < 0.8 * nearest


@pytest.mark.parametrize("scheme", ["int8", "int8-pow2", "int8:weight=int4", "int8:granularity=tensor"])
def test_all_products_are_rounded_along_their_sums(scheme: str) -> None:
    for model in (mobile(seed=3), mlp()):
        prepared, profile, context = ready(model, scheme, weights=True)
        assert context.parameters is not None
        scales = {key: weight.scale.copy() for key, weight in context.parameters.weights.items()}
        assert squant(prepared, profile, context) is profile
        products = {node.name: node for node in prepared.ir.graph if node.op_type in ("Conv", "Gemm", "MatMul")}
        assert set(products) <= {name for name, _ in scales}
        for name, node in products.items():
            weight = context.parameters.weights[name or "", 1]
            assert np.array_equal(weight.scale, scales[name or "", 1])
            values = array(operand(node, 1))
            assert values is not None
            steps = values / weight.expanded()
            # What is clipped can be no nearer and does not count.
            off = np.where(np.abs(steps) > weight.format.high, 0, steps - weight.values.astype(np.float32))
            output = 1 if node.op_type == "MatMul" else 0
            lost = off.sum(axis=tuple(axis for axis in range(off.ndim) if axis != output))
            assert np.abs(lost).max() <= 0.5 + 1e-3
    assert "rounded to the other side" in context.notes[-1]
