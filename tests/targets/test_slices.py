"""Batches in slices: which operators treat images on their own, which runs are sliced, and that the values stay right."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import nestc
from nestc.codegen.schedule import Alias, Loop, Step, schedule
from nestc.graph.region import Op, Region, TensorType
from nestc.targets.cpu import slices
from nestc.targets.cpu import target as cpu_target
from nestc.targets.cpu.images import Batch, batch_of, of_images
from nestc.targets.cpu.machine import machine
from nestc.targets.cpu.slices import Slices, choose_slices

N, C, H, W = 4, 8, 6, 6
Shapes = Mapping[str, tuple[int, ...]]


def region_of(*ops: Op, shapes: Shapes, constants: Mapping[str, np.ndarray] | None = None) -> Region:
    given = {name: (lambda array=array: array) for name, array in (constants or {}).items()}
    types = {name: TensorType("float32", shape) for name, shape in shapes.items()}
    types |= {name: TensorType("float32", array.shape) for name, array in (constants or {}).items()}
    made = {name for op in ops for name in op.outputs}
    inputs = dict.fromkeys(name for op in ops for name in op.inputs if name and name not in made and name not in given)
    return Region("r", ops[0].op_type, ops, tuple(inputs), ops[-1].outputs, types, given)


def one(
    kind: str,
    *operands: tuple[int, ...],
    out: tuple[int, ...] = (N, C, H, W),
    constants: Mapping[int, np.ndarray] | None = None,
    **attributes: int | tuple[int, ...],
) -> Region:
    """A region of one operator; operand `i` is called ``x<i>``."""
    given = {f"x{place}": array for place, array in (constants or {}).items()}
    shapes = {f"x{place}": shape for place, shape in enumerate(operands)}
    names = tuple(f"x{place}" for place in range(len(shapes | given)))
    op = Op(kind, names, ("y",), attributes)
    return region_of(op, shapes={**{k: v for k, v in shapes.items() if k not in given}, "y": out}, constants=given)


IMAGE = (N, C, H, W)


@pytest.mark.parametrize(
    ("region", "batched"),
    [
        (one("Conv", IMAGE, (C, C, 1, 1)), {"x0", "y"}),
        (one("Relu", IMAGE), {"x0", "y"}),
        (one("Add", IMAGE, IMAGE), {"x0", "x1", "y"}),
        (one("Add", IMAGE, (1, C, 1, 1)), {"x0", "y"}),
        (one("Mul", (N, C, 1, 1), IMAGE), {"x0", "x1", "y"}),
        (one("Mul", IMAGE, (C, 1, 1)), {"x0", "y"}),
        (one("MatMul", (N, 3, 5), (5, 7), out=(N, 3, 7)), {"x0", "y"}),
        (one("MatMul", (N, 3, 5), (N, 5, 7), out=(N, 3, 7)), {"x0", "x1", "y"}),
        (one("MatMul", (N, 5), (5, 7), out=(N, 7)), {"x0", "y"}),
        (one("Gemm", (N, N), (N, N), out=(N, N)), {"x0", "y"}),
        (one("Softmax", IMAGE, axis=1), {"x0", "y"}),
        (one("Concat", IMAGE, IMAGE, out=(N, 2 * C, H, W), axis=1), {"x0", "x1", "y"}),
        (one("Transpose", IMAGE, out=(N, H, W, C), perm=(0, 2, 3, 1)), {"x0", "y"}),
        (one("Reshape", IMAGE, (2,), out=(N, C * H * W)), {"x0", "y"}),
        (one("ReduceMean", IMAGE, out=(N, C, 1, 1), constants={1: np.array([2, 3])}), {"x0", "y"}),
        (one("GlobalAveragePool", IMAGE, out=(N, C, 1, 1)), {"x0", "y"}),
        (one("QuantizeLinear", IMAGE, (C,), (C,), axis=1), {"x0", "y"}),
    ],
    ids=lambda value: "_".join(op.op_type for op in value.ops) if isinstance(value, Region) else "",
)
def test_operators_that_treat_images_alone(region: Region, batched: set[str]) -> None:
    batch = batch_of(region)
    assert batch is not None
    assert batch == Batch(N, frozenset(batched))
    small = of_images(region, batch, 2)
    assert small.types["y"].shape == (2, *region.types["y"].shape[1:])
    assert {name for name in region.types if small.types[name] != region.types[name]} == batched


@pytest.mark.parametrize(
    "region",
    [
        one("Softmax", IMAGE, axis=0),
        one("Concat", IMAGE, IMAGE, out=(2 * N, C, H, W), axis=0),
        one("Transpose", (N, N, H, W), out=(N, N, H, W), perm=(1, 0, 2, 3)),
        one("ReduceMean", IMAGE, out=(N, C, 1, 1), constants={1: np.array([0, 3])}),
        one("Add", IMAGE, constants={1: np.zeros(IMAGE, np.float32)}),
        one("Conv", (1, C, H, W), (C, C, 1, 1), out=(1, C, H, W)),
        one("MeanVarianceNormalization", IMAGE),
        one("DynamicQuantizeLinear", IMAGE),
        one("LSTM", (N, 1, C), out=(N, 1, 1, C)),
        one("Gemm", (N, N), (N, N), out=(N, N), transA=1),
        one("CumSum", IMAGE, constants={1: np.array(0)}),
        one("BatchNormalization", IMAGE, (C,), (C,), (C,), (C,), training_mode=1),
        one("Pad", IMAGE, constants={1: np.array([1, 0, 0, 0, 0, 0, 0, 0])}, out=(N, C, H, W)),
    ],
    ids=lambda region: "_".join(op.op_type for op in region.ops),
)
def test_operators_that_do_not(region: Region) -> None:
    assert batch_of(region) is None


def test_a_weight_that_happens_to_have_as_many_rows_is_none() -> None:
    """What an operator inside the region makes of weights stays the same for all images; one value cannot be both."""
    dequantized = Op("DequantizeLinear", ("w", "s"), ("v",))
    product = Op("MatMul", ("x", "v"), ("y",))
    shapes = {"x": (N, N), "v": (N, N), "y": (N, N)}
    weights = {"w": np.zeros((N, N), np.float32), "s": np.ones((), np.float32)}
    batch = batch_of(region_of(dequantized, product, shapes=shapes, constants=weights))
    assert batch is not None
    assert batch.values == {"x", "y"}
    both = region_of(Op("MatMul", ("x", "x"), ("y",)), shapes={"x": (N, N), "y": (N, N)})
    assert batch_of(both) is None


# The model


def chain(channels: list[int], pixels: int, images: int) -> list[Region]:
    """Convolutions one behind the other, of one tap."""
    regions: list[Region] = []
    for number, (before, after) in enumerate(itertools.pairwise(channels)):
        name = f"v{number}"
        types = {
            name: TensorType("float32", (images, before, pixels, pixels)),
            f"v{number + 1}": TensorType("float32", (images, after, pixels, pixels)),
            "w": TensorType("float32", (after, before, 1, 1)),
        }
        op = Op("Conv", (name, "w"), (f"v{number + 1}",))
        zero = {"w": lambda: np.zeros(0, np.float32)}
        regions.append(Region(f"r{number}", "Conv", (op,), (name,), (f"v{number + 1}",), types, zero))
    return regions


MACHINE = dataclasses.replace(machine("avx2"), l2_bytes=1 << 20, l3_bytes=8 << 20)


def spans(found: list[Slices]) -> list[tuple[int, int, int, int]]:
    return [(each.first, each.end, each.images, each.turns) for each in found]


def test_large_activations_between_small_weights_are_sliced() -> None:
    wide = chain([16] * 5, 112, 8)  # 0.8 MB an image and value
    assert spans(choose_slices(wide, ["v4"], MACHINE, 1)) == [(0, 4, 1, 8)]
    assert choose_slices(chain([16] * 5, 112, 1), ["v4"], MACHINE, 1) == []
    assert choose_slices(chain([16] * 5, 14, 8), ["v4"], MACHINE, 1) == []


def test_layers_with_large_weights_stay_whole() -> None:
    """1024 channels of 14 pixels square: 6.4 MB of values, but 4.2 MB of weights a layer, which would be read again for
    each slice."""
    regions = [*chain([16] * 5, 112, 8), *(_renamed(each) for each in chain([1024] * 4, 14, 8))]
    assert spans(choose_slices(regions, ["u3"], MACHINE, 1)) == [(0, 4, 1, 8)]


def _renamed(region: Region) -> Region:
    """The region with values u0, u1, ... for v0, v1, ..."""
    names = {name: name.replace("v", "u") for name in region.types}
    op = dataclasses.replace(
        region.ops[0],
        inputs=tuple(names[name] for name in region.ops[0].inputs),
        outputs=tuple(names[name] for name in region.ops[0].outputs),
    )
    types = {names[name]: type_ for name, type_ in region.types.items()}
    return dataclasses.replace(
        region,
        name=f"{region.name}u",
        ops=(op,),
        inputs=tuple(names[name] for name in region.inputs),
        outputs=tuple(names[name] for name in region.outputs),
        types=types,
    )


def test_a_region_that_is_to_stay_whole_parts_a_run() -> None:
    wide = chain([16] * 9, 112, 8)
    assert [span[:2] for span in spans(choose_slices(wide, ["v8"], MACHINE, 1, frozenset({"r3"})))] == [(0, 3), (4, 8)]


def test_a_value_is_sliced_for_all_of_a_run_or_for_none() -> None:
    shapes = dict.fromkeys(("x", "a", "b", "c"), (N, N))
    kinds = [Op("Relu", ("x",), ("a",)), Op("Tanh", ("a",), ("b",)), Op("MatMul", ("b", "x"), ("c",))]
    regions = [
        dataclasses.replace(region_of(op, shapes={k: shapes[k] for k in (*op.inputs, *op.outputs)}), name=op.outputs[0])
        for op in kinds
    ]
    segments = slices._segments(regions, frozenset(), 0.0)
    assert [(first, len(batches)) for first, batches in segments] == [(0, 2), (2, 1)]


def test_calls_are_bounded() -> None:
    wide = chain([16] * 5, 28, 2048)
    (found,) = choose_slices(wide, ["v4"], MACHINE, 1)
    assert (found.end - found.first) * found.turns <= 1024
    assert found.turns > 1


# The schedule


def test_a_loop_keeps_what_is_inside_once() -> None:
    steps = [
        Step("before", ("in", "whole"), (False, True), 4),
        Step("first", ("whole/0", "inner"), (False, True), 4),
        Step("second", ("inner", "other"), (False, True), 4),
        Step("third", ("other", "made/0"), (False, True), 4),
        Step("after", ("made", "out"), (False, True), 4),
    ]
    sizes = {"whole": 4096, "made": 4096, "whole/0": 1024, "made/0": 1024, "inner": 1024, "other": 1024}
    aliases = {"whole/0": Alias("whole", 0, 1024), "made/0": Alias("made", 0, 1024)}
    plan = schedule(
        steps, inputs=["in"], outputs=["out"], constants=[], sizes=sizes, aliases=aliases, loops=[Loop(1, 4, 4)]
    )
    symbols = [each.step.symbol for each in plan.steps]
    assert symbols == ["before", *["first", "second", "third"] * 4, "after"]
    assert plan.arena_bytes == 2 * 4096 + 2 * 1024
    reads = [each.places[0].offset for each in plan.steps if each.step.symbol == "first"]
    assert [offset - reads[0] for offset in reads] == [0, 1024, 2048, 3072]
    assert len({each.places[1].offset for each in plan.steps if each.step.symbol == "first"}) == 1
    # The first step of a turn may go with the last one of the turn before: they share no memory.
    waits = [each.step.symbol for each in plan.steps if each.barrier]
    assert waits == ["first", *["second", "third"] * 4, "after"]


@pytest.mark.parametrize("loop", [Loop(0, 3, 2), Loop(1, 1, 2), Loop(0, 1, 0), Loop(0, 1, 5)])
def test_loops_that_do_not_fit_are_refused(loop: Loop) -> None:
    steps = [Step("a", ("in", "x/0"), (False, True)), Step("b", ("x", "out"), (False, True))]
    sizes, aliases = {"x": 128, "x/0": 32}, {"x/0": Alias("x", 0, 32)}
    with pytest.raises(ValueError, match="loop of|beyond"):
        schedule(steps, inputs=["in"], outputs=["out"], constants=[], sizes=sizes, aliases=aliases, loops=[loop])


# Whole programs


class Net:
    """A network whose values are named v0, v1, ... with random weights."""

    def __init__(self, images: int, channels: int, pixels: int) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {"x": (images, channels, pixels, pixels)}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(3)

    def constant(self, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def conv(self, x: str, before: int, after: int, kernel: int = 1, group: int = 1, stride: int = 1) -> str:
        weight = self.random.standard_normal((after, before // group, kernel, kernel)) / np.sqrt(before * kernel)
        name = self.constant(weight.astype(np.float32))
        pads = [kernel // 2] * 4
        return self.op("Conv", x, name, pads=pads, group=group, strides=[stride] * 2)

    def model(self, *outputs: str) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.shapes.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, results, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def residual(net: Net) -> tuple[str, ...]:
    """Convolutions, a residual sum, squeeze and excite, a split and a concatenation; classes behind."""
    x = net.op("Relu", net.conv("x", 3, 16, 3, stride=2))
    y = net.conv(net.op("Relu", net.conv(x, 16, 32)), 32, 32, 3, group=32)
    scale = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", y), 32, 32))
    y = net.conv(net.op("Mul", y, scale), 32, 16)
    x = net.op("Add", y, x)
    halves = [net.conv(x, 16, 8, 3), net.conv(x, 16, 16)]
    joined = net.op("Concat", *halves, axis=1)
    pooled = net.op("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2])
    flat = net.op("Flatten", net.op("GlobalAveragePool", pooled))
    weight = net.constant(net.random.standard_normal((24, 10)).astype(np.float32))
    return net.op("Softmax", net.op("MatMul", flat, weight), axis=1), joined


def odd_channels(net: Net) -> tuple[str, ...]:
    """Channels that fill no block, values read inside and outside of a run, a view and normalization between images'
    pixels."""
    x = net.conv("x", 3, 5, 3)
    y = net.op("Relu", net.conv(x, 5, 7, 3))
    rows = net.op("Reshape", y, net.constant(np.array([0, 7, -1], np.int64)))
    z = net.op("Softmax", rows, axis=2)
    back = net.op("Reshape", z, net.constant(np.array([0, 7, 20, 20], np.int64)))
    mixed = net.op("Add", net.conv(back, 7, 5), x)
    mean = net.op("ReduceMean", mixed, axes=[0], keepdims=1)  # needs all images
    return net.op("Sub", net.op("Tanh", mixed), mean), y


def square(net: Net) -> tuple[str, ...]:
    """Rows as the batch: a matrix that one operator reads row by row, and the next one as a whole."""
    rows = net.op("Reshape", "x", net.constant(np.array([4, -1], np.int64)))
    few = net.op("MatMul", rows, net.constant(net.random.standard_normal((1200, 4)).astype(np.float32) / 40))
    left = net.op("Softmax", net.op("Tanh", few), axis=1)
    product = net.op("MatMul", left, few)
    return net.op("MatMul", net.op("Softmax", product, axis=1), left), product


def force(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Slice whatever can be, so many images at a time."""

    def chosen(regions, outputs, machine, threads, whole=frozenset()):
        found = []
        for first, batches in slices._segments(regions, whole, 0.0):
            turns = batches[0].images // images
            found.append(Slices(first, first + len(batches), images, turns, tuple(batches), 0.0))
        return found

    monkeypatch.setattr(cpu_target, "choose_slices", chosen)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("images", "arch"), [(1, "native"), (2, "native"), (1, "sse2")])
@pytest.mark.parametrize("build", [residual, odd_channels, square])
def test_slices_give_what_the_whole_batch_gives(
    build: Callable[[Net], tuple[str, ...]], images: int, arch: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(4, 3, 20)
    model = net.model(*build(net))
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 3, 20, 20)).astype(np.float32)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = dict(zip((each.name for each in session.get_outputs()), session.run(None, feeds), strict=True))
    with nestc.compile(model, targets=[f"cpu:arch={arch}"], threads=threads) as executable:
        whole = executable.run(feeds)
        (partition,) = executable.bundle.partitions
        assert "sliced" not in partition.artifact.metadata
        arena = executable.stats()["arena_bytes"]
    force(monkeypatch, images)
    with nestc.compile(model, targets=[f"cpu:arch={arch}"], threads=threads) as executable:
        (partition,) = executable.bundle.partitions
        assert partition.artifact.metadata["sliced"][0]["turns"] == 4 // images
        assert executable.stats()["arena_bytes"] < arena or build is square
        for _ in range(3):
            found = executable.run(feeds)
            for name, want in wanted.items():
                np.testing.assert_allclose(found[name], whole[name], rtol=0, atol=1e-4, err_msg=name)
                np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-4, err_msg=name)


def test_the_text_of_a_sliced_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program calls, in order: a run of two convolutions and a pool, two images at a time; then the rest."""
    net = Net(4, 3, 20)
    x = net.op("MaxPool", net.conv(net.conv("x", 3, 8, 3), 8, 8), kernel_shape=[2, 2], strides=[2, 2])
    mean = net.op("ReduceMean", x, axes=[0], keepdims=1)
    model = net.model(net.op("Sub", x, mean))
    force(monkeypatch, 2)
    with nestc.compile(model, targets=["cpu:arch=avx2"], threads=1) as executable:
        metadata = executable.bundle.partitions[0].artifact.metadata
    nodes = [node.split(":")[0] for step in metadata["steps"] for node in step["origin"]]
    run = metadata["sliced"][0]
    assert (run["images"], run["turns"]) == (2, 2)
    assert [node for node in nodes if node in ("Conv", "MaxPool")] == ["Conv", "Conv", "MaxPool"] * 2
    assert nodes.index("ReduceMean") > 5


def test_a_run_with_kernels_that_want_other_layouts_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(4, 3, 20)
    model = net.model(net.conv(net.op("Relu", net.conv("x", 3, 8, 3)), 8, 8))
    force(monkeypatch, 1)
    asked: list[str] = []

    def misfit(action, machine):
        asked.append(action.region.name)
        return False

    monkeypatch.setattr(cpu_target, "fits", misfit)
    with nestc.compile(model, targets=["cpu"], threads=1) as executable:
        assert "sliced" not in executable.bundle.partitions[0].artifact.metadata
    assert len(asked) == 2


def test_a_slice_that_is_too_little_for_the_threads_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels would have fewer iterations than two for each thread."""
    from nestc.targets.cpu import assemble

    net = Net(4, 3, 20)
    model = net.model(net.conv(net.op("Relu", net.conv("x", 3, 8, 3)), 8, 8))
    force(monkeypatch, 1)
    monkeypatch.setattr(assemble, "SPREAD_SECONDS", 0.0)
    for iterations, sliced in ((0, True), (1000, False)):
        monkeypatch.setattr(assemble, "ITERATIONS", iterations)
        with nestc.compile(model, targets=["cpu"], threads=2) as executable:
            assert ("sliced" in executable.bundle.partitions[0].artifact.metadata) == sliced


def test_quantized_networks_go_in_slices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers come out the same, whole and in slices."""
    net = Net(4, 3, 20)

    def quantized(x: str, scale: float) -> str:
        operands = [net.constant(np.array(scale, np.float32)), net.constant(np.array(0, np.int8))]
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, *operands), *operands)

    def conv(x: str, before: int, after: int, kernel: int) -> str:
        weight = net.constant(net.random.integers(-127, 128, (after, before, kernel, kernel)).astype(np.int8))
        scales = [net.constant(np.full(after, 0.004, np.float32)), net.constant(np.zeros(after, np.int8))]
        real = net.op("DequantizeLinear", weight, *scales, axis=0)
        return net.op("Conv", x, real, pads=[kernel // 2] * 4)

    x = quantized("x", 0.03)
    for before, after, kernel in ((3, 4, 3), (4, 16, 1), (16, 4, 3)):
        x = quantized(net.op("Relu", conv(x, before, after, kernel)), 0.05)
    model = net.model(x)
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 3, 20, 20)).astype(np.float32)}
    found: list[np.ndarray] = []
    for images in (4, 1):
        if images == 1:
            force(monkeypatch, images)
        with nestc.compile(model, targets=["cpu"], threads=1) as executable:
            assert ("sliced" in executable.bundle.partitions[0].artifact.metadata) == (images == 1)
            found.append(executable.run(feeds)[x])
    np.testing.assert_array_equal(*found)
    assert found[0].std() > 0


def test_explain_says_what_is_sliced(nestc: Callable[..., Any], tmp_path: Path) -> None:
    """Chosen by the model: values of 0.8 MB an image on a machine with 8 MB of L3."""
    net = Net(8, 16, 112)
    x = "x"
    for _ in range(4):
        x = net.op("Relu", net.conv(x, 16, 16))
    onnx.save(net.model(x), tmp_path / "net.onnx")
    options = ("--threads", 1, "--target", "cpu:arch=avx2")
    assert nestc("compile", tmp_path / "net.onnx", "-o", tmp_path / "net.nest", *options).status == 0
    told = nestc("explain", tmp_path / "net.nest").out
    assert "slices of cpu_0: 4 regions from " in told and "one image at a time (modelled to save " in told
    ((run,),) = json.loads(nestc("explain", tmp_path / "net.nest", "--json").out)["sliced"].values()
    assert (run["regions"], run["images"], run["turns"]) == (4, 1, 8)
