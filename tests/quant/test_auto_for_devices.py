"""Scheme auto for devices: formats by time over the devices, inside the budget, and then placed as usual."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_devices import Asking, roles
from test_search import fragile, rows

import nestc
from nestc.autoscheme import auto
from nestc.errors import QuantizationError
from nestc.graph.bind import bind
from nestc.graph.region import Region
from nestc.partition.cut import find_cuts
from nestc.quant.devices import by_devices
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.targets.api import Target


def products(model: nestc.Model) -> list[str]:
    return [node.name or "" for node in model.ir.graph if node.op_type == "MatMul"]


def memory(cost: Callable[[Region], float]) -> Target:
    return Asking("pim", "bf16", {"MatMul"}, cost)


def test_a_device_gets_what_it_computes_faster_than_the_cpu() -> None:
    model, data = bind(fragile(), {"x": [25, 8]}), rows()
    profile = nestc.calibrate(model, data, "minmax")
    prepared = prepare(model)
    first, second, third = products(prepared)
    slow = memory(lambda region: 1e-6 if second in str(region.origin) else 3e-6)
    found = by_devices(prepared, profile, [slow], "int8", None, find_cuts, {first: 2e-6, second: 2e-6, third: 2e-6})
    assert found.wishes.schemes[second] == scheme_named("bf16") and list(found.taken) == [second]
    assert found.wishes.schemes[first] == found.wishes.schemes[third] == scheme_named("int8")
    none = by_devices(prepared, profile, [slow], "int8", None, find_cuts, dict.fromkeys((first, second, third), 1e-7))
    assert none.scheme == scheme_named("int8") and none.wishes.schemes == {} and none.taken == {}


def test_formats_and_budget_are_chosen_together() -> None:
    model, data = bind(fragile(), {"x": [25, 8]}), rows()
    profile = nestc.calibrate(model, data, "minmax")
    first, second, third = products(prepare(model))
    # The memory is faster than any CPU, and its format loses nothing where 8 bits lose a lot.
    fast = auto(model, profile, "int8", data, 0.02, targets=[memory(lambda region: 1e-9)], tools=[])
    assert {roles(fast.model)[name] for name in (first, second, third)} == {"bf16"}
    assert fast.costs.kind == "modelled" and fast.costs.nodes[second][1] == pytest.approx(1e-3) and fast.overrides == {}
    assert fast.cost < 0.1 * fast.cost_float and "modelled cost" in str(fast)
    # Where it is slow the CPU's integers are taken, of which the fragile product goes back to float.
    slow = auto(model, profile, "int8", data, 0.02, targets=[memory(lambda region: 1.0)], tools=[])
    plain = auto(model, profile, "int8", data, 0.02, tools=[])
    assert roles(slow.model) == roles(plain.model) and roles(slow.model)[second] == "float"
    assert slow.score.loss <= 0.02 and slow.costs.kind == "measured"
    # A mix: the device asks for 8 bits too; what the budget does not allow is float, and the rest is for the device.
    npu = Asking("npu", "int8-symmetric", {"MatMul"}, lambda region: 1e-9)
    mixed = auto(model, profile, "int8", data, 0.02, targets=[npu], tools=[])
    found = roles(mixed.model)
    assert found[second] == "float" and "int8-symmetric" in {found[first], found[third]}
    assert mixed.score.loss <= 0.02 and second in mixed.overrides


def test_the_result_is_placed_as_usual() -> None:
    model, data = bind(fragile(), {"x": [4, 8]}), rows(count=4, size=4)
    profile = nestc.calibrate(model, data, "minmax")
    quantized = nestc.quantize(model, profile, "auto", data=data, accuracy_budget=0.1, targets=["aim", "cpu"], tools=[])
    exact, found = nestc.compile(model), nestc.compile(quantized, targets=["aim", "cpu"])
    wanted = np.concatenate([exact.run(batch)["y"].argmax(1) for batch in data])
    got = np.concatenate([found.run(batch)["y"].argmax(1) for batch in data])
    assert (wanted == got).mean() >= 0.9
    assert quantized.ir.metadata_props["nestc.scheme"] == "auto"
    with pytest.raises(QuantizationError, match="scheme auto is checked on data"):
        nestc.quantize(model, profile, "auto", targets=["aim", "cpu"])
