"""ONNX Runtime's own operators for quantized models: what they are read as computes what ONNX Runtime computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nestc.errors import UnsupportedOp
from nestc.graph.model import Model
from nestc.importers.onnx import load

U8, S8 = np.uint8, np.int8
RANDOM = np.random.default_rng(11)


def integers(*shape: int, dtype: Any = U8) -> np.ndarray:
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, shape, dtype=dtype)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


SCALES = {"s": np.float32(0.05), "t": np.float32(0.08), "r": np.float32(0.11)}
ZEROS = {"z": U8(120), "o": U8(130), "p": U8(100)}
SMALL = {**SCALES, **ZEROS}


def build(
    op_type: str,
    inputs: Sequence[str],
    weights: Mapping[str, np.ndarray],
    given: Mapping[str, np.ndarray],
    version: int,
    output: int = TensorProto.UINT8,
    **attributes: Any,
) -> onnx.ModelProto:
    """One operator of com.microsoft; `inputs` that are neither weights nor given are left out."""
    names = [name if name in weights or name in given else "" for name in inputs]
    node = helper.make_node(op_type, names, ["y"], op_type, domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items() if name in names],
    )
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto | Model, given: Mapping[str, np.ndarray]) -> np.ndarray:
    import onnx_ir as ir

    proto = ir.to_proto(model.ir) if isinstance(model, Model) else model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(given))[0])


TWO = ("a", "s", "z", "b", "t", "o", "r", "p")
ONE = ("a", "s", "z", "r", "p")
IMAGE = {"a": integers(1, 4, 6, 6)}
PAIR = {"a": integers(2, 3, 4), "b": integers(3, 4)}
ROWS = {"a": integers(3, 8)}

QUANTIZED: dict[str, tuple[str, Sequence[str], Mapping[str, np.ndarray], Mapping[str, Any]]] = {
    "add": ("QLinearAdd", TWO, PAIR, {}),
    "multiply": ("QLinearMul", TWO, PAIR, {}),
    "mean of windows": ("QLinearAveragePool", ONE, IMAGE, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "mean of windows, channels last": (
        "QLinearAveragePool",
        ONE,
        {"a": integers(1, 6, 6, 4)},
        {"kernel_shape": [3, 3], "channels_last": 1},
    ),
    "mean": ("QLinearGlobalAveragePool", ONE, IMAGE, {}),
    "mean, channels last": ("QLinearGlobalAveragePool", ONE, {"a": integers(1, 5, 5, 4)}, {"channels_last": 1}),
    "concatenation": (
        "QLinearConcat",
        ("r", "p", "a", "s", "z", "b", "t", "o"),
        {**ROWS, "b": integers(3, 5)},
        {"axis": 1},
    ),
    "leaky relu": ("QLinearLeakyRelu", ONE, ROWS, {"alpha": 0.2}),
    "sigmoid": ("QLinearSigmoid", ("a", "s", "z", "unit", "zero"), ROWS, {}),
    "softmax": ("QLinearSoftmax", ("a", "s", "z", "unit", "zero"), ROWS, {"axis": -1, "opset": 13}),
}


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_operators(name: str, opset: int) -> None:
    op_type, inputs, given, attributes = QUANTIZED[name]
    weights = {**SMALL, "unit": np.float32(1 / 256), "zero": U8(0)}
    proto = build(op_type, inputs, weights, given, opset, **attributes)
    model = load(proto)
    assert {node.domain for node in model.ir.graph} == {""}
    expected, found = run(proto, given), run(model, given)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    apart = np.abs(expected.astype(int) - found.astype(int))
    # ONNX Runtime adds the zero point before it rounds, and takes its softmax from a table.
    assert apart.max() <= 1
    assert model.outputs["y"] == ("uint8", expected.shape)


def test_a_zero_point_left_out_is_of_the_type_of_the_operand() -> None:
    given = {"a": integers(4, 4, dtype=S8), "b": integers(4, 4, dtype=S8)}
    proto = build("QLinearAdd", ("a", "s", "-", "b", "t", "-", "r", "-"), SCALES, given, 17, TensorProto.INT8)
    model = load(proto)
    assert model.outputs["y"] == ("int8", (4, 4))
    real = given["a"] * np.float32(0.05) + given["b"] * np.float32(0.08)
    np.testing.assert_array_equal(run(model, given), np.clip(np.rint(real / np.float32(0.11)), -128, 127).astype(S8))


@pytest.mark.parametrize("result", ["quantized", "float"])
def test_qgemm(result: str) -> None:
    given = {"a": integers(3, 8)}
    weights = {**SMALL, "w": integers(5, 8, dtype=S8) // 2, "ws": np.abs(floats(5)) * np.float32(0.01)}
    weights |= {"wz": np.zeros(5, S8), "c": RANDOM.integers(-500, 500, 5).astype(np.int32)}
    inputs = ["a", "s", "z", "w", "ws", "wz", "c", *(["r", "p"] if result == "quantized" else [])]
    kind = TensorProto.UINT8 if result == "quantized" else TensorProto.FLOAT
    proto = build("QGemm", inputs, weights, given, 17, kind, transB=1, alpha=1.0)
    expected, found = run(proto, given), run(load(proto), given)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=1 if result == "quantized" else 1e-4)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, U8])
def test_quantizers_of_the_domain(dtype: Any) -> None:
    given = {"a": floats(4, 5)}
    weights = {"s": np.float32(0.01), "z": np.array(7, dtype)}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = build("QuantizeLinear", ("a", "s", "z"), weights, given, 17, kind)
    model = load(proto)
    quantized = run(model, given)
    np.testing.assert_array_equal(quantized, run(proto, given))
    back = build("DequantizeLinear", ("q", "s", "z"), weights, {"q": quantized}, 17, TensorProto.FLOAT)
    np.testing.assert_array_equal(run(load(back), {"q": quantized}), run(back, {"q": quantized}))


@pytest.mark.parametrize("per_channel", [False, True])
def test_products_of_integers_that_are_scaled(per_channel: bool) -> None:
    columns = (6,) if per_channel else ()
    weights = {"w": integers(8, 6), "ws": (np.abs(floats(6)) if per_channel else np.float32(0.02)) * np.float32(0.1)}
    weights |= {"wz": np.full(columns, 128, U8), "bias": floats(6)}
    given = {"a": floats(3, 8)}
    inputs = ("a", "w", "ws", "wz", "bias")
    proto = build("DynamicQuantizeMatMul", inputs, weights, given, 17, TensorProto.FLOAT)
    np.testing.assert_allclose(run(load(proto), given), run(proto, given), rtol=1e-5, atol=1e-4)
    given = {"a": integers(3, 8)}
    inputs = ("a", "w", "s", "ws", "z", "wz", "bias")
    proto = build("MatMulIntegerToFloat", inputs, {**weights, **SMALL}, given, 17, TensorProto.FLOAT)
    np.testing.assert_allclose(run(load(proto), given), run(proto, given), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("depth", [64, 40])
def test_weights_of_few_bits(bits: int, shifted: bool, depth: int) -> None:
    block, count = 32, 6
    blocks = -(-depth // block)
    weights = {"w": integers(count, blocks, block * bits // 8), "ws": np.abs(floats(count * blocks))}
    if shifted:
        weights["wz"] = integers(count * -(-blocks * bits // 8))
    weights["bias"] = floats(count)
    given = {"a": floats(2, 3, depth)}
    proto = build(
        "MatMulNBits",
        ("a", "w", "ws", "wz", "group", "bias"),
        weights,
        given,
        17,
        TensorProto.FLOAT,
        K=depth,
        N=count,
        bits=bits,
        block_size=block,
    )
    model = load(proto)
    expected = run(proto, given)
    np.testing.assert_allclose(run(model, given), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    (weight,) = [node for node in model.ir.graph if node.op_type == "DequantizeLinear"]
    assert weight.inputs[0] is not None and weight.inputs[0].dtype is not None
    assert weight.inputs[0].dtype.name == f"{'U' if shifted else ''}INT{bits}"
    assert Counter(node.op_type for node in model.ir.graph) == {"DequantizeLinear": 1, "MatMul": 1, "Add": 1}


def test_what_cannot_be_said_is_refused_in_words() -> None:
    given = {"a": floats(2, 8), "w": integers(4, 1, 8)}
    weights = {"ws": np.ones(4, np.float32)}
    proto = build(
        "MatMulNBits", ("a", "w", "ws"), weights, given, 17, TensorProto.FLOAT, K=8, N=4, bits=4, block_size=16
    )
    with pytest.raises(UnsupportedOp, match=r"'MatMulNBits': com.microsoft::MatMulNBits .* weights are not constants"):
        load(proto)
    proto = build("FusedConv", ("a",), {}, {"a": floats(1, 1, 3, 3)}, 17, TensorProto.FLOAT)
    with pytest.raises(UnsupportedOp, match="com.microsoft::FusedConv, of a domain that is not part of ONNX"):
        load(proto)
