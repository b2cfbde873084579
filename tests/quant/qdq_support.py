"""Running models in ONNX Runtime exactly, and profiles without running anything, for the tests of schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from quant_nets import parsed

import nestc
from nestc.graph.quiet import quiet
from nestc.quant.profile import Profile

HEAD = '<ir_version: 10, opset_import: ["":23]>'


def drawn(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Normally distributed float32 arrays of these names and shapes."""
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()}


def net(graph: str, seed: int = 0, **shapes: tuple[int, ...]) -> nestc.Model:
    """A graph in ONNX's text form, with normally distributed weights of these names and shapes."""
    return parsed(f"{HEAD} {graph}", **drawn(seed, **shapes))


def samples(model: nestc.Model, count: int = 2, seed: int = 5) -> list[dict[str, np.ndarray]]:
    """Normally distributed inputs."""
    random = np.random.default_rng(seed)
    return [
        {
            name: random.standard_normal([int(size) for size in shape]).astype(np.float32)
            for name, (_, shape) in model.inputs.items()
        }
        for _ in range(count)
    ]


def calibrated(model: nestc.Model, method: str = "minmax") -> Profile:
    """The profile over `samples`."""
    return nestc.calibrate(model, samples(model), method)


def quantized(
    model: nestc.Model, scheme: str = "int8", tools: Sequence[str] = (), overrides: Mapping[str, str] | None = None
) -> nestc.Model:
    """The model in a scheme, without the scheme's own tools."""
    return nestc.quantize(model, calibrated(model), scheme, tools=tools, overrides=overrides)


def proto(model: nestc.Model) -> onnx.ModelProto:
    with quiet("onnx_ir"):
        made = ir.to_proto(model.ir)
    onnx.checker.check_model(made)
    return made


def run(model: nestc.Model, inputs: Mapping[str, np.ndarray], exact: bool = True) -> dict[str, np.ndarray]:
    """Outputs in ONNX Runtime; `exact` computes between Q and DQ in float32, as the operators are defined.

    Otherwise it uses its own integer kernels, told not to saturate (as they do on x86 without VNNI).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    made = proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))


def lines(model: nestc.Model) -> list[str]:
    """The nodes as ``out = Op(in, ...)``, with the element type of what is not float32, and scalars by value."""
    return [
        f"{', '.join(map(_typed, node.outputs))} = {node.op_type}({', '.join(map(_typed, node.inputs))})"
        for node in model.ir.graph
    ]


def _typed(value: ir.Value | None) -> str:
    if value is None:
        return ""
    name = (value.name or "").removesuffix("_Output")
    dtype = value.dtype
    return name if dtype in (None, ir.DataType.FLOAT) else f"{name}:{dtype.name.lower()}"


def constant(model: nestc.Model, name: str) -> np.ndarray:
    """An initializer of the model."""
    tensor = model.ir.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
