"""Tails of integer kernels that add another 8-bit map, by definition and in every way that they are stored."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.graph.region import TensorType
from nestc.kernels.api import Layout
from nestc.kernels.families import choose
from nestc.kernels.tail_fold import fold_of, lookup_of, residual_of
from nestc.kernels.testing import host_machine, region_of, run_lowered

HOST = host_machine()


def f32(value):
    return np.array(value, np.float32)


def case_of(channels=16, depthwise=False, inner=True, relu=True, swapped=False, dtype="uint8", size=(7, 9), seed=0):
    """Conv, perhaps QuantizeLinear and back, Add of a dequantized map, perhaps Relu, QuantizeLinear; with the result
    in float64 and one rounding for each QuantizeLinear."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    inputs = channels if depthwise else 24
    x = rng.integers(0, 256, (1, inputs, *size), np.uint8)
    w = rng.integers(-127, 128, (channels, 1 if depthwise else inputs, 1, 1), np.int8)
    z = rng.integers(info.min, info.max, (1, channels, *size), dtype, endpoint=True)
    constants = {
        "xs": f32(0.021), "xz": np.array(100, np.uint8), "w": w, "ws": f32(rng.uniform(0.001, 0.005, channels)),
        "s1": f32(0.0612347), "z1": np.array(7 if inner else 0, dtype), "s2": f32(0.0831719), "z2": np.array(-9 if dtype == "int8" else 90, dtype),
        "s3": f32(0.1103121), "z3": np.array(5, dtype),
    }  # fmt: skip
    dq = [helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"])]
    dq.append(helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=0))
    nodes = [*dq, helper.make_node("Conv", ["xf", "wf"], ["y"], group=channels if depthwise else 1)]
    value = "y"
    if inner:
        nodes += [
            helper.make_node("QuantizeLinear", ["y", "s1", "z1"], ["y1"]),
            helper.make_node("DequantizeLinear", ["y1", "s1", "z1"], ["y2"]),
        ]
        value = "y2"
    nodes.append(helper.make_node("DequantizeLinear", ["z", "s2", "z2"], ["zf"]))
    nodes.append(helper.make_node("Add", ["zf", value] if swapped else [value, "zf"], ["t"]))
    if relu:
        nodes.append(helper.make_node("Relu", ["t"], ["r"]))
    nodes.append(helper.make_node("QuantizeLinear", ["r" if relu else "t", "s3", "z3"], ["q"]))
    used = {name for node in nodes for name in node.input}
    constants = {name: array for name, array in constants.items() if name in used}

    def number(name):
        return constants[name].astype(np.float64)

    xi, wi = x.astype(np.int64) - 100, w[:, :, 0, 0].astype(np.int64)
    sums = xi * wi.reshape(1, -1, 1, 1) if depthwise else np.einsum("nchw,oc->nohw", xi, wi)
    real = sums * (number("xs") * number("ws")).reshape(1, -1, 1, 1)
    values = {**constants, "x": x, "z": z, "xf": x.astype(np.float32), "wf": w.astype(np.float32)}
    values |= dict.fromkeys(("y", "y2", "zf", "t", "r"), real.astype(np.float32))
    if inner:
        codes = np.clip(np.rint(real / number("s1")) + 7, info.min, info.max)
        values["y1"] = codes.astype(dtype)
        real = (codes - 7) * number("s1")
    total = real + (z.astype(np.int64) - int(constants["z2"])) * number("s2")
    total = np.maximum(total, 0) if relu else total
    values["q"] = np.clip(np.rint(total / number("s3")) + 5, info.min, info.max).astype(dtype)
    return region_of(nodes, values, ["q"], list(constants), "Conv"), values


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("channels", [16, 19])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_sums_with_another_map(depthwise, channels, inner, dtype):
    for swapped, relu in ((False, True), (True, False)):
        region, values = case_of(channels, depthwise, inner, relu, swapped, dtype)
        anchor = next(op for op in region.ops if op.op_type == "Conv")
        assert fold_of(region, anchor) is None and residual_of(region, anchor) is not None
        family, _ = choose(region)
        assert family is not None and family.name == ("depthwise_int8" if depthwise else "conv_int8")
        layouts = family.layouts(region, HOST, dict.fromkeys(region.inputs, Layout(HOST.lanes("float32"))))
        lowered = family.lower(region, HOST, layouts)
        for jit in (True, False):
            found = run_lowered(region, lowered, values, HOST, layouts, jit)["q"]
            off = np.abs(found.astype(int) - values["q"].astype(int))
            assert off.max() <= 1 and off.sum() <= 1  # float32 next to a tie


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("channels", [16, 19])
@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8")])
def test_functions_of_the_quantized_value(depthwise, channels, dtypes):
    """Swish between two quantizations: what a kernel of its own would give, in a table."""
    region, values = case_of(channels, depthwise, True, False, dtype=dtypes[0])
    nodes = [
        helper.make_node("Sigmoid", ["y2"], ["t"]),
        helper.make_node("Mul", ["t", "y2"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s3", "z3"], ["q"]),
    ]
    real = (values["y1"].astype(np.float64) - 7) * values["s1"].astype(np.float64)
    info = np.iinfo(dtypes[1])
    result = np.rint(real / (1 + np.exp(-real)) / values["s3"].astype(np.float64)) + 5
    values = {**values, "z3": np.array(5, dtypes[1]), "q": np.clip(result, info.min, info.max).astype(dtypes[1])}
    made = {"r": values["r"], "t": values["t"]}
    tail = region_of(nodes, {**values, **made}, ["q"], ["s3", "z3"])
    place = next(i for i, op in enumerate(region.ops) if op.outputs[0] == "y2")
    ops = (*region.ops[: place + 1], *tail.ops)
    whole = type(region)(
        region.name, "Conv", ops, ("x",), ("q",), {**region.types, **tail.types},
        {**region.constants, **tail.constants},
    )  # fmt: skip
    anchor = next(op for op in whole.ops if op.op_type == "Conv")
    assert lookup_of(whole, anchor) is not None and fold_of(whole, anchor) is None
    family, _ = choose(whole)
    assert family is not None
    layouts = family.layouts(whole, HOST, dict.fromkeys(whole.inputs, Layout(HOST.lanes("float32"))))
    lowered = family.lower(whole, HOST, layouts)
    for jit in (True, False):
        found = run_lowered(whole, lowered, values, HOST, layouts, jit)["q"]
        off = np.abs(found.astype(int) - values["q"].astype(int))
        assert off.max() <= 1 and off.sum() <= 1


def test_numbers():
    region, _ = case_of()
    anchor = next(op for op in region.ops if op.op_type == "Conv")
    found = residual_of(region, anchor)
    assert found is not None and found.first is not None and found.other == "z"
    assert (found.first.zero, found.last.zero, found.last.low) == (7, 5, 0)
    a, b, c = found.numbers
    np.testing.assert_allclose(
        [a, b, c], [0.0612347 / 0.1103121, 0.0831719 / 0.1103121, -90 * 0.0831719 / 0.1103121], rtol=1e-6
    )


def test_what_is_no_such_sum():
    region, _ = case_of()
    anchor = next(op for op in region.ops if op.op_type == "Conv")
    # The value between the two quantizations is wanted as well.
    wanted = type(region)(**{**region.__dict__, "outputs": ("y1", "q")})
    assert residual_of(wanted, anchor) is None
    for cut in (-1, -2):
        shorter = type(region)(**{**region.__dict__, "ops": region.ops[:cut], "outputs": region.ops[cut - 1].outputs})
        assert residual_of(shorter, anchor) is None


@pytest.mark.parametrize("size", [(5,), (5, 6)])
@pytest.mark.parametrize("channels", [3, 16, 19])
def test_a_map_is_added_to_its_own_depthwise_convolution(channels, size):
    """q = round(2 * x + x), where the kernel reads x both as rows of bytes and in its tail."""
    rank = len(size)
    constants = {"s": f32(0.25), "ws": f32(0.5), "w": np.full((channels, 1, *(1,) * rank), 4, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"]),
        helper.make_node("Conv", ["xf", "wf"], ["y"], group=channels),
        helper.make_node("DequantizeLinear", ["x", "s"], ["x2"]),
        helper.make_node("Add", ["y", "x2"], ["t"]),
        helper.make_node("QuantizeLinear", ["t", "s", "z"], ["q"]),
    ]
    constants["z"] = np.int8(0)
    shape = [2, channels, *size]
    graph = helper.make_graph(
        nodes,
        "own",
        [helper.make_tensor_value_info("x", TensorProto.INT8, shape)],
        [helper.make_tensor_value_info("q", TensorProto.INT8, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(0).integers(-40, 41, shape).astype(np.int8)
    found = nestc.compile(nestc.load(model), targets=["cpu"], threads=1).run({"x": x})["q"]
    np.testing.assert_array_equal(found, 3 * x)


@pytest.mark.parametrize(("bounds", "expected"), [((40.0, None), 127), ((None, -40.0), -128)])
def test_bounds_beyond_what_the_output_can_be(bounds, expected):
    region, values = case_of(relu=True, dtype="int8")
    ops = list(region.ops)
    place = next(i for i, op in enumerate(ops) if op.op_type == "Relu")
    names = [f"bound{i}" if bound is not None else "" for i, bound in enumerate(bounds)]
    ops[place] = dataclasses.replace(ops[place], op_type="Clip", inputs=("t", *names))
    extra = {name: f32(bound) for name, bound in zip(names, bounds, strict=True) if name}
    region = dataclasses.replace(
        region,
        ops=tuple(ops),
        constants={**region.constants, **{name: lambda array=array: array for name, array in extra.items()}},
        types={**region.types, **{name: TensorType("float32", ()) for name in extra}},
    )
    family, _ = choose(region)
    layouts = family.layouts(region, HOST, {name: Layout(HOST.lanes("float32")) for name in region.inputs})
    feeds = {name: values[name] for name in region.inputs}
    found = run_lowered(region, family.lower(region, HOST, layouts), feeds, HOST, layouts)["q"]
    assert (found == expected).all()
