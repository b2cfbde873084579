"""Pooling against ONNX Runtime, the node tests of the onnx package, and numpy."""

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
from nestc.kernels.pool import POOL
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
    reason = POOL.refusal(region)
    assert reason is None, reason
    block = Layout(MACHINE.lanes("float32"))
    incoming = {n: block if blocked and len(region.types[n].shape) > 2 else PLAIN for n in region.inputs}
    layouts = POOL.layouts(region, MACHINE, incoming)
    return run_lowered(region, POOL.lower(region, MACHINE, layouts), feeds, MACHINE, layouts, jit)


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
        assert POOL.refusal(region_of([node], {**feeds, **expected}, list(expected)))
        return
    try:
        compare([node], feeds, blocked, constants, expected=expected, outputs=list(expected), tolerance=1e-4)
    except (AssertionError, Error) as error:
        pytest.fail(f"{case.name}: {error}")


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    kinds = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    cases = node_cases(*kinds)
    assert len(cases) > 40
    for case in cases:
        run_node_case(case, blocked)


def node_of(kind, kernel, strides, pads, extra):
    return helper.make_node(kind, ["x"], ["y"], kernel_shape=kernel, strides=strides, pads=pads, **extra)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_windows(data):
    rank = data.draw(st.integers(1, 3), "rank")
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank), "kernel")
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank), "strides")
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    kind = data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    dilations = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank), "dilations")
    extra = {"ceil_mode": data.draw(st.integers(0, 1)), "dilations": dilations}
    if kind == "AveragePool":
        # Without a tap inside, an average has no meaning.
        extra = {"count_include_pad": data.draw(st.integers(0, 1))}
    size = [data.draw(st.integers(k * 2, 12)) for k in kernel]
    channels = data.draw(st.integers(1, 19), "channels")
    x = RANDOM.normal(size=(data.draw(st.integers(1, 2)), channels, *size)).astype(np.float32)
    nodes = [node_of(kind, kernel, strides, pads, extra)]
    if data.draw(st.booleans(), "tail"):
        nodes.append(helper.make_node("Relu", ["y"], ["z"]))
    compare(nodes, {"x": x}, data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_interpreter_agrees(kind, blocked):
    x = RANDOM.normal(size=(1, 5, 6, 9)).astype(np.float32)
    compare([node_of(kind, [3, 3], [2, 1], [1, 1, 1, 1], {})], {"x": x}, blocked, jit=(True, False))


@pytest.mark.parametrize("blocked", [False, True])
def test_large_window_is_a_loop(blocked):
    x = RANDOM.normal(size=(1, 9, 16, 17)).astype(np.float32)
    compare([node_of("AveragePool", [13, 9], [1, 2], [3, 3, 3, 3], {})], {"x": x}, blocked)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", "float16"])
@pytest.mark.parametrize("blocked", [False, True])
def test_max_of_other_types(dtype, blocked):
    x = (RANDOM.normal(size=(1, 11, 9, 10)) * 50).astype(np.int8).astype(dtype)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    wanted = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max(axis=(4, 5))
    node = node_of("MaxPool", [3, 3], [2, 2], [1, 1, 1, 1], {})
    compare([node], {"x": x}, blocked, expected={"y": wanted.astype(dtype)})


@pytest.mark.parametrize("order", [0, 1])
def test_indices(order):
    x = RANDOM.integers(0, 4, (2, 3, 7, 8)).astype(np.float32)  # few values: ties go to the first
    node = helper.make_node(
        "MaxPool", ["x"], ["y", "i"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], storage_order=order
    )
    compare([node], {"x": x}, blocked=True)


@pytest.mark.parametrize("shape", [(2, 11, 7, 7), (1, 16, 5), (1, 3, 4, 5, 6), (1, 8, 1, 1)])
@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("blocked", [False, True])
def test_whole_image(kind, shape, blocked):
    x = RANDOM.normal(size=shape).astype(np.float32)
    nodes = [helper.make_node(kind, ["x"], ["y"]), helper.make_node("HardSwish", ["y"], ["z"])]
    compare(nodes, {"x": x}, blocked, jit=(True, False))


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reduction_over_space(kind, keep):
    node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=keep)
    x = RANDOM.normal(size=(2, 19, 6, 5)).astype(np.float32)
    compare([node], {"x": x, "axes": np.array([-1, 2])}, blocked=True)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp(p):
    x = RANDOM.normal(size=(1, 9, 6, 7)).astype(np.float32)
    wanted = (np.abs(x.astype(np.float64)) ** p).sum(axis=(2, 3), keepdims=True) ** (1 / p)
    node = helper.make_node("GlobalLpPool", ["x"], ["y"], p=p)
    compare([node], {"x": x}, blocked=True, expected={"y": wanted.astype(np.float32)})


def test_refusals():
    x = np.zeros((1, 2, 4, 4), np.float32)
    y = np.zeros((1, 2, 1, 1), np.float32)
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"])
    region = region_of([node], {"x": x, "axes": np.array([1]), "y": y}, ["y"])
    assert "spatial axes" in (POOL.refusal(region) or "")
    assert POOL.refusal(region_of([helper.make_node("Relu", ["x"], ["y"])], {"x": x, "y": x}, ["y"]))
