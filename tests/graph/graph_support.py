"""What the tests of the graph share: models from text, their text, and running them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from nestc.graph.model import Model
from nestc.graph.quiet import quiet
from nestc.importers.onnx import load


def parse(text: str, **weights: np.ndarray) -> Model:
    """Load a graph in ONNX's text form; `weights` become initializers of these names."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["":23]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return load(proto)


def text(model: Model) -> str:
    """The nodes, one a line, as ``out = Op(in, ...) {attributes}``; constants of up to 6 elements by their value."""
    lines: list[str] = []
    for node in model.ir.graph:
        inputs = ", ".join("" if value is None else _operand(value) for value in node.inputs)
        attributes = ", ".join(f"{key}={attribute.value}" for key, attribute in sorted(node.attributes.items()))
        outputs = ", ".join(_plain(value.name) for value in node.outputs)
        lines.append(f"{outputs} = {node.op_type}({inputs})" + (f" {{{attributes}}}" if attributes else ""))
    return "\n".join(lines)


def _operand(value: ir.Value) -> str:
    if value.is_initializer() and value.const_value is not None and value.const_value.size <= 6:
        return str(np.round(value.const_value.numpy().astype(np.float64), 4).tolist())
    return _plain(value.name)


def _plain(name: str | None) -> str:
    return name or "_"


def feeds(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; whole numbers below 20 for integer ones."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in model.inputs.items():
        sizes = tuple(int(size) for size in shape)
        whole = dtype.startswith(("int", "uint"))
        values = random.integers(0, 20, sizes) if whole else random.standard_normal(sizes)
        found[name] = np.asarray(values).astype(dtype)
    return found


def run(
    model: Model | ir.Model | onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, literal: bool = False
) -> list[np.ndarray]:
    """The outputs of a model, in order, in ONNX Runtime on one thread; the model must satisfy onnx's checker.

    With `literal`, each operator computes as it stands: QuantizeLinear and DequantizeLinear are not fused with others.
    Without it they are, and products of integers are exact (they saturate on AVX2 unless ONNX Runtime is told so).
    """
    with quiet("onnx_ir"):
        proto = ir.to_proto(model.ir) if isinstance(model, Model) else model
        proto = ir.to_proto(proto) if isinstance(proto, ir.Model) else proto
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return [np.asarray(each) for each in session.run(None, {name: inputs[name] for name in names})]


def assert_same(expected: list[np.ndarray], found: list[np.ndarray], tolerance: float = 1e-5) -> None:
    """Same dtypes, shapes, and values within `tolerance` of each output's scale."""
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.size:
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * float(np.abs(a.astype(np.float64)).max()))
