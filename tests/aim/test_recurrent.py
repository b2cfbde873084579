"""LSTM and GRU nodes on AiM: products in the banks, gates on the host, against the CPU target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from aim_nets import Net, on_cpu, products, relative_error
from onnx import TensorProto

import nestc
from nestc.targets.aim.offers import offers
from nestc.targets.aim.recurrent import read_region
from nestc.targets.aim.regions import Refused
from nestc.targets.aim.target import AimTarget

STEPS, BATCH, SIZE, HIDDEN = 5, 2, 24, 20


def node(net: Net, op: str, directions: int = 1, dtype: Any = np.float32, **attributes: Any) -> tuple[str, list[str]]:
    """A recurrent node with a bias and given initial states; its input states and outputs."""
    gates = {"LSTM": 4, "GRU": 3}[op] * HIDDEN
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    x = net.input((STEPS, BATCH, SIZE), kind)
    states = [net.input((directions, BATCH, HIDDEN), kind) for _ in range(2 if op == "LSTM" else 1)]
    inputs = [x, net.matrix(directions, gates, SIZE, dtype=dtype), net.matrix(directions, gates, HIDDEN, dtype=dtype)]
    inputs += [net.matrix(directions, 2 * gates, dtype=dtype), "", *states]
    name = net.node(op, *inputs, hidden_size=HIDDEN, **attributes)
    outputs = [name, f"{name}_h", *([f"{name}_c"] if op == "LSTM" else [])]
    del net.nodes[-1].output[:]
    net.nodes[-1].output.extend(outputs)
    return name, outputs


def values(model: nestc.Model, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    return {name: random.standard_normal(shape).astype(dtype) for name, (_, shape) in model.inputs.items()}


@pytest.mark.parametrize(
    ("op", "directions", "attributes"),
    [
        ("LSTM", 1, {}),
        ("LSTM", 1, {"direction": "reverse"}),
        ("LSTM", 2, {"direction": "bidirectional"}),
        ("GRU", 1, {"linear_before_reset": 1}),
        ("GRU", 2, {"linear_before_reset": 1, "direction": "bidirectional"}),
    ],
)
def test_a_node_equals_the_cpu(op: str, directions: int, attributes: dict[str, Any]) -> None:
    net = Net(1)
    _, outputs = node(net, op, directions, **attributes)
    model = net.float_model(*outputs)
    inputs = values(model)
    executable = nestc.compile(model, targets=["aim:round=true"])
    found, expected = executable.run(inputs), on_cpu(model, inputs)
    assert [part.device for part in executable.plan.partitions] == ["aim"]
    for name in outputs:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype
        # Operands, state and sums are rounded to 8 bits of significand.
        assert relative_error(found[name], expected[name]) < 0.012
    layers = executable.bundle.partitions[0].artifact.metadata["timing"]["layers"]
    # Inputs of both directions are one launch, states of every step one each.
    assert len(layers) == 1 + directions * STEPS and layers[0]["vectors"] == STEPS * BATCH
    # The matrices of all steps are in the banks once.
    assert executable.bundle.partitions[0].artifact.metadata["rows"] <= 2 * directions


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_states_that_are_not_given_are_zero(op: str) -> None:
    net = Net(3)
    gates = {"LSTM": 4, "GRU": 3}[op] * HIDDEN
    x = net.input((STEPS, 1, SIZE))
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    y = net.node(op, x, net.matrix(1, gates, SIZE), net.matrix(1, gates, HIDDEN), hidden_size=HIDDEN, **extra)
    model = net.float_model(y)
    inputs = values(model)
    executable = nestc.compile(model, targets=["aim:round=true"])
    assert relative_error(executable.run(inputs)[y], on_cpu(model, inputs)[y]) < 0.012


def test_a_node_in_float16_needs_no_rounding() -> None:
    net = Net(4)
    _, outputs = node(net, "LSTM", dtype=np.float16)
    model = net.float_model(*outputs, dtype=TensorProto.FLOAT16)
    inputs = values(model, np.float16)
    executable = nestc.compile(model, targets=["aim:number=float16"])
    assert [part.device for part in executable.plan.partitions] == ["aim"]
    found, expected = executable.run(inputs), on_cpu(model, inputs)
    for name in outputs:
        assert relative_error(found[name], expected[name]) < 3e-3


def reason(net: Net, *outputs: str, rounded: bool = True) -> str:
    (region,) = products(net.float_model(*outputs))
    _, offer, _ = offers(AimTarget().config, "bfloat16", None, rounded)
    with pytest.raises(Refused) as refused:
        read_region(region, "bfloat16" if rounded else None)
    assert offer.refusal(region) == str(refused.value)
    return str(refused.value)


def test_refusals_are_told_in_words() -> None:
    net = Net()
    assert "have operands rounded with aim:round=true" in reason(net, *node(net, "LSTM")[1], rounded=False)
    net = Net()
    assert "linear_before_reset=0" in reason(net, *node(net, "GRU")[1])
    net = Net()
    assert "a clip" in reason(net, *node(net, "LSTM", clip=1.0)[1])
    net = Net()
    assert "couples its gates" in reason(net, *node(net, "LSTM", input_forget=1)[1])
    net = Net()
    x = net.input((300, 1, SIZE))
    y = net.node("LSTM", x, net.matrix(1, 80, SIZE), net.matrix(1, 80, HIDDEN), hidden_size=HIDDEN)
    assert "has 300 steps of 1 sequences, each a product of its own; AiM takes 1 to 256" in reason(net, y)


def test_float32_products_may_be_rounded() -> None:
    net = Net()
    x = net.input((1, 72, 2, 2))
    h = net.node("Flatten", net.node("Relu", net.node("Conv", x, net.matrix(40, 72, 1, 1), net.matrix(40))))
    y = net.node("Add", net.node("MatMul", h, net.matrix(160, 24)), net.matrix(24))
    model = net.float_model(y)
    inputs = values(model)
    executable = nestc.compile(model, targets=["aim:round=true"])
    assert sum(part.device == "aim" for part in executable.plan.partitions) == 2
    error = relative_error(executable.run(inputs)[y], on_cpu(model, inputs)[y])
    assert 1e-4 < error < 0.01
