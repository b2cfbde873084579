"""Cross-layer equalization: the float function stays, ranges of channels meet, bounds are dropped where they may."""

from __future__ import annotations

import numpy as np
import pytest
from tool_nets import data, mobile, ready, reference, results, stack

import nestc
from nestc.graph.passes.rewrite import array, operand
from nestc.quant import quantize as stage
from nestc.quant.equalize import EQUALIZE, FACTORS, equalize, fitting_factor, quantized_tensors, scalable_groups
from nestc.quant.observe import observe
from nestc.quant.prepare import prepare
from nestc.quant.saturate import drop_saturated
from nestc.quant.scheme import scheme_named
from nestc.quant.tools import Tool


def ops(model: nestc.Model) -> list[str]:
    return [node.op_type for node in model.ir.graph]


@pytest.mark.parametrize("scheme", ["int8", "int8-pow2", "int8:granularity=tensor", "int8-pow2:granularity=tensor"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_the_float_function_stays(scheme: str, calibrate: bool) -> None:
    model = mobile()
    prepared, profile, context = ready(model, scheme)
    before = results(prepared, data(model))
    if not calibrate:
        context.calibrate = None
    changed = equalize(prepared, profile, context)
    after = results(prepared, data(model))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    changed.require(prepared.hash)
    assert "of 4 sets of tensors between layers scaled channel by channel" in context.notes[-1]


def test_groups_are_what_must_be_scaled_alike() -> None:
    groups = scalable_groups(prepare(mobile()))
    described = sorted((group.channels, len(group.makers), len(group.readers), len(group.clips)) for group in groups)
    # p, q, s, g and f are one group: two convolutions make it, a convolution and the Gemm read it.
    assert described == [(4, 2, 2, 0), (6, 1, 1, 0), (8, 1, 1, 1), (8, 1, 1, 1)]


def test_a_clip_keeps_its_bound_in_every_channel() -> None:
    prepared, profile, context = ready(mobile(spread=256.0), "int8:granularity=tensor")
    equalize(prepared, profile, context)
    assert ops(prepared)[:5] == ["Conv", "Clip", "Min", "Conv", "Clip"]
    clip, least = list(prepared.ir.graph)[1:3]
    bounds, widest = array(operand(least, 1)), array(operand(clip, 2))
    assert bounds is not None and widest is not None and bounds.shape == (8, 1, 1)
    assert bounds.max() == pytest.approx(float(widest))
    assert least.outputs[0].name == "a6"


@pytest.mark.parametrize("scheme", ["int8", "int8-pow2"])
def test_weights_with_a_scale_a_channel_need_no_bound_a_channel(scheme: str) -> None:
    prepared, profile, context = ready(mobile(spread=256.0), scheme)
    equalize(prepared, profile, context)
    assert "Min" not in ops(prepared) and ops(prepared).count("Clip") == 2


def test_powers_of_two_fit_each_tensor_best_afterwards() -> None:
    scheme = scheme_named("int8-pow2")
    prepared, profile, context = ready(mobile(), "int8-pow2")
    after = equalize(prepared, profile, context)
    names = quantized_tensors(prepared, context.assignment)
    for group in scalable_groups(prepared):
        assert fitting_factor(group, after, names, scheme) in (FACTORS[0], FACTORS[1], FACTORS[-1])
    observed = observe(prepared, data(mobile()), reference, "minmax")
    assert after.stats("a6").max == pytest.approx(observed.stats("a6").max, rel=1e-4)


def sqnr(scheme: str, tools: tuple[Tool, ...]) -> float:
    model = stack(spread=64.0)
    batches = data(model)
    profile = observe(prepare(model), batches, reference, "mse")
    quantized = stage.quantize(
        model, profile, scheme_named(scheme), None, tools, batches=batches, compiler=reference,
        calibrate=lambda changed: observe(changed, batches, reference, "mse"),
    )  # fmt: skip
    fresh = data(model, seed=7)
    exact = results(model, fresh)
    return float(10 * np.log10((exact**2).sum() / ((results(quantized, fresh) - exact) ** 2).sum()))


@pytest.mark.parametrize("scheme", ["int8-pow2", "int8-pow2:granularity=tensor", "int8:granularity=tensor"])
def test_the_quantized_model_is_nearer(scheme: str) -> None:
    assert sqnr(scheme, (EQUALIZE,)) > sqnr(scheme, ()) + 0.5


def test_bounds_that_rounding_keeps_are_dropped() -> None:
    model = mobile()
    prepared, profile, context = ready(model, "int8-pow2", weights=True)
    batches = context.data("test")
    quantized = stage.quantize(
        model, profile, context.assignment.scheme, None, (EQUALIZE,), batches=batches, compiler=reference,
        calibrate=context.calibrate,
    )  # fmt: skip
    kept = [node for node in quantized.ir.graph if node.op_type == "Min"]
    before = results(quantized, data(model, seed=3))
    for node in kept:
        limit = array(operand(node, 1))
        reader = next(iter(node.outputs[0].uses())).node
        scale = array(operand(reader, 1))
        assert limit is not None and scale is not None
        assert limit.min() < 127 * float(scale)
    assert drop_saturated(quantized) == 0
    assert np.array_equal(results(quantized, data(model, seed=3)), before)
    assert prepared.outputs == quantized.outputs
