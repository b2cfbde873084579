"""Recurrent operators against ONNX Runtime and the node tests of the onnx package."""

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
from nestc.kernels.recurrent import RECURRENT
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
    reason = RECURRENT.refusal(region)
    assert reason is None, reason
    block = Layout(MACHINE.lanes("float32"))
    incoming = {n: block if blocked and len(region.types[n].shape) > 2 else PLAIN for n in region.inputs}
    layouts = RECURRENT.layouts(region, MACHINE, incoming)
    return run_lowered(region, RECURRENT.lower(region, MACHINE, layouts), feeds, MACHINE, layouts, jit)


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
        assert RECURRENT.refusal(region_of([node], {**feeds, **expected}, list(expected)))
        return
    try:
        compare([node], feeds, blocked, constants, expected=expected, outputs=list(expected), tolerance=1e-4)
    except (AssertionError, Error) as error:
        pytest.fail(f"{case.name}: {error}")


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def test_node_cases():
    cases = node_cases("LSTM", "GRU", "RNN")
    assert len(cases) > 12
    for case in cases:
        run_node_case(case, False)


def network(kind, steps, batch, inputs, hidden, direction="forward", optional="b", dtype="float32", **attributes):
    """A node and its inputs; `optional` has a letter for each optional input given (b, l, h, c, p)."""
    gates, directions = GATES[kind], 2 if direction == "bidirectional" else 1
    shapes = {
        "x": (steps, batch, inputs),
        "w": (directions, gates * hidden, inputs),
        "r": (directions, gates * hidden, hidden),
        "b": (directions, 2 * gates * hidden),
        "h": (directions, batch, hidden),
        "c": (directions, batch, hidden),
        "p": (directions, 3 * hidden),
    }
    order = "xwrblhcp" if kind == "LSTM" else "xwrblh"
    names = [n if n in "xwr" or n in optional else "" for n in order]
    feeds = {n: (RANDOM.normal(size=shapes[n]) * 0.5).astype(dtype) for n in names if n and n != "l"}
    if "l" in names:
        feeds["l"] = RANDOM.integers(1, steps + 1, batch).astype(np.int32)
    outs = ["y", "yh", "yc"][: 3 if kind == "LSTM" else 2]
    return helper.make_node(kind, names, outs, hidden_size=hidden, direction=direction, **attributes), feeds


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_networks(data):
    kind = data.draw(st.sampled_from(["LSTM", "GRU", "RNN"]), "kind")
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]), "direction")
    letters = data.draw(st.sets(st.sampled_from("blhcp")), "optional")
    attributes = {}
    if data.draw(st.booleans(), "clip"):
        attributes["clip"] = 0.4
    if kind == "GRU":
        attributes["linear_before_reset"] = data.draw(st.integers(0, 1), "linear_before_reset")
    sizes = [data.draw(st.integers(1, n)) for n in (5, 6, 9, 20)]
    node, feeds = network(kind, *sizes, direction, letters, **attributes)
    constants = [n for n in "wrbp" if n in feeds] if data.draw(st.booleans(), "constant") else []
    wanted = [n for n in node.output if data.draw(st.booleans(), n)] or [node.output[0]]
    compare([node], feeds, constants=constants, outputs=wanted)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_interpreter_agrees(kind):
    node, feeds = network(kind, 2, 1, 3, 9, "bidirectional", "bh")
    compare([node], feeds, jit=(True, False))


@pytest.mark.parametrize(
    ("activations", "alpha", "beta"),
    [
        (["HardSigmoid", "ScaledTanh", "Softsign"], [0.3, 0.7], [0.4, 1.2]),
        (["Relu", "Affine", "LeakyRelu"], [0.5, 0.1], [0.1]),
        (["Sigmoid", "ThresholdedRelu", "Elu"], [0.2, 0.6], []),
        (["Sigmoid", "Softplus", "Tanh"], [], []),
    ],
)
def test_activations(activations, alpha, beta):
    extra = {"activation_alpha": alpha} if alpha else {}
    extra |= {"activation_beta": beta} if beta else {}
    node, feeds = network("LSTM", 4, 2, 5, 9, activations=activations, **extra)
    compare([node], feeds, constants=["w", "r", "b"])


def test_input_forget():
    node, feeds = network("LSTM", 4, 2, 5, 9, optional="bc", input_forget=1)
    compare([node], feeds, constants=["w", "r", "b"])


@pytest.mark.parametrize("hidden", [64, 128])
def test_one_long_sequence(hidden):
    node, feeds = network("LSTM", 20, 1, 40, hidden, "bidirectional")
    feeds = {n: a * np.float32(0.2) for n, a in feeds.items()}
    compare([node], feeds, constants=["w", "r", "b"], outputs=["y"])


def test_tail_on_the_sequence():
    node, feeds = network("GRU", 3, 2, 5, 9)
    compare([node, helper.make_node("Relu", ["y"], ["z"])], feeds, outputs=["z"])


def test_double_precision():
    node, feeds = network("GRU", 3, 2, 5, 9, dtype="float64", linear_before_reset=1)
    single = {name: a.astype(np.float32) for name, a in feeds.items()}
    expected = {name: a.astype(np.float64) for name, a in compute([node], single).items()}
    compare([node], feeds, expected=expected)


def test_refusal_of_an_unknown_activation():
    node, feeds = network("RNN", 2, 1, 3, 4)
    expected = compute([node], feeds)
    node.attribute.append(helper.make_attribute("activations", ["Swish"]))
    region = region_of([node], {**feeds, **expected}, ["y"])
    assert "Swish" in (RECURRENT.refusal(region) or "")
