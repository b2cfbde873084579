"""An operator split over devices computes the same, in parts of the channels asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest

import nestc
from nestc.errors import PlanError
from nestc.graph import pipeline
from nestc.graph.model import Model
from nestc.graph.regions import form, regions
from nestc.partition.evaluate import evaluate
from nestc.partition.problem import HOST, Cost, Crossing, Edge, Evaluation, Problem, Solution, Stage, Task, Unit
from nestc.partition.split import Split, channels_of, propose, split


def net(kind: str) -> onnx.ModelProto:
    """One product of 96 channels with a bias, a scale a channel and a Relu behind it."""
    rng = np.random.default_rng(0)
    shapes = {
        "Conv": ([1, 8, 6, 6], (96, 8, 3, 3), (96, 1, 1)),
        "Gemm": ([5, 8], (96, 8), (96,)),
        "MatMul": ([2, 5, 8], (8, 96), (96,)),
    }
    x, w, s = shapes[kind]
    constants = {"w": rng.standard_normal(w), "b": rng.standard_normal(96), "s": rng.standard_normal(s)}
    attributes: dict[str, object] = {"Conv": {"pads": [1] * 4}, "Gemm": {"transB": 1}, "MatMul": {}}[kind]
    inputs = ["x", "w"] if kind == "MatMul" else ["x", "w", "b"]
    nodes = [
        oh.make_node(kind, inputs, ["c"], "product", **attributes),
        oh.make_node("Mul", ["c", "s"], ["m"], "scale"),
        oh.make_node("Relu", ["m"], ["y"], "relu"),
    ]
    graph = oh.make_graph(
        nodes,
        kind,
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)


def run(model: Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(ir.to_proto(model.ir).SerializeToString(), options).run(None, {"x": x})[0])


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_parts_compute_the_same(kind: str, quantized: bool) -> None:
    model = nestc.load(net(kind).SerializeToString())
    shape = model.inputs["x"][1]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)  # type: ignore[arg-type]
    if quantized:
        model = nestc.quantize(model, nestc.calibrate(model, [{"x": x}]), "int8")
    model = pipeline.optimize(model)
    whole = {region.name: region for region in regions(form(model))}
    heavy = [region for region in whole.values() if region.anchor == kind]
    assert [channels_of(region) for region in heavy] == [96]
    parted = split(model, [Split("product", (64, 32))], whole.values())
    formed = regions(form(parted))
    assert [channels_of(region) for region in formed if region.anchor == kind] == [64, 32]
    assert any(op.op_type == "Concat" for region in formed for op in region.ops)
    if not quantized:
        np.testing.assert_allclose(run(parted, x), run(model, x), rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(run(parted, x), run(model, x))
    ours = nestc.compile(parted, threads=1)(x)
    np.testing.assert_allclose(ours, run(model, x), rtol=1e-4, atol=1e-4)


def residual(quantized: bool) -> Model:
    """Three convolutions of 96 channels; the last one adds the result of the first to its own."""
    rng = np.random.default_rng(0)
    weights = {"v": (96, 8, 3, 3), "u": (96, 96, 1, 1), "w": (96, 96, 1, 1)}
    nodes = [
        oh.make_node("Conv", ["x", "v"], ["r"], "first", pads=[1] * 4),
        oh.make_node("Conv", ["r", "u"], ["m"], "middle"),
        oh.make_node("Conv", ["m", "w"], ["c"], "product"),
        oh.make_node("Add", ["c", "r"], ["s"], "residual"),
        oh.make_node("Relu", ["s"], ["y"], "relu"),
    ]
    graph = oh.make_graph(
        nodes,
        "residual",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8, 6, 6])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 8, name)
            for name, shape in weights.items()
        ],
    )
    model = nestc.load(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10).SerializeToString())
    if quantized:
        images = [{"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(2)]
        model = nestc.quantize(model, nestc.calibrate(model, images), "int8-pow2")
    return pipeline.optimize(model)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_each_part_takes_its_channels_of_a_residual(quantized: bool) -> None:
    model = residual(quantized)
    whole = regions(form(model))
    joined = next(region for region in whole if len(region.inputs) == 2)
    assert "Add" in {op.op_type for op in joined.ops} and channels_of(joined) == 96
    node = next(op.name for op in joined.ops if op.op_type == "Conv")
    parted = split(model, [Split(node, (64, 32))], whole)
    formed = regions(form(parted))
    assert sorted(channels_of(region) for region in formed if len(region.inputs) == 2 and region.anchor) == [32, 64]
    assert sum(op.op_type == "Slice" for region in formed for op in region.ops) == 2
    x = np.random.default_rng(3).standard_normal((1, 8, 6, 6)).astype(np.float32)
    if quantized:
        np.testing.assert_array_equal(run(parted, x), run(model, x))
    else:
        np.testing.assert_allclose(run(parted, x), run(model, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nestc.compile(parted, threads=1)(x), run(model, x), rtol=1e-4, atol=1e-4)


def test_what_needs_all_channels_or_a_value_twice_is_not_split() -> None:
    nodes = [
        oh.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1] * 4),
        oh.make_node("Add", ["c", "x"], ["y"], "residual"),
    ]
    graph = oh.make_graph(
        nodes,
        "residual",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64, 6, 6])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones((64, 64, 3, 3), np.float32), "w")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    found = regions(form(pipeline.optimize(nestc.load(model.SerializeToString()))))
    assert [channels_of(region) for region in found] == [0]


def test_operators_that_share_a_constant_may_be_split_otherwise() -> None:
    """Equal zero points of weights are one constant after optimisation; each part takes its own piece of it."""
    rng = np.random.default_rng(0)
    nodes = [
        oh.make_node("Conv", ["x", "w"], ["c"], "first", pads=[1] * 4),
        oh.make_node("Conv", ["c", "v"], ["y"], "second", pads=[1] * 4),
    ]
    graph = oh.make_graph(
        nodes,
        "two",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8, 6, 6])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in (("w", (96, 8, 3, 3)), ("v", (96, 96, 3, 3)))
        ],
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    x = rng.standard_normal((1, 8, 6, 6)).astype(np.float32)
    model = nestc.load(proto.SerializeToString())
    model = pipeline.optimize(nestc.quantize(model, nestc.calibrate(model, [{"x": x}]), "int8"))
    readers = Counter(name for node in model.ir.graph for value in node.inputs for name in [value and value.name])
    assert any(count == 2 and str(name).endswith("_zero_point") for name, count in readers.items())
    splits = [Split("first", (64, 32)), Split("second", (31, 1, 64))]
    parted = split(model, splits, regions(form(model)))
    np.testing.assert_allclose(run(parted, x), run(model, x), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(nestc.compile(parted, threads=1)(x), nestc.compile(model, threads=1)(x))


@pytest.mark.parametrize(
    ("node", "channels", "words"), [("relu", (96,), "no such product"), ("product", (64, 64), "it has 96")]
)
def test_a_split_of_another_model_is_refused(node: str, channels: tuple[int, ...], words: str) -> None:
    model = pipeline.optimize(nestc.load(net("Conv").SerializeToString()))
    with pytest.raises(PlanError, match=words):
        split(model, [Split(node, channels)], regions(form(model)))


def test_shares_are_such_that_both_devices_end_together() -> None:
    model = pipeline.optimize(nestc.load(net("Conv").SerializeToString()))
    (region,) = regions(form(model))
    units = (Unit("cpu", "cpu"), Unit("npu", "npu", launch=10e-6))
    task = Task(region.name, {"cpu": Cost(300e-6), "npu": Cost(500e-6)})
    wire = {(HOST, "npu"): Crossing(wire_seconds=20e-6), ("npu", HOST): Crossing(wire_seconds=40e-6)}
    edges = (Edge("x", None, region.name, 0, wire), Edge("y", region.name, None, 0, wire))
    problem = Problem(units, (task,), edges)
    stages = (Stage("cpu", (region.name,)),)
    solution = Solution(stages, Evaluation(300e-6, 300e-6, 0.0, {}, ()), "latency", 300e-6, True, "by hand")
    # 300 (1 - s) = (500 + 40) s + 10 + 20 -> s = 270 / 840 of 96 channels, in whole 32s.
    assert propose(problem, solution, {region.name: region}) == [Split("product", (64, 32))]
    slow = Problem(units, (Task(region.name, {"cpu": Cost(300e-6), "npu": Cost(9e-3)}),), edges)
    assert propose(slow, solution, {region.name: region}) == []


def test_the_way_takes_from_the_other_share_and_one_resource_is_not_shared() -> None:
    model = pipeline.optimize(nestc.load(net("Conv").SerializeToString()))
    (region,) = regions(form(model))
    units = (Unit("cpu", "cpu"), Unit("npu", "npu", launch=60e-6), Unit("lib", "cpu"))
    wire = {(HOST, "npu"): Crossing(wire_seconds=20e-6), ("npu", HOST): Crossing(wire_seconds=40e-6)}
    edges = (Edge("x", None, region.name, 0, wire), Edge("y", region.name, None, 0, wire))
    stages = (Stage("cpu", (region.name,)),)
    solution = Solution(stages, Evaluation(300e-6, 300e-6, 0.0, {}, ()), "latency", 300e-6, True, "by hand")
    # 300 (1 - s) = (200 + 40) s + 60 + 20 -> s = 220 / 540 of 96 channels.
    problem = Problem(units, (Task(region.name, {"cpu": Cost(300e-6), "npu": Cost(200e-6)}),), edges)
    assert propose(problem, solution, {region.name: region}) == [Split("product", (64, 32))]
    beside = Problem(units, (Task(region.name, {"cpu": Cost(300e-6), "lib": Cost(200e-6)}),), edges)
    assert propose(beside, solution, {region.name: region}) == []


@pytest.mark.parametrize(("seconds", "found"), [(250e-6, False), (80e-6, True)])
def test_a_device_that_is_busy_beside_a_region_takes_no_part_of_it(seconds: float, found: bool) -> None:
    """The NPU has a branch of its own for so long, between the tasks before and behind both; 300 us in all."""
    model = pipeline.optimize(nestc.load(net("Conv").SerializeToString()))
    (region,) = regions(form(model))
    units = (Unit("cpu", "cpu"), Unit("npu", "npu"))
    tasks = (
        Task("before", {"cpu": Cost(10e-6)}),
        Task(region.name, {"cpu": Cost(300e-6), "npu": Cost(300e-6)}),
        Task("beside", {"npu": Cost(seconds)}),
        Task("behind", {"cpu": Cost(10e-6)}),
    )
    pairs = (("before", region.name), ("before", "beside"), (region.name, "behind"), ("beside", "behind"))
    edges = (Edge("x", None, "before"), *(Edge(f"{a} {b}", a, b) for a, b in pairs), Edge("y", "behind", None))
    problem = Problem(units, tasks, edges)
    stages = (
        Stage("cpu", ("before",)),
        Stage("npu", ("beside",)),
        Stage("cpu", (region.name,)),
        Stage("cpu", ("behind",)),
    )
    solution = Solution(stages, evaluate(problem, stages), "latency", 0.0, False, "by hand")
    assert solution.value == pytest.approx(320e-6)
    # Half of it would take 150 us there.
    assert bool(propose(problem, solution, {region.name: region})) == found


def test_what_saves_little_of_the_whole_is_not_split() -> None:
    model = pipeline.optimize(nestc.load(net("Conv").SerializeToString()))
    (region,) = regions(form(model))
    units = (Unit("cpu", "cpu"), Unit("npu", "npu"))
    for rest, found in ((1e-3, True), (0.2, False)):  # a third of 300 us is saved
        tasks = (Task(region.name, {"cpu": Cost(300e-6), "npu": Cost(600e-6)}), Task("rest", {"cpu": Cost(rest)}))
        edges = (Edge("x", None, region.name), Edge("v", region.name, "rest"), Edge("y", "rest", None))
        problem = Problem(units, tasks, edges)
        stages = (Stage("cpu", (region.name, "rest")),)
        solution = Solution(stages, evaluate(problem, stages), "latency", 0.0, False, "by hand")
        assert bool(propose(problem, solution, {region.name: region})) == found
