"""Transposed convolution against ONNX Runtime and the node tests of the onnx package."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.errors import Error
from nestc.kernels.api import PLAIN, Layout
from nestc.kernels.conv_transpose import CONV_TRANSPOSE
from nestc.kernels.testing import host_machine, region_of, run_lowered

MACHINE = host_machine()
RANDOM = np.random.default_rng(0)


def compute(nodes, feeds, opset=22):
    """Every value of a chain of nodes by ONNX Runtime."""
    made = [name for node in nodes for name in node.output if name]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(made, session.run(made, feeds)))


def lowered_values(nodes, feeds, expected, outputs, blocked, constants=(), jit=True):
    """The outputs by our kernels; `expected` gives the types of all made values."""
    region = region_of(nodes, {**feeds, **expected}, outputs, constants)
    reason = CONV_TRANSPOSE.refusal(region)
    assert reason is None, reason
    block = Layout(MACHINE.lanes("float32"))
    incoming = {n: block if blocked and len(region.types[n].shape) > 2 else PLAIN for n in region.inputs}
    layouts = CONV_TRANSPOSE.layouts(region, MACHINE, incoming)
    return run_lowered(region, CONV_TRANSPOSE.lower(region, MACHINE, layouts), feeds, MACHINE, layouts, jit)


def compare(nodes, feeds, blocked=False, constants=(), jit=(True,), outputs=None, expected=None, tolerance=2e-5):
    """Our outputs equal those of ONNX Runtime (or `expected`) within the tolerance of the output's scale."""
    expected = compute(nodes, feeds) if expected is None else expected
    outputs = [n for n in nodes[-1].output if n] if outputs is None else outputs
    for way in jit:
        found = lowered_values(nodes, feeds, expected, outputs, blocked, constants, way)
        for name in outputs:
            wanted, got = expected[name], found[name]
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            if wanted.dtype.kind in "iub":
                np.testing.assert_array_equal(got, wanted)
            else:
                scale = float(np.max(np.abs(wanted))) if wanted.size else 1.0
                wide = np.float64
                np.testing.assert_allclose(
                    got.astype(wide), wanted.astype(wide), rtol=tolerance, atol=tolerance * scale
                )


@cache
def node_cases(*operators):
    """The single-node tests of the onnx package for some operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    return [case for case in cases if [node.op_type for node in case.model.graph.node] in [[op] for op in operators]]


def run_node_case(case, blocked, refused=(), constants=()):
    """One test of the onnx package; those in `refused` must be refused."""
    graph = case.model.graph
    (inputs, outputs), (node,) = case.data_sets[0], graph.node
    feeds = {value.name: np.asarray(array) for value, array in zip(graph.input, inputs, strict=True)}
    expected = {value.name: np.asarray(array) for value, array in zip(graph.output, outputs, strict=True)}
    if case.name in refused:
        assert CONV_TRANSPOSE.refusal(region_of([node], {**feeds, **expected}, list(expected)))
        return
    try:
        compare([node], feeds, blocked, constants, expected=expected, outputs=list(expected), tolerance=1e-4)
    except (AssertionError, Error) as error:
        pytest.fail(f"{case.name}: {error}")


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    cases = node_cases("ConvTranspose")
    assert len(cases) > 9
    for case in cases:
        run_node_case(case, blocked, ("test_convtranspose_group_2", "test_convtranspose_group_2_image_3"))


def case(data_shape, weight_shape, tail=False, **attributes):
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)
    shapes = {"x": data_shape, "w": weight_shape, "b": (weight_shape[1] * attributes.get("group", 1),)}
    feeds = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return [node, helper.make_node("Relu", ["y"], ["z"])] if tail else [node], feeds


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_shapes(data):
    rank = data.draw(st.integers(1, 3), "rank")
    kernel = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [data.draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    size = [data.draw(st.integers(3, 7)) for _ in range(rank)]
    extra = [data.draw(st.integers(0, max(0, s - 1))) for s in strides]
    channels, features = data.draw(st.integers(1, 19), "channels"), data.draw(st.integers(1, 19), "features")
    nodes, feeds = case(
        (data.draw(st.integers(1, 2)), channels, *size),
        (channels, features, *kernel),
        data.draw(st.booleans(), "tail"),
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=extra,
    )
    if any(n < 1 for n in compute(nodes, feeds)["y"].shape):
        return
    constants = ["w", "b"] if data.draw(st.booleans(), "constant") else []
    compare(nodes, feeds, data.draw(st.booleans(), "blocked"), constants)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(("kernel", "pad"), [(2, 0), (3, 1), (4, 1)])
def test_interpreter_agrees(kernel, pad, blocked):
    nodes, feeds = case((1, 5, 3, 4), (5, 6, kernel, kernel), strides=[2, 2], pads=[pad] * 4)
    compare(nodes, feeds, blocked, ["w", "b"], jit=(True, False))


@pytest.mark.parametrize("constants", [[], ["w", "b"]])
def test_groups(constants):
    nodes, feeds = case((2, 32, 4, 5), (32, 16, 3, 3), strides=[2, 2], group=2)
    compare(nodes, feeds, True, constants)


@pytest.mark.parametrize("extra", [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"output_shape": [11, 8]}])
def test_output_shapes(extra):
    nodes, feeds = case((1, 9, 5, 4), (9, 10, 3, 3), strides=[2, 2], **extra)
    compare(nodes, feeds, True, ["w", "b"])


@pytest.mark.parametrize("features", [1, 3])
def test_few_output_channels(features):
    nodes, feeds = case((2, 24, 5, 6), (24, features, 3, 4), True, strides=[2, 2], pads=[1, 0, 0, 1])
    compare(nodes, feeds, True, ["w", "b"], jit=(True, False))


def test_row_without_border():
    nodes, feeds = case((1, 16, 4, 10), (16, 8, 2, 2), strides=[2, 2])
    compare(nodes, feeds, True, ["w", "b"])


def test_many_phases():
    nodes, feeds = case((1, 8, 4, 5), (8, 9, 16, 16), strides=[8, 8], pads=[4] * 4)
    compare(nodes, feeds, True, ["w", "b"])


def test_refuses_other_types():
    nodes, feeds = case((1, 8, 4, 5), (8, 9, 2, 2))
    wide = {name: array.astype(np.float64) for name, array in (feeds | compute(nodes, feeds)).items()}
    assert "float64" in (CONV_TRANSPOSE.refusal(region_of(nodes, wide, ["y"])) or "")
