"""Recurrent operators against ONNX Runtime and the node tests of the onnx package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nestc.kernels.checking import FamilyCheck, by_onnxruntime, node_cases
from nestc.kernels.recurrent import RECURRENT
from nestc.kernels.testing import host_machine, region_of

MACHINE = host_machine()
RANDOM = np.random.default_rng(0)


CHECK = FamilyCheck(RECURRENT)
compute, compare = by_onnxruntime, CHECK.compare
lowered_values, run_node_case = CHECK.lowered_values, CHECK.run_node_case


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
