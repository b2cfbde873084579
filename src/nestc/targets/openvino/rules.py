"""Which regions OpenVINO computes as ONNX says: operators, forms of them, and element types it does not replace.

Its CPU plugin computes int64 as int32, compares int32 as float32 and float64 as float32 (seen with 2026.4: a Gather of
int64 gives 3 for 2^40 + 3, Equal finds 2^24 and 2^24 + 1 equal). So integers are taken only where they are indices or
quantized values, or are merely moved and fit. The operators are those that pass the node tests of the package onnx;
IsNaN passes alone, but not fused with what is before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from nestc.graph.region import Op, Region
from nestc.targets.api import constraint

FLOATS = frozenset(("float32", "float16", "bfloat16"))
_MOVED = FLOATS | {"bool", "int8", "uint8", "int32"}
_QUANTIZED = FLOATS | {"int8", "uint8", "int32"}

BORDER = tuple(sorted(_MOVED | {"int64"}))
"""Element types that go in and out; int64 as indices."""

_FLOAT_OPS = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv
    ConvTranspose Cos Cosh CumSum Div Einsum Elu Equal Erf Exp Floor GRU Gelu Gemm GlobalAveragePool GlobalMaxPool
    Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf
    LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mul Neg Not Or PRelu Pow RMSNormalization RNN Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Resize
    RotaryEmbedding Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Sub Sum Swish Tan Tanh
    ThresholdedRelu Where Xor""".split()
)

_MOVES = frozenset(
    """Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape ReverseSequence
    ScatterElements ScatterND Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze""".split()
)

_INDEXED = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "ScatterElements": 1, "ScatterND": 1}
"""Operators with indices as this operand."""

OPS = _FLOAT_OPS | _MOVES | {"ArgMax", "ArgMin", "Cast", "DequantizeLinear", "QuantizeLinear", "TopK"}


@constraint
def kept_types(region: Region) -> bool:
    """openvino computes float64 and integers, unless they are quantized, moved or indices, in other formats"""
    return all(kind in allowed for op in region.ops for kind, allowed in _types(op, region))


def _types(op: Op, region: Region) -> Iterator[tuple[str, frozenset[str]]]:
    """The element type of every value of a node with those allowed in its place."""
    allowed = FLOATS | {"bool"}
    if op.op_type in _MOVES:
        allowed = _MOVED
    elif op.op_type in ("QuantizeLinear", "DequantizeLinear"):
        allowed = _QUANTIZED
    elif op.op_type == "Cast":
        allowed = _cast(op, region)
    for number, name in enumerate(op.inputs):
        index = _INDEXED.get(op.op_type) == number
        parameter = number > 0 and name in region.constants and region.types[name].dtype == "int64"
        if name and not parameter:
            yield region.types[name].dtype, allowed | {"int64", "int32"} if index else allowed
    found = op.op_type in ("ArgMax", "ArgMin", "TopK")
    for name in op.outputs:
        if name:
            yield region.types[name].dtype, allowed | {"int64"} if found else allowed


def _cast(op: Op, region: Region) -> frozenset[str]:
    """What a Cast may go from and to: between integers it would saturate; int64 it reads right from outside."""
    source, target = (region.types[name].dtype for name in (op.inputs[0], op.outputs[0]))
    real = FLOATS | {"bool"}
    if target in real:
        return _MOVED | {"int64"} if op.inputs[0] in region.inputs else _MOVED
    return _MOVED if source in real or target == "int32" else real


@constraint
def sound(region: Region) -> bool:
    """openvino computes an operator in this form otherwise than ONNX says, or not at all"""
    empty = any(0 in type_.shape for type_ in region.types.values())
    return not empty and not any(_FAULTS.get(op.op_type, _never)(op, region) for op in region.ops)


def _never(op: Op, region: Region) -> bool:
    return False


def _batch_first(op: Op, region: Region) -> bool:
    return op.attributes.get("layout") == 1


def _narrow(op: Op, region: Region) -> bool:
    return region.types[op.inputs[0]].dtype != "float32"


def _cut_short(op: Op, region: Region) -> bool:
    """Whether a pool with ``ceil_mode`` leaves out windows that begin in the padding, which OpenVINO does not."""
    if op.attributes.get("ceil_mode") != 1:
        return False
    sizes, found = region.types[op.inputs[0]].shape[2:], region.types[op.outputs[0]].shape[2:]
    rank = len(sizes)
    window, stride, dilation = (_ints(op, key, (1,) * rank) for key in ("kernel_shape", "strides", "dilations"))
    pads = _ints(op, "pads", (0,) * (2 * rank))
    for axis in range(rank):
        room = sizes[axis] + pads[axis] + pads[axis + rank] - (window[axis] - 1) * dilation[axis] - 1
        if -(-room // stride[axis]) + 1 != found[axis]:
            return True
    return False


def _ints(op: Op, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return cast("tuple[int, ...]", op.attributes.get(name) or default)


def _resize(op: Op, region: Region) -> bool:
    """Only plain resizing agrees: whole picture, no filter, no borders left out, sizes as given."""
    mode = op.attributes.get("coordinate_transformation_mode", "half_pixel")
    plain = mode in ("half_pixel", "asymmetric", "pytorch_half_pixel") or (mode == "align_corners" and not op.input(2))
    stretched = op.attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    filtered = op.attributes.get("antialias") == 1 or op.attributes.get("exclude_outside") == 1
    return not plain or not stretched or filtered


_FAULTS: Mapping[str, Callable[[Op, Region], bool]] = {
    "Attention": lambda op, region: bool(op.input(6) or op.output(3)),
    "AveragePool": _cut_short,
    "Celu": _narrow,
    "DequantizeLinear": lambda op, region: bool(op.attributes.get("block_size")),
    "GRU": _batch_first,
    "GridSample": lambda op, region: len(region.types[op.inputs[0]].shape) != 4,
    "LSTM": lambda op, region: _batch_first(op, region) or bool(op.input(7)),
    "MaxPool": lambda op, region: _cut_short(op, region) or bool(op.output(1)),
    "Pad": lambda op, region: op.attributes.get("mode") == "wrap",
    "QuantizeLinear": lambda op, region: bool(op.attributes.get("block_size")),
    "RNN": _batch_first,
    "Resize": _resize,
    "TopK": lambda op, region: op.attributes.get("sorted") == 0,
}
"""Forms in which version 2026.4 fails node tests of the package onnx 1.23."""
