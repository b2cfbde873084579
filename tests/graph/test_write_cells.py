"""LSTM and GRU written out step by step give what the operators give."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import feeds, parse, run

import nestc
from nestc.graph.infer_shapes import InferShapes
from nestc.graph.passes.write_cells import WriteCells

STEPS, BATCH, INPUTS, HIDDEN = 3, 2, 5, 4


def _model(op: str, attributes: str, outputs: str, *, states: bool, bias: bool, directions: int = 1) -> nestc.Model:
    random = np.random.default_rng(1)
    gates = 4 if op == "LSTM" else 3
    sizes: dict[str, tuple[int, ...]] = {
        "w": (directions, gates * HIDDEN, INPUTS),
        "r": (directions, gates * HIDDEN, HIDDEN),
    }
    if bias:
        sizes["b"] = (directions, 2 * gates * HIDDEN)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    start = f"{directions},{BATCH},{HIDDEN}"
    inputs = f"float[{STEPS},{BATCH},{INPUTS}] x" + (f", float[{start}] h0, float[{start}] c0" if states else "")
    if op == "GRU":
        inputs = inputs.replace(f", float[{start}] c0", "")
    given = ", ".join(["x", "w", "r", "b" if bias else ""] + (["", "h0", *(["c0"] if op == "LSTM" else [])] * states))
    shapes = {"y": f"{STEPS},{start.replace(f',{BATCH},{HIDDEN}', '')},{BATCH},{HIDDEN}", "yh": start, "yc": start}
    typed = ", ".join(f"float[{shapes[name]}] {name}" for name in outputs.replace(" ", "").split(",") if name)
    node = f"{outputs} = {op} <hidden_size = {HIDDEN}{attributes}> ({given.rstrip(', ')})"
    return parse(f"g ({inputs}) => ({typed}) {{ {node} }}", **weights)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "attributes", "outputs", "directions"),
    [
        ("LSTM", "", "y, yh, yc", 1),
        ("LSTM", ', direction = "reverse"', "y, yh, yc", 1),
        ("LSTM", ', direction = "bidirectional"', "y, yh, yc", 2),
        ("LSTM", "", ", yh", 1),
        ("GRU", "", "y, yh", 1),
        ("GRU", ", linear_before_reset = 1", "y, yh", 1),
        ("GRU", ', linear_before_reset = 1, direction = "bidirectional"', "y", 2),
        ("GRU", ', direction = "reverse"', ", yh", 1),
    ],
)
def test_same_results(op: str, attributes: str, outputs: str, directions: int, bias: bool, states: bool) -> None:
    model = _model(op, attributes, outputs, states=states, bias=bias, directions=directions)
    inputs = feeds(model)
    expected = run(model, inputs)
    written = model.clone()
    assert WriteCells()(written.ir).modified
    InferShapes()(written.ir)
    assert op not in {node.op_type for node in written.ir.graph}
    for found, wanted in zip(run(written, inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "attributes", [", clip = 3.0", ", input_forget = 1", ', activations = ["Relu", "Tanh", "Tanh"]']
)
def test_left_alone(attributes: str) -> None:
    model = _model("LSTM", attributes, "y", states=False, bias=True)
    assert not WriteCells()(model.clone().ir).modified


def test_bfloat16_takes_in_the_products() -> None:
    """The scheme bf16 rounds the operands of written-out products; the result is near the float model's."""
    model = _model("LSTM", "", "y", states=False, bias=True)
    narrow = nestc.quantize(model, None, scheme="bf16")
    kinds = [node.op_type for node in narrow.ir.graph]
    assert "LSTM" not in kinds and kinds.count("Gemm") == 2 * STEPS
    inputs = feeds(model)
    found = nestc.compile(narrow, targets=["cpu"], threads=1).run(inputs)
    np.testing.assert_allclose(next(iter(found.values())), run(model, inputs)[0], atol=0.02)
