"""Which neighbouring regions are joined, on large and on small caches, and what a network computes then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import nestc
from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.families import alternatives
from nestc.kernels.testing import host_machine, op_of, type_of
from nestc.targets.cpu.pairs import merge_pairs
from nestc.targets.cpu.target import CpuTarget

HOST = host_machine()
SMALL = dataclasses.replace(HOST, l2_bytes=128 << 10, l3_bytes=0)
"""A machine whose maps go to memory and back."""


class Net:
    """Regions of given operators in order, of float32 values of given shapes; names of constants begin with w."""

    def __init__(self, **shapes: Sequence[int]) -> None:
        self.arrays = {name: np.zeros(tuple(shape), np.float32) for name, shape in shapes.items()}
        self.regions: list[Region] = []

    def region(self, name: str, *nodes: onnx.NodeProto) -> None:
        ops = tuple(map(op_of, nodes))
        made = {value for op in ops for value in op.outputs}
        read = dict.fromkeys(value for op in ops for value in op.inputs if value not in made)
        constants = {value: self.arrays[value].copy for value in read if value[0] == "w"}
        types = {value: type_of(self.arrays[value]) for value in (*read, *made)}
        inputs = tuple(value for value in read if value not in constants)
        self.regions.append(Region(name, ops[0].op_type, ops, inputs, ops[-1].outputs, types, constants))

    def merged(
        self, machine: CpuMachine, outputs: Sequence[str] = ("y",), threads: int = 1, exact: bool = False
    ) -> list[str]:
        """What is left, as text."""

        def way(region: Region) -> Family | None:
            return next(iter(alternatives(region, machine, exact)), None)

        found = merge_pairs(self.regions, outputs, machine, threads, exact, way)
        lines: list[str] = []
        for region in found.regions:
            ops = " ".join(op.op_type for op in region.ops)
            text = f"{region.name}: {' '.join(region.inputs)} -> {ops} -> {' '.join(region.outputs)}"
            if region.name in found.families:
                text += f" by {found.families[region.name].name}, with {found.firsts[region.name]}"
            lines.append(text)
        return lines


def inverted_residual(pixels: int = 56, channels: int = 32) -> Net:
    net = Net(
        x=(1, channels, pixels, pixels),
        d=(1, channels, pixels, pixels),
        e=(1, channels, pixels, pixels),
        p=(1, 16, pixels, pixels),
        r=(1, 16, pixels, pixels),
        y=(1, 16, pixels, pixels),
        w1=(channels, 1, 3, 3),
        w2=(16, channels, 1, 1),
    )
    conv = helper.make_node("Conv", ["x", "w1"], ["d"], name="depthwise", group=channels, pads=[1] * 4)
    net.region("r0", conv, helper.make_node("Relu", ["d"], ["e"]))
    net.region("r1", helper.make_node("Conv", ["e", "w2"], ["p"]), helper.make_node("Add", ["p", "r"], ["y"]))
    return net


def test_a_small_cache_joins_depthwise_and_pointwise() -> None:
    net = inverted_residual()
    joined = ["r1: x r -> Conv Relu Conv Add -> y by depthwise_pointwise, with r0"]
    apart = ["r0: x -> Conv Relu -> e", "r1: e r -> Conv Add -> y"]
    assert net.merged(SMALL) == net.merged(SMALL, exact=True) == joined
    assert net.merged(SMALL, threads=2) == joined
    # A large L3 hides that the map is written and read.
    assert net.merged(HOST) == apart
    # Somebody else reads what lies between the two.
    assert net.merged(SMALL, outputs=("y", "e")) == apart
    net.region("r2", helper.make_node("Relu", ["e"], ["d"]))
    assert net.merged(SMALL)[:2] == apart


def test_too_few_bands_for_the_threads_are_not_joined() -> None:
    assert len(inverted_residual(7, 512).merged(HOST, threads=4)) == 2
    # Tiny ones are, which spares the threads a meeting.
    assert len(inverted_residual(7, 32).merged(HOST, threads=4)) == 1


def squeeze_and_excite(pixels: int, outputs: int) -> Net:
    map_ = (1, 64, pixels, pixels)
    net = Net(x=map_, m=map_, s=(1, 64, 1, 1), y=(1, outputs, pixels, pixels), w=(outputs, 64, 1, 1))
    net.region("r0", helper.make_node("Mul", ["x", "s"], ["m"]))
    net.region("r1", helper.make_node("Conv", ["m", "w"], ["y"]))
    return net


def test_scales_go_into_weights_where_there_are_more_pixels_than_outputs() -> None:
    assert squeeze_and_excite(28, 24).merged(HOST) == ["r1: x s -> Mul Conv -> y by scaled_weights, with r0"]
    assert squeeze_and_excite(4, 24).merged(HOST) == ["r0: x s -> Mul -> m", "r1: m -> Conv -> y"]
    # That rounds in another order.
    assert len(squeeze_and_excite(28, 24).merged(HOST, exact=True)) == 2
    exact = squeeze_and_excite(56, 24).merged(SMALL, exact=True)
    assert exact == ["r1: x s -> Mul Conv -> y by elementwise_pointwise, with r0"]


def stem(kernel: int, channels: int) -> Net:
    net = Net(x=(1, channels, 64, 64), c=(1, 32, 64, 64), y=(1, 32, 32, 32), w=(32, channels, kernel, kernel))
    net.region("r0", helper.make_node("Conv", ["x", "w"], ["c"], pads=[kernel // 2] * 4))
    pool = helper.make_node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    net.region("r1", pool)
    return net


def test_pools_join_convolutions() -> None:
    assert stem(3, 3).merged(HOST) == ["r1: x -> Conv MaxPool -> y by conv_pool, with r0"]
    (found,) = stem(3, 64).merged(HOST)
    assert found.startswith("r1: x -> Conv MaxPool -> y by winograd") and found.endswith("_pool, with r0")
    assert len(stem(3, 64).merged(HOST, exact=True)) == 2  # direct, with weights that leave L1


def network(batch: int = 1) -> onnx.ModelProto:
    """A stem with a pool, an inverted residual with squeeze-and-excite, one without, and a pool again."""
    random = np.random.default_rng(5)
    constants: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        scale = 2 / np.sqrt(np.prod(shape[1:]))
        constants.append(numpy_helper.from_array((random.standard_normal(shape) * scale).astype(np.float32), name))
        return name

    def conv(source: str, target: str, *shape: int, **attributes: Any) -> onnx.NodeProto:
        inputs = [source, weight(f"w_{target}", *shape), weight(f"b_{target}", shape[0])]
        return helper.make_node("Conv", inputs, [target], name=target, **attributes)

    def relu(source: str) -> onnx.NodeProto:
        return helper.make_node("Relu", [source], [f"{source}.relu"], name=f"{source}.relu")

    nodes = [
        conv("x", "stem", 16, 3, 3, 3, strides=[2, 2], pads=[1] * 4),
        relu("stem"),
        helper.make_node("MaxPool", ["stem.relu"], ["pool"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        conv("pool", "d1", 16, 1, 3, 3, group=16, pads=[1] * 4),
        relu("d1"),
        helper.make_node("GlobalAveragePool", ["d1.relu"], ["g"]),
        conv("g", "squeeze", 4, 16, 1, 1),
        relu("squeeze"),
        conv("squeeze.relu", "excite", 16, 4, 1, 1),
        helper.make_node("Sigmoid", ["excite"], ["scales"]),
        helper.make_node("Mul", ["d1.relu", "scales"], ["scaled"], name="scaled"),
        conv("scaled", "p1", 16, 16, 1, 1),
        conv("p1", "d2", 16, 1, 3, 3, group=16, pads=[1] * 4),
        relu("d2"),
        conv("d2.relu", "p2", 16, 16, 1, 1),
        helper.make_node("Add", ["p2", "p1"], ["residual"], name="residual"),
        conv("residual", "last", 16, 16, 3, 3, pads=[1] * 4),
        relu("last"),
        helper.make_node("AveragePool", ["last.relu"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (batch, 3, 224, 200))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (batch, 16, 28, 25))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("batch", "threads", "exact", "scaling"),
    [
        (1, 1, False, "scaled_weights"),
        (1, 2, False, "elementwise_pointwise"),  # threads meet once less
        (2, 2, True, "elementwise_pointwise"),
    ],
)
def test_a_network_on_a_small_cache(batch: int, threads: int, exact: bool, scaling: str) -> None:
    model = network(batch)
    x = np.random.default_rng(1).standard_normal((batch, 3, 224, 200)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    target = CpuTarget(threads=threads, exact=exact)
    target.cpu = dataclasses.replace(target.cpu, l2_bytes=128 << 10, l3_bytes=0)
    executable = nestc.compile(model, targets=[target], threads=threads)
    (found,) = executable.run({"x": x}).values()
    (partition,) = executable.bundle.partitions
    ways: dict[str, str] = partition.artifact.metadata["ways"]
    expected = np.asarray(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Both regions of a pair are said to be computed the same way; the second pool follows Winograd's tiles if allowed.
    wanted = {"depthwise_pointwise": 2, scaling: 2, "conv_pool": 4 if exact else 2}
    assert {way: list(ways.values()).count(way) for way in wanted} == wanted
    assert sum(way.startswith("winograd") and way.endswith("_pool") for way in ways.values()) == (0 if exact else 2)


def test_explain_says_what_was_fused(nestc: Callable[..., Any], tmp_path: Any) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    assert nestc("compile", tmp_path / "net.onnx", "-o", tmp_path / "net.nest", "--threads", 1).status == 0
    assert "scaled_weights" in nestc("explain", tmp_path / "net.nest", "--json").out
