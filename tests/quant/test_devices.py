"""Scheme devices: formats as the offers of targets ask for them, borders between formats, and who takes what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from quant_nets import batches, chain, parsed

import nestc
from nestc.demo.data import INPUT, labelled_images, model_path
from nestc.errors import QuantizationError, ShapeError
from nestc.graph.bind import bind
from nestc.graph.region import Region
from nestc.quant.devices import by_devices, formats_asked
from nestc.quant.explain import reasons
from nestc.quant.prepare import prepare
from nestc.quant.scheme import scheme_named
from nestc.targets import make
from nestc.targets.api import Machine, Offer, QuantSpec, constraint

SHAPES = {"x": [1, 3, 8, 8]}


@constraint
def integers(region: Region) -> bool:
    """only int16 goes in and out"""
    return all(region.types[name].dtype == "int16" for name in (*region.inputs, *region.outputs))


class Asking:
    """A target that takes products whose operands come in a format of its own, at a cost of its own."""

    def __init__(self, name: str, scheme: str, ops: set[str], cost: Callable[[Region], float] | None, *where: Any):
        self.name = name
        self.machine = Machine(name, (), ())
        tails = {"Relu", "Add", "Cast", "DequantizeLinear", "QuantizeLinear"}
        anchors = frozenset[str | None](ops)
        self.offers = (Offer("x", frozenset(ops | tails), anchors, where, QuantSpec(scheme), cost),)

    def compile(self, *_: Any) -> Any:
        raise NotImplementedError

    def open(self) -> Any:
        raise NotImplementedError


def profiled(model: nestc.Model) -> tuple[nestc.Model, nestc.Profile]:
    return prepare(model), nestc.calibrate(model, batches(2, size=1), "minmax")


def roles(quantized: nestc.Model) -> dict[str, str]:
    return {each.node: each.scheme for each in reasons(quantized)}


def conv_and_others(prepared: nestc.Model) -> tuple[str, str, str]:
    """The names of the two convolutions and of the product of `chain`."""
    first, second, last = (node.name or "" for node in prepared.ir.graph if node.op_type in ("Conv", "MatMul"))
    return first, second, last


def test_offers_ask_for_formats_and_names_of_targets_mean_nothing() -> None:
    asked = formats_asked([make("cpu"), make("vta"), make("aim"), Asking("npu", "int16", {"Conv"}, None)])
    assert {scheme: [target.name for target, _ in who] for scheme, who in asked.items()} == {
        "int8-pow2": ["vta"], "bf16": ["aim"], "int16": ["npu"]
    }  # fmt: skip
    assert formats_asked([make("aim:number=float16")]) == {}
    model = bind(chain(), SHAPES)
    prepared, profile = profiled(model)
    first, second, last = conv_and_others(prepared)
    npu = Asking("npu", "int16", {"Conv"}, lambda region: 1e-6)
    quantized = nestc.quantize(model, profile, "devices", targets=[npu], tools=[])
    assert [roles(quantized)[name] for name in (first, second, last)] == ["int16", "int16", "int8"]
    assert quantized.ir.metadata_props["nestc.scheme"] == "devices"
    told = {each.node: each.reason for each in reasons(quantized)}
    assert told[first].endswith("; for npu, 1.0 us modelled")
    floats = nestc.quantize(model, profile, "devices:float", targets=[npu], tools=[])
    assert [roles(floats)[name] for name in (first, second, last)] == ["int16", "int16", "float"]


def test_of_two_devices_the_faster_has_a_node_and_of_equal_ones_the_first() -> None:
    model = bind(chain(), SHAPES)
    prepared, profile = profiled(model)
    first, second, last = conv_and_others(prepared)
    npu = Asking("npu", "int16", {"Conv"}, lambda region: 2e-6)
    # The 1x1 convolution is fast in the memory, the 3x3 one is not.
    pim = Asking("pim", "bf16", {"Conv", "MatMul"}, lambda region: 1e-6 if second in str(region.origin) else 9e-6)
    quantized = nestc.quantize(model, profile, "devices", targets=[npu, pim], tools=[])
    assert [roles(quantized)[name] for name in (first, second, last)] == ["int16", "bf16", "bf16"]
    told = {each.node: each.reason for each in reasons(quantized)}
    assert told[second].endswith("; for pim, 1.0 us modelled, rather than int16 for npu, 2.0 us modelled")
    twice = [npu, Asking("npu_2", "int16", {"Conv"}, lambda region: 1e-6)]
    found = nestc.quantize(model, profile, "devices", targets=twice, tools=[])
    assert next(each.reason for each in reasons(found) if each.node == first).endswith("; for npu_2, 1.0 us modelled")
    same = [Asking("pim", "bf16", {"Conv"}, None), Asking("npu", "int16", {"Conv"}, None)]
    for order, scheme in ((same, "bf16"), (same[::-1], "int16")):
        found = nestc.quantize(model, profile, "devices", targets=order, tools=[])
        assert {roles(found)[name] for name in (first, second)} == {scheme}


def test_overrides_go_before_what_devices_ask_for() -> None:
    model = bind(chain(), SHAPES)
    prepared, profile = profiled(model)
    first, second, last = conv_and_others(prepared)
    npu = Asking("npu", "int16", {"Conv", "MatMul"}, None)
    given = {first: "float", last: "int8"}
    found = roles(nestc.quantize(model, profile, "devices", targets=[npu], overrides=given, tools=[]))
    assert [found[name] for name in (first, second, last)] == ["float", "int16", "int8"]


TWO = """
<ir_version: 8, opset_import: ["": 17]>
two (float[1, 4, 6, 6] x) => (float[1, 3] y)
<float[4, 4, 3, 3] w1, float[4, 4, 1, 1] w2, float[144, 3] w3>
{
  a = Conv <pads=[1, 1, 1, 1]> (x, w1)
  r = Relu (a)
  b = Conv (r, w2)
  f = Flatten (b)
  y = MatMul (f, w3)
}
"""


def two() -> nestc.Model:
    random = np.random.default_rng(5)
    shapes = {"w1": (4, 4, 3, 3), "w2": (4, 4, 1, 1), "w3": (144, 3)}
    return parsed(TWO, **{name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def two_data(count: int = 4) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(6)
    return [{"x": random.standard_normal((1, 4, 6, 6)).astype(np.float32)} for _ in range(count)]


def test_what_a_device_stores_in_integers_is_read_as_it_was_stored() -> None:
    model, data = two(), two_data()
    profile = nestc.calibrate(model, data, "minmax")
    npu = Asking("npu", "int16", {"Conv"}, None, integers)
    pim = Asking("pim", "bf16", {"MatMul"}, None)
    quantized = nestc.quantize(model, profile, "devices", targets=[npu, pim], tools=[])
    graph = quantized.ir.graph
    product = next(node for node in graph if node.op_type == "MatMul")
    path: list[str] = []
    value = product.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type != "Conv":
        path.append(node.op_type)
        value = node.inputs[0]
    # From the product back: bfloat16 of what the convolution's device has stored, not of the sums.
    assert sorted(path) == ["Cast", "Cast", "DequantizeLinear", "Flatten", "QuantizeLinear"]
    assert path[-2:] == ["DequantizeLinear", "QuantizeLinear"]
    session = ort.InferenceSession(ir.to_proto(quantized.ir).SerializeToString(), providers=["CPUExecutionProvider"])
    ours, plain = nestc.compile(quantized), nestc.compile(model)
    for batch in data:
        exact = plain.run(batch)["y"]
        found = ours.run(batch)["y"]
        np.testing.assert_allclose(found, session.run(None, batch)[0], rtol=1e-5, atol=1e-4)
        noise = float(np.square(found - exact).sum())
        assert 10 * math.log10(float(np.square(exact).sum()) / noise) > 40  # bfloat16 is what rounds most
    # Alone the memory reads float sums, which nobody rounds before.
    alone = nestc.quantize(model, profile, "devices:float", targets=[pim], tools=[])
    assert "QuantizeLinear" not in {node.op_type for node in alone.ir.graph}


def test_what_is_refused_beside_other_formats_falls_back() -> None:
    model, data = two(), two_data()
    profile = nestc.calibrate(model, data, "minmax")
    prepared = prepare(model)
    first, second, last = conv_and_others(prepared)

    @constraint
    def whole(region: Region) -> bool:
        """the matrix has to be read from int16, too"""
        return any(name.startswith(("a", "r")) for name in region.types) or "int16" in {
            region.types[name].dtype for name in region.inputs
        }

    # The second product is taken only where the one before gives int16, which the faster memory prevents.
    npu = Asking("npu", "int16", {"Conv", "MatMul"}, lambda region: 5e-6, whole)
    pim = Asking("pim", "bf16", {"MatMul"}, lambda region: 1e-6)
    found = by_devices(prepared, profile, [npu, pim])
    assert found.scheme == scheme_named("int16")
    assert found.wishes.schemes[last] == scheme_named("bf16") and found.wishes.schemes[first] == scheme_named("int16")
    assert second in found.wishes.stored


def test_without_such_targets_all_is_int8_and_bad_input_is_told() -> None:
    model = bind(chain(), SHAPES)
    _, profile = profiled(model)
    plain, asked = (nestc.quantize(model, profile, scheme, targets=targets, tools=[])
                    for scheme, targets in (("int8", None), ("devices", ["cpu"])))  # fmt: skip
    assert roles(plain) == roles(asked) and plain.ir.metadata_props["nestc.scheme"] == "int8"
    with pytest.raises(QuantizationError, match="name them"):
        nestc.quantize(model, profile, "devices")
    with pytest.raises(QuantizationError, match="targets are for the schemes devices and auto"):
        nestc.quantize(model, profile, "int8", targets=["vta"])
    with pytest.raises(QuantizationError, match="nothing to change"):
        nestc.quantize(model, profile, "devices:float", targets=["cpu"])
    with pytest.raises(QuantizationError, match="scheme devices is for a whole model"):
        nestc.quantize(model, profile, "int8", overrides={"*": "devices"})
    open_sizes = parsed(TWO.replace("[1, 4, 6, 6]", "[1, 4, H, 6]").replace("[144, 3]", "[144, 3]"), **{
        name: np.zeros(shape, np.float32) for name, shape in {"w1": (4, 4, 3, 3), "w2": (4, 4, 1, 1), "w3": (144, 3)}.items()
    })  # fmt: skip
    with pytest.raises(ShapeError, match="offers regions of known sizes"):
        by_devices(prepare(open_sizes), profile, [make("vta")])


def test_without_a_profile_only_formats_without_ranges_are_chosen() -> None:
    model = bind(chain(), SHAPES)
    first, second, last = conv_and_others(prepare(model))
    targets = [Asking("npu", "int16", {"Conv"}, None), Asking("pim", "bf16", {"MatMul"}, None)]
    found = roles(nestc.quantize(model, None, "devices", targets=targets))
    assert [found[name] for name in (first, second, last)] == ["float", "float", "bf16"]


def test_the_demo_network_is_computed_on_three_devices() -> None:
    images, _ = labelled_images()
    model = nestc.load(model_path(), shapes={INPUT: [1, 1, 28, 28]})
    samples = [{INPUT: image[None]} for image in images[:30]]
    profile = nestc.calibrate(model, samples, "mse")
    quantized = nestc.quantize(model, profile, "devices", data=samples, targets=["cpu", "vta", "aim"])
    onnx.checker.check_model(ir.to_proto(quantized.ir))
    found = {each.node: each for each in reasons(quantized)}
    assert {each.scheme for each in found.values() if each.op == "Conv"} == {"int8-pow2"}
    assert {each.scheme for each in found.values() if each.op == "Gemm"} == {"bf16"}
    assert sum("for vta" in each.reason for each in found.values() if each.op == "Conv") == 10
    ours = nestc.compile(quantized, targets=["vta", "aim", "cpu"], placement="order")
    devices = {op: region.device for region in ours.plan.regions for op in region.ops if op in ("Conv", "Gemm")}
    assert devices == {"Conv": "vta", "Gemm": "aim"}
    assert {part.device for part in ours.plan.partitions} == {"vta", "aim", "cpu"}
    plain, integers = nestc.compile(model), nestc.compile(quantized)
    same = 0
    for image in images[100:140]:
        exact, found_there = plain(image[None]), ours(image[None])
        same += int(exact.argmax() == found_there.argmax())
        # VTA rounds ties up (docs/vta.md), which here makes a few steps of int8; AiM rounds its sums to bfloat16.
        np.testing.assert_allclose(found_there, integers(image[None]), atol=0.05 * float(np.abs(exact).max()))
    assert same >= 38


RECURRENT = """
<ir_version: 10, opset_import: ["": 21]>
steps (float[5, 2, 24] x) => (float[1, 2, 20] h, float[5, 2, 7] y)
<float[1, 80, 24] w, float[1, 80, 20] r, float[1, 160] b, float[1, 60, 20] gw, float[1, 60, 20] gr, float[20, 7] last,
 int64[1] one = {1}>
{
  a, h = LSTM <hidden_size=20> (x, w, r, b)
  s = Squeeze (a, one)
  g = GRU <hidden_size=20, linear_before_reset=1> (s, gw, gr)
  q = Squeeze (g, one)
  y = MatMul (q, last)
}
"""


def test_recurrent_nodes_are_rounded_to_bfloat16_and_run_in_the_memory() -> None:
    random = np.random.default_rng(9)
    shapes = {"w": (1, 80, 24), "r": (1, 80, 20), "b": (1, 160), "gw": (1, 60, 20), "gr": (1, 60, 20), "last": (20, 7)}
    weights = {name: random.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    model = parsed(RECURRENT, **weights)
    quantized = nestc.quantize(model, None, "devices", targets=["aim"])
    onnx.checker.check_model(ir.to_proto(quantized.ir))
    assert {each.op: each.scheme for each in reasons(quantized) if each.op != "Squeeze"} == {
        "LSTM": "bf16", "GRU": "bf16", "MatMul": "bf16"
    }  # fmt: skip
    ours = nestc.compile(quantized, targets=["aim"])
    devices = {op: region.device for region in ours.plan.regions for op in region.ops}
    assert (devices["LSTM"], devices["GRU"]) == ("aim", "aim")
    x = {"x": random.standard_normal((5, 2, 24)).astype(np.float32)}
    session = ort.InferenceSession(ir.to_proto(quantized.ir).SerializeToString(), providers=["CPUExecutionProvider"])
    exact, found, here = nestc.compile(model).run(x), ours.run(x), nestc.compile(quantized).run(x)
    for name, standard in zip(("h", "y"), session.run(["h", "y"], x), strict=True):
        np.testing.assert_allclose(here[name], standard, rtol=1e-4, atol=1e-5)
        for other in (found[name], here[name]):
            noise = float(np.square(other - exact[name]).sum())
            assert 10 * math.log10(float(np.square(exact[name]).sum()) / noise) > 35
