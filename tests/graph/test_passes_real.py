"""The pipeline, pass by pass, on networks as exporters write them: ONNX Runtime computes the same after each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_nets import NETS
from graph_support import assert_same, feeds, run

from nestc.graph import pipeline
from nestc.graph.model import Model
from nestc.graph.quiet import quiet
from nestc.importers.onnx import load

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def light(name: str) -> Model:
    """A real graph of the onnx package (opset 9), whose repeated weights are replaced by random ones."""
    proto = onnx.load(LIGHT / f"light_{name}.onnx")
    random = np.random.default_rng(3)
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    variances = {node.input[4] for node in proto.graph.node if node.op_type == "BatchNormalization"}
    kept: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = tuple(int(size) for size in shapes[node.input[0]])
        values = random.standard_normal(shape) * np.sqrt(2 / max(1, int(np.prod(shape[1:]))))
        values = random.uniform(0.5, 2, shape) if node.output[0] in variances else values
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return load(proto)


def network(name: str) -> Model:
    return light(name) if name not in NETS else load(NETS[name](), dims={"N": 2} if name == "resnet" else None)


@pytest.mark.parametrize("name", [*NETS, "squeezenet", "shufflenet"])
def test_every_pass_keeps_the_results(name: str) -> None:
    model = network(name)
    inputs = feeds(model)
    expected = run(model, inputs)
    optimized = model.clone()
    for step in pipeline.passes(optimized.notes):
        with quiet("onnxscript", "onnx_ir"):
            modified = step(optimized.ir).modified
        if modified:
            assert_same(expected, run(optimized, inputs))
    assert list(optimized.inputs) == list(model.inputs)
    assert list(optimized.outputs) == list(model.outputs)
    assert_same(expected, run(model, inputs))  # the model given is as it was


LEFT = {
    "resnet": {"Conv": 6, "Relu": 5, "Add": 2, "MaxPool": 1, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
    "mobilenet": {
        "Conv": 7,
        "HardSwish": 2,
        "Clip": 2,
        "ReduceMean": 1,
        "Relu": 1,
        "Sigmoid": 1,
        "Mul": 1,
        "Add": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
        "Softmax": 1,
    },
    "channels_last": {
        "Transpose": 1,
        "Conv": 4,
        "Clip": 2,
        "Add": 1,
        "Concat": 1,
        "ReduceMean": 1,
        "MatMul": 1,
        "Softmax": 1,
    },
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_of_a_convolutional_network(name: str) -> None:
    optimized = pipeline.optimize(network(name))
    assert Counter(node.op_type for node in optimized.ir.graph) == LEFT[name]


def test_composites_of_transformers_are_found() -> None:
    ops = Counter(node.op_type for node in pipeline.optimize(network("transformer")).ir.graph)
    assert (ops["LayerNormalization"], ops["Attention"], ops["Gelu"]) == (3, 1, 1)
    assert not {"Softmax", "Erf", "Sqrt", "ReduceMean"} & ops.keys()
    ops = Counter(node.op_type for node in pipeline.optimize(network("llama")).ir.graph)
    assert (ops["RMSNormalization"], ops["Attention"], ops["Swish"]) == (3, 1, 1)
    assert not {"Softmax", "Sigmoid", "Sqrt", "ReduceMean"} & ops.keys()


def test_notes_say_what_was_done() -> None:
    notes = pipeline.optimize(network("transformer")).notes
    assert "attentions recognised: 1" in notes
    assert "layer and RMS normalizations recognised: 3" in notes
