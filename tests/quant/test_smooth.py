"""SmoothQuant: the float function stays, outliers go to the weights, the quantized model is nearer."""

from __future__ import annotations

import numpy as np
import pytest
from tool_nets import data, mlp, ready, reference, results

import nestc
from nestc.quant import quantize as stage
from nestc.quant.observe import observe
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.quant.smooth import SMOOTHQUANT, smooth, smoothing_scale
from nestc.quant.tools import Tool


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("calibrate", [True, False])
def test_the_float_function_stays(alpha: float, calibrate: bool) -> None:
    model = mlp()
    prepared, profile, context = ready(model, "int8")
    before = results(prepared, data(model))
    if not calibrate:
        context.calibrate = None
    changed = smooth(prepared, profile, context, alpha)
    assert np.abs(results(prepared, data(model)) - before).max() <= 1e-5 * np.abs(before).max()
    changed.require(prepared.hash)
    assert "smoothquant: 2 tensors smoothed" in context.notes[-1]


def test_a_normalization_takes_the_scale_in_and_gelu_is_followed_by_one() -> None:
    prepared, profile, context = ready(mlp(), "int8")
    smooth(prepared, profile, context)
    assert [node.op_type for node in prepared.ir.graph] == [
        "LayerNormalization", "MatMul", "Add", "Gelu", "Mul", "MatMul",
    ]  # fmt: skip


def test_scales_are_those_of_the_paper() -> None:
    prepared, profile, _ = ready(mlp(), "int8")
    stats = profile.stats("n")
    ranges = np.maximum(np.abs(stats.channel_min), np.abs(stats.channel_max))
    weights = np.linspace(0.5, 2.0, 16)
    scale = smoothing_scale(stats, [weights, weights / 2], 0.7)
    wanted = ranges**0.7 / weights**0.3
    assert scale is not None
    assert np.allclose(scale / scale[0], wanted / wanted[0])
    assert np.exp(np.log(scale).mean()) == pytest.approx(1.0)
    assert prepared.outputs["y"][1] == (2, 4, 8)


def test_ranges_of_activations_and_weights_meet_at_one_half() -> None:
    prepared, profile, context = ready(mlp(), "int8")
    before = profile.stats("n")
    after = smooth(prepared, profile, context).stats("n")

    def spread(low: np.ndarray, high: np.ndarray) -> float:
        largest = np.maximum(np.abs(low), np.abs(high))
        return float(largest.max() / np.median(largest))

    assert spread(before.channel_min, before.channel_max) > 15.0
    assert spread(after.channel_min, after.channel_max) < 8.0


def quantized(model: nestc.Model, tools: tuple[Tool, ...]) -> nestc.Model:
    batches = data(model)
    profile = observe(prepare(model), batches, reference, "minmax")
    return stage.quantize(
        model, profile, scheme_named("int8"), None, tools, batches=batches, compiler=reference,
        calibrate=lambda changed: observe(changed, batches, reference, "minmax"),
    )  # fmt: skip


def test_the_quantized_model_is_nearer() -> None:
    model = mlp()
    fresh = data(model, seed=6)
    exact = results(model, fresh)
    plain = float(((results(quantized(model, ()), fresh) - exact) ** 2).mean())
    smoothed = float(((results(quantized(model, (SMOOTHQUANT,)), fresh) - exact) ** 2).mean())
    assert smoothed < 0.7 * plain
