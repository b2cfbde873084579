"""Resize and Upsample against ONNX Runtime and the node tests of the onnx package."""

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
from nestc.kernels.resize import RESIZE
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
    reason = RESIZE.refusal(region)
    assert reason is None, reason
    block = Layout(MACHINE.lanes("float32"))
    incoming = {n: block if blocked and len(region.types[n].shape) > 2 else PLAIN for n in region.inputs}
    layouts = RESIZE.layouts(region, MACHINE, incoming)
    return run_lowered(region, RESIZE.lower(region, MACHINE, layouts), feeds, MACHINE, layouts, jit)


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
        assert RESIZE.refusal(region_of([node], {**feeds, **expected}, list(expected)))
        return
    try:
        compare([node], feeds, blocked, constants, expected=expected, outputs=list(expected), tolerance=1e-4)
    except (AssertionError, Error) as error:
        pytest.fail(f"{case.name}: {error}")


@pytest.mark.parametrize("blocked", [False, True])
def test_node_cases(blocked):
    cases = node_cases("Resize", "Upsample")
    assert len(cases) > 30
    for case in cases:
        run_node_case(case, blocked, constants=[value.name for value in case.model.graph.input][1:])


def resize(scales=None, sizes=None, **attributes):
    inputs = ["x", "", "scales"] if scales is not None else ["x", "", "", "sizes"]
    feeds = {"scales": np.array(scales, np.float32)} if scales is not None else {"sizes": np.array(sizes)}
    return helper.make_node("Resize", inputs, ["y"], **attributes), feeds


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_images(data):
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]), "mode")
    transforms = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    attributes = {"mode": mode, "coordinate_transformation_mode": data.draw(st.sampled_from(transforms), "transform")}
    if mode == "nearest":
        roundings = ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]
        attributes["nearest_mode"] = data.draw(st.sampled_from(roundings), "rounding")
    if mode == "cubic":
        attributes["exclude_outside"] = data.draw(st.integers(0, 1), "exclude_outside")
    shape = (1, data.draw(st.integers(1, 11), "channels"), *(data.draw(st.integers(2, 9)) for _ in range(2)))
    out = [*shape[:2], *(data.draw(st.integers(2, 14)) for _ in range(2))]
    node, feeds = resize(sizes=out, **attributes)
    x = RANDOM.normal(size=shape).astype(np.float32)
    compare([node], {"x": x, **feeds}, data.draw(st.booleans(), "blocked"))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_interpreter_agrees(mode, blocked):
    node, feeds = resize(scales=[1, 1, 2, 1.5], mode=mode)
    x = RANDOM.normal(size=(1, 5, 3, 4)).astype(np.float32)
    nodes = [node, helper.make_node("Sigmoid", ["y"], ["z"])]
    compare(nodes, {"x": x, **feeds}, blocked, jit=(True, False))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("scales", [[1, 1, 3], [1, 1, 2, 2, 2], [1, 1, 2, 1], [1, 1, 1, 3]])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_ranks(mode, scales, blocked):
    node, feeds = resize(scales=scales, mode=mode)
    x = RANDOM.normal(size=(1, 9, *[4] * (len(scales) - 2))).astype(np.float32)
    compare([node], {"x": x, **feeds}, blocked)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float16"])
def test_copies_of_other_types(dtype):
    node, feeds = resize(scales=[1, 1, 2, 2], mode="nearest", coordinate_transformation_mode="asymmetric")
    x = RANDOM.integers(0, 100, (1, 9, 3, 4)).astype(dtype)
    wanted = x.repeat(2, axis=2).repeat(2, axis=3)
    for blocked in (False, True):
        compare([node], {"x": x, **feeds}, blocked, expected={"y": wanted})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_crop(mode):
    node = helper.make_node(
        "Resize",
        ["x", "roi", "", "sizes"],
        ["y"],
        mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=7.0,
    )
    roi = np.array([0, 0, 0.1, -0.2, 1, 1, 1.3, 0.9], np.float32)
    x = RANDOM.normal(size=(1, 3, 5, 7)).astype(np.float32)
    feeds = {"x": x, "roi": roi, "sizes": np.array([1, 3, 4, 6])}
    compare([node], feeds, blocked=True)


def test_refusals():
    node, feeds = resize(scales=[1, 1, 2, 2], mode="linear")
    x = np.zeros((1, 2, 3, 3), np.uint8)
    y = np.zeros((1, 2, 6, 6), np.uint8)
    assert "uint8" in (RESIZE.refusal(region_of([node], {"x": x, "y": y, **feeds}, ["y"])) or "")
