"""Adaptive rounding: the loss of a layer is far below that of rounding to the nearest, and never above."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_nets import data, mobile, ready, reference, results, stack

import nestc
from nestc.errors import QuantizationError
from nestc.quant import quantize as stage
from nestc.quant.adaround import ADAROUND, Problem, adaround, relax, rounded, settle
from nestc.quant.bias import BIAS_CORRECTION
from nestc.quant.observe import observe
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.quant.tools import Tool


def problem(groups: int, outputs: int, inputs: int, seed: int = 0, rows: int = 400) -> Problem:
    """Rows of correlated inputs with a mean, as behind a Relu; steps of which weights take a few."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((groups, inputs, inputs))
    x = np.maximum(np.matmul(random.standard_normal((groups, rows, inputs)), mix), 0).astype(np.float32)
    weights = random.standard_normal((groups, outputs, inputs)).astype(np.float32)
    steps = np.broadcast_to(np.abs(weights).max(2, keepdims=True) / 7, weights.shape).astype(np.float32)
    return Problem(weights, steps, -7, 7, np.matmul(x.transpose(0, 2, 1), x) / np.float32(rows))


@settings(deadline=None, max_examples=15)
@given(groups=st.integers(1, 3), outputs=st.integers(1, 5), inputs=st.integers(1, 70), seed=st.integers(0, 99))
def test_no_layer_gets_worse_than_nearest_and_integers_stay_in_range(
    groups: int, outputs: int, inputs: int, seed: int
) -> None:
    given_problem = problem(groups, outputs, inputs, seed)
    nearest = given_problem.nearest()
    settled = settle(given_problem, nearest)
    assert (given_problem.losses(settled) <= given_problem.losses(nearest) * 1.0001 + 1e-5).all()
    assert np.array_equal(settled, np.rint(settled)) and np.abs(settled).max() <= 7


@pytest.mark.parametrize("groups", [1, 6])
def test_the_loss_is_well_below_that_of_nearest(groups: int) -> None:
    given_problem = problem(groups, 8, 40)
    nearest = given_problem.losses(given_problem.nearest()).sum()
    assert given_problem.losses(rounded(given_problem)).sum() < 0.7 * nearest


def test_relaxing_rounds_each_weight_up_or_down() -> None:
    given_problem = problem(1, 8, 40)
    relaxed = relax(given_problem, iterations=500)
    scaled = given_problem.weights / given_problem.steps
    assert (np.abs(relaxed - scaled) < 1.0).all()
    assert given_problem.losses(relaxed).sum() < given_problem.losses(given_problem.nearest()).sum()


def test_it_is_near_the_best_of_all_roundings() -> None:
    given_problem = problem(1, 1, 9, seed=3)
    floor = np.floor(given_problem.weights / given_problem.steps)
    choices = np.array(list(itertools.product((0, 1), repeat=9)), np.float32)
    every = [float(given_problem.losses(np.clip(floor + each, -7, 7)).sum()) for each in choices]
    found = float(given_problem.losses(rounded(given_problem)).sum())
    assert found <= np.quantile(every, 0.01)


def quantized(model: nestc.Model, scheme: str, tools: tuple[Tool, ...]) -> nestc.Model:
    batches = data(model)
    profile = observe(prepare(model), batches, reference, "minmax")
    return stage.quantize(model, profile, scheme_named(scheme), None, tools, batches=batches, compiler=reference)


@pytest.mark.parametrize("scheme", ["int8:weight=int4", "int8-pow2:weight=int4", "int8:weight=int4,granularity=tensor"])
def test_the_model_is_nearer_to_the_float_model(scheme: str) -> None:
    model = stack(seed=1)
    fresh = data(model, seed=8, count=40)
    exact = results(model, fresh)
    nearest, adaptive = (
        float(((results(quantized(model, scheme, tools), fresh) - exact) ** 2).mean())
        for tools in ((BIAS_CORRECTION,), (ADAROUND, BIAS_CORRECTION))
    )
    assert adaptive < 0.95 * nearest


def test_scales_stay_and_results_are_reproducible() -> None:
    prepared, profile, context = ready(mobile(), "int8-pow2", weights=True)
    assert context.parameters is not None
    weights = context.parameters.weights
    scales = {key: weight.scale.copy() for key, weight in weights.items()}
    adaround(prepared, profile, context)
    first = {key: weight.values.copy() for key, weight in weights.items()}
    adaround(prepared, profile, context)
    for key, weight in weights.items():
        assert np.array_equal(weight.scale, scales[key])
        assert np.array_equal(weight.values, first[key])
        assert np.array_equal(np.exp2(np.rint(np.log2(weight.scale))), weight.scale)
        assert weight.values.dtype == np.int8
    assert "dB lower" in context.notes[-1]


def test_it_says_that_it_needs_data() -> None:
    prepared, profile, context = ready(mobile(), "int8", weights=True)
    context.batches = None
    with pytest.raises(QuantizationError, match="tool 'adaround' needs calibration data"):
        adaround(prepared, profile, context)
