"""Accuracy tools by name: order, errors, what a scheme brings, and each alone through the public face."""

from __future__ import annotations

import numpy as np
import pytest
from tool_nets import data, mobile, ready, results

import nestc
from nestc.errors import QuantizationError
from nestc.quant.scheme import SCHEMES
from nestc.quant.toolbox import MSE, TOOLS, tools_named, tools_of


def test_tools_work_in_their_own_order() -> None:
    named = tools_named(["bias-correction", "adaround", "equalize", "mse"])
    assert [tool.name for tool in named] == ["equalize", "mse", "adaround", "bias-correction"]


def test_an_unknown_tool_is_answered_with_the_nearest() -> None:
    with pytest.raises(QuantizationError, match="no accuracy tool 'ada-round', did you mean 'adaround'"):
        tools_named(["ada-round"])


def test_without_data_a_scheme_brings_the_tools_that_need_none() -> None:
    for scheme in SCHEMES.values():
        free, every = tools_of(scheme, False), tools_of(scheme, True)
        assert not any(tool.data for tool in free)
        assert [tool.name for tool in every if not tool.data] == [tool.name for tool in free]
        assert {tool.name for tool in every} == set(scheme.tools)


def test_least_error_changes_thresholds_and_keeps_integers_in_range() -> None:
    prepared, profile, context = ready(mobile(), "int8:weight=int4", weights=True)
    assert context.parameters is not None
    before = {key: weight.scale.copy() for key, weight in context.parameters.weights.items()}
    MSE.run(prepared, profile, context)
    after = context.parameters.weights
    assert any(not np.array_equal(after[key].scale, scale) for key, scale in before.items())
    assert all((after[key].scale <= scale * 1.0001).all() for key, scale in before.items() if after[key].values.any())
    assert all(np.abs(weight.values.astype(int)).max() <= 7 for weight in after.values())


@pytest.mark.parametrize("tool", [*TOOLS, "all"])
def test_each_tool_alone_through_the_public_face(tool: str) -> None:
    model = mobile(seed=4)
    batches = data(model)
    names = list(TOOLS) if tool == "all" else [tool]
    profile = nestc.calibrate(model, batches, "mse")
    quantized = nestc.quantize(model, profile, "int8-pow2", tools=names, data=batches)
    exact, made = results(model, batches), results(quantized, batches)
    assert 10 * np.log10((exact**2).sum() / ((made - exact) ** 2).sum()) > 20.0
    assert all(any(note.startswith(f"{name}:") for note in quantized.notes) for name in names)
