"""What kind of computation each ONNX operator is, as region formation and the passes see it."""

from __future__ import annotations

import onnx_ir as ir

UNARY = frozenset(
    """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu""".split()
)
"""out[i] = f(in[i]); further inputs (Clip's bounds) are scalars."""

BROADCASTING = frozenset(
    """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
    Mod Mul Or PRelu Pow Sub Sum Where Xor""".split()
)
"""out[i] = f(a[i], b[i], ...) with numpy's broadcasting."""

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Elementwise; scale and zero point go with the whole tensor, an axis, or blocks of one."""

ELEMENTWISE = UNARY | BROADCASTING | QUANTIZERS | {"CastLike", "Dropout"}

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Row-major order of the elements does not change, so the output may be the input under another shape."""

MOVES = frozenset("Concat DepthToSpace Expand Gather Pad Slice SpaceToDepth Split Tile Transpose Trilu".split())
"""Elements are moved (or zeros put between) by a rule that is known when compiling."""

TAILED = frozenset(
    """ArgMax ArgMin Attention AveragePool BatchNormalization Conv ConvInteger ConvTranspose CumSum Einsum Gather Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization InstanceNormalization LRN LayerNormalization
    LogSoftmax LpNormalization LpPool MatMul MatMulInteger MaxPool QLinearConv QLinearMatMul RMSNormalization ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Resize
    Softmax""".split()
)
"""Anchors whose result is stored element by element, so that an elementwise tail can be computed on the way out."""

NONDETERMINISTIC = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def has_body(node: ir.Node) -> bool:
    """Whether the node has a graph inside (If, Loop, Scan, SequenceMap)."""
    return any(attribute.type in BODIES for attribute in node.attributes.values())


def is_elementwise(node: ir.Node) -> bool:
    """Whether each element of the output is a function of the elements at the same place in the inputs."""
    if node.domain or node.op_type not in ELEMENTWISE:
        return False
    if node.op_type == "Dropout":
        # With the mask asked for or in training mode it is not a plain copy.
        return len([out for out in node.outputs if out.uses() or out.is_graph_output()]) <= 1 and not _given(node, 2)
    if node.op_type in QUANTIZERS:
        return node.attributes.get_int("block_size", 0) == 0
    return True


def widens(node: ir.Node) -> bool:
    """Whether the node only turns narrow numbers into wider ones: DequantizeLinear, or a Cast from bfloat16."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Cast":
        return node.inputs[0].dtype == ir.DataType.BFLOAT16 and node.outputs[0].dtype == ir.DataType.FLOAT
    return node.op_type == "DequantizeLinear"


def is_view(node: ir.Node) -> bool:
    """Whether the output may alias the input."""
    return node.domain == "" and node.op_type in VIEWS


def is_move(node: ir.Node) -> bool:
    """Whether the node only moves data by a rule known when compiling."""
    if node.domain or node.op_type not in MOVES:
        return False
    if node.op_type == "Gather":
        return is_constant(node.inputs[1])
    if node.op_type == "Pad":
        return all(value is None or is_constant(value) for value in node.inputs[1:2])
    if node.op_type in {"Slice", "Trilu"}:
        return all(value is None or is_constant(value) for value in node.inputs[1:])
    return True


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is a weight or another constant."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None
