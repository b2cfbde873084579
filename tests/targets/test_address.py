"""Parts of concatenations and pieces of splits are addresses: which kernels remain, and that the values stay right."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import nestc
from nestc.targets.cpu.machine import machine

B = machine("native").lanes("float32")
"""Channels of a block."""


class Net:
    """A model of images of one size, with normally distributed weights."""

    def __init__(self, channels: dict[str, int], pixels: int = 6, batch: int = 1) -> None:
        self.channels = dict(channels)
        self.inputs = tuple(channels)
        self.pixels, self.batch = pixels, batch
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(len(channels))

    def add(self, op: str, inputs: list[str], channels: list[int], **attributes: object) -> list[str]:
        names = [f"v{len(self.channels) + place}" for place in range(len(channels))]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        self.channels.update(zip(names, channels, strict=True))
        return names

    def constant(self, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, channels: int, kernel: int = 1) -> str:
        shape = (channels, self.channels[x], kernel, kernel)
        weight = self.constant((self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))
        return self.add("Conv", [x, weight], [channels], pads=[kernel // 2] * 4)[0]

    def concat(self, *parts: str) -> str:
        return self.add("Concat", list(parts), [sum(self.channels[part] for part in parts)], axis=1)[0]

    def split(self, x: str, *channels: int) -> list[str]:
        return self.add("Split", [x, self.constant(np.array(channels, np.int64))], list(channels), axis=1)

    def slice(self, x: str, start: int, end: int) -> str:
        operands = [self.constant(np.array([n], np.int64)) for n in (start, end, 1)]
        return self.add("Slice", [x, *operands], [end - start])[0]

    def model(self, *outputs: str) -> onnx.ModelProto:
        def info(name: str) -> onnx.ValueInfoProto:
            shape = (self.batch, self.channels[name], self.pixels, self.pixels)
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes, "net", [info(name) for name in self.inputs], [info(name) for name in outputs], self.weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def moves(executable: nestc.Executable) -> list[str]:
    """What the kernels do that only move data, by the operators they compute and how often."""
    found: list[str] = []
    for partition in executable.bundle.partitions:
        for step in partition.artifact.metadata["steps"]:
            kinds = {node.split(":")[0] for node in step["origin"]}
            if kinds <= {"Concat", "Split", "Slice", "Pad", "Transpose", "Identity", "Reshape"}:
                found.append(
                    "_".join(step["symbol"].split("_")[:3]) if "Identity" in kinds else "+".join(sorted(kinds))
                )
    return found


def check(model: onnx.ModelProto, threads: int = 1) -> list[str]:
    """Compare with ONNX Runtime; the moves that are left."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(5)
    feeds = {x.name: random.standard_normal(x.shape).astype(np.float32) for x in session.get_inputs()}
    with nestc.compile(model, targets=["cpu"], threads=threads) as executable:
        for _ in range(2):
            found = executable.run(feeds)
        for info, want in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(found[info.name], want, rtol=0, atol=1e-4, err_msg=info.name)
        return moves(executable)


def test_parts_of_a_concat_are_written_where_the_whole_lies() -> None:
    net = Net({"x": B})
    a, b, c = (net.conv("x", channels) for channels in (2 * B, B, B + 3))
    assert check(net.model(net.conv(net.concat(a, b, c), B))) == [f"layout_{B}_0"]


def test_padding_may_only_come_last() -> None:
    net = Net({"x": B})
    y = net.concat(net.conv("x", 3), net.conv("x", B))
    # So this one is plain: one kernel gathers it from blocks.
    assert check(net.model(net.conv(y, B))) == ["Concat", f"layout_{B}_0"]


def test_a_concat_of_concats_and_a_part_with_other_readers() -> None:
    net = Net({"x": B})
    a, b, c = (net.conv("x", B) for _ in range(3))
    inner = net.concat(a, b)
    left = net.conv(inner, B)
    right = net.conv(net.concat(inner, c, left), B, 3)
    total = net.add("Add", [right, a], [B])[0]
    assert check(net.model(net.conv(total, B))) == [f"layout_{B}_0"]


def test_a_part_used_twice_is_copied_once() -> None:
    net = Net({"x": B})
    a, b = net.conv("x", B), net.conv("x", B)
    y = net.concat(net.conv(net.concat(a, b, a), B), net.conv(net.concat(b, b), B), a)
    assert check(net.model(net.conv(y, B))) == ["layout_0_0"] * 4 + [f"layout_{B}_0"]


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_and_outputs_as_parts(batch: int) -> None:
    net = Net({"x": B, "y": B}, batch=batch)
    a, b = net.conv("x", B), net.conv("x", B)
    left, right = net.split("y", B // 2, B - B // 2)
    whole = net.concat("x", a, b, left)
    check(net.model(whole, net.conv(net.concat(a, "y"), B), right, b), 2)


def test_plain_parts_lie_in_the_output() -> None:
    net = Net({"x": 5, "y": 4})
    a = net.add("Sigmoid", ["x"], [5])[0]
    b = net.add("Softmax", ["y"], [4], axis=3)[0]
    assert check(net.model(net.concat(a, b))) == []


def test_pieces_are_read_where_they_lie() -> None:
    net = Net({"x": B})
    left, right = net.split(net.conv("x", 3 * B + 2), B, 2 * B + 2)
    piece = net.slice(right, B, 2 * B + 2)
    y = net.add("Add", [net.conv(left, B), net.conv(piece, B)], [B])[0]
    # The right piece covers the tail of what is split, with its padding.
    assert check(net.model(net.conv(y, B))) == [f"layout_{B}_0"]


def test_pieces_that_are_joined_again_are_not_copied() -> None:
    net = Net({"x": B})
    left, right = net.split(net.conv("x", 2 * B), B, B)
    y = net.concat(left, right, net.conv(right, B, 3))
    assert check(net.model(net.conv(y, B))) == [f"layout_{B}_0"]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_branches_as_onnxruntime(data: st.DataObject) -> None:
    net = Net({"x": B, "y": data.draw(st.integers(1, 2 * B))}, data.draw(st.integers(2, 5)))
    widths = st.sampled_from([B, B, 2 * B, 3, B + 3])

    def any_value() -> str:
        return data.draw(st.sampled_from(list(net.channels)))

    for _ in range(data.draw(st.integers(4, 10))):
        kind = data.draw(st.sampled_from(["conv", "conv", "concat", "concat", "split", "slice", "relu", "pool"]))
        x = any_value()
        size = net.channels[x]
        if kind == "conv":
            net.conv(x, data.draw(widths), data.draw(st.sampled_from([1, 3])))
        elif kind == "concat":
            net.concat(x, *(any_value() for _ in range(data.draw(st.integers(1, 3)))))
        elif kind == "split" and size > 1:
            first = data.draw(st.integers(1, size - 1))
            first = first // B * B or first
            net.split(x, first, size - first)
        elif kind == "slice":
            start = data.draw(st.integers(0, size - 1))
            net.slice(x, start // B * B, data.draw(st.integers(start + 1, size)))
        elif kind == "relu":
            net.add("Relu", [x], [size])
        elif kind == "pool":
            net.add("MaxPool", [x], [size], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    made = [name for name in net.channels if name not in net.inputs]
    outputs = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    check(net.model(*outputs), data.draw(st.sampled_from([1, 2])))


def shuffled(net: Net, x: str, groups: int) -> str:
    shape = [net.batch, groups, net.channels[x] // groups, net.pixels, net.pixels]
    split = net.add("Reshape", [x, net.constant(np.array(shape, np.int64))], [0])[0]
    turned = net.add("Transpose", [split], [0], perm=[0, 2, 1, 3, 4])[0]
    whole = net.constant(np.array([net.batch, net.channels[x], net.pixels, net.pixels], np.int64))
    return net.add("Reshape", [turned, whole], [net.channels[x]])[0]


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    half=st.sampled_from([B, B + 4, 3 * B - 2, 5]),
    groups=st.sampled_from([2, 2, 4]),
    first=st.integers(1, 9),
    batch=st.sampled_from([1, 2]),
    threads=st.sampled_from([1, 2]),
)
def test_a_shuffle_of_channels_is_one_kernel(half: int, groups: int, first: int, batch: int, threads: int) -> None:
    net = Net({"x": B}, 5, batch)
    whole = shuffled(net, net.concat(net.conv("x", half), net.conv("x", groups * B - half % groups)), groups)
    left, right = net.split(whole, first, net.channels[whole] - first)
    y = net.conv(shuffled(net, net.conv(net.concat(net.conv(left, B), right), 2 * B), 2), B)
    kinds = check(net.model(y, net.conv(right, B)), threads)
    assert "Concat+Reshape+Split+Transpose" in kinds and "Reshape+Transpose" in kinds
    assert "Transpose" not in kinds


def test_a_shuffle_that_others_read_within_stays_apart() -> None:
    net = Net({"x": B})
    whole = net.concat(net.conv("x", B), net.conv("x", B))
    y = net.conv(shuffled(net, whole, 2), B)
    assert "Transpose" in check(net.model(net.conv(y, B), net.conv(whole, B))) or B == 1
