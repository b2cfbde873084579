"""Counts the arithmetic of a model: two operations for each multiply-add of its convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from nestc.errors import Error

COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})


def count_flops(file: Path, inputs: Mapping[str, np.ndarray]) -> float:
    """Operations of one run with `inputs`; shapes come from a run in ONNX Runtime, so symbolic dimensions are fine.

    Nodes inside If, Loop and Scan bodies are not counted.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Error("counting a model's operations needs onnxruntime: pip install 'nestc[bench]'") from error
    model = onnx.load(str(file))
    nodes = [node for node in model.graph.node if node.op_type in COUNTED]
    constants = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = tuple(node.attribute[0].t.dims)
    known = set(constants) | {v.name for v in model.graph.input}
    wanted = {name for node in nodes for name in (*node.input[:2], node.output[0]) if name and name not in known}
    declared = {v.name for v in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - declared))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    shapes = constants | {key: value.shape for key, value in inputs.items()}
    shapes |= {
        key: value.shape for key, value in zip(names, map(np.asarray, session.run(None, dict(inputs))), strict=True)
    }
    return float(sum(node_flops(node, shapes) for node in nodes))


def node_flops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Operations of one node, given the shapes of its first two inputs and its first output."""
    x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return 2 * int(np.prod(y)) * int(np.prod(w[1:]))
    if node.op_type == "ConvTranspose":
        return 2 * int(np.prod(x)) * int(np.prod(w[1:]))
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * int(np.prod(y)) * (x[0] if transposed else x[1])
    if node.op_type == "MatMul":
        return 2 * int(np.prod(y)) * x[-1]
    # Recurrent: weights W [directions, gates * hidden, input] and R [directions, gates * hidden, hidden] a step.
    directions, rows, width = w
    hidden = next(a.i for a in node.attribute if a.name == "hidden_size")
    return 2 * x[0] * x[1] * directions * rows * (width + hidden)
