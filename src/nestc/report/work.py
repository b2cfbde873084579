"""Counts what a region has to do, by definition: operations, and bytes at its border, whatever device runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

from nestc.bundle.dtypes import numpy_dtype
from nestc.graph.kinds import BROADCASTING, MOVES, QUANTIZERS, UNARY, VIEWS
from nestc.graph.region import Op, Region, TensorType

REDUCTIONS = frozenset(
    """ArgMax ArgMin CumSum GlobalAveragePool GlobalLpPool GlobalMaxPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare""".split()
)
"""One operation for each element of the input."""

POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
"""One operation for each element of each window."""

PER_ELEMENT = {
    "Softmax": 5,  # largest, difference, exponential, sum, quotient
    "LogSoftmax": 5,
    "BatchNormalization": 2,  # what is left when it is folded: scale and shift
    "LayerNormalization": 7,  # sum, difference, square, sum, and three to normalize, scale and shift
    "InstanceNormalization": 7,
    "GroupNormalization": 7,
    "RMSNormalization": 4,
    "LpNormalization": 3,
    "Resize": 1,
}
"""Operations for each element of the output."""

FREE = MOVES | VIEWS | QUANTIZERS | {"Cast", "CastLike", "Constant", "ConstantOfShape", "Dropout", "Range", "Shape"}
"""Moves elements or changes how they are written: bytes, but no operations."""

ELEMENTWISE = (UNARY | BROADCASTING) - FREE

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add counts two) and bytes that cross the border; None where a size is not known.

    ``weights``: bytes of constants, each counted once, as the graph holds them.
    """

    operations: int | None
    bytes_in: int | None
    bytes_out: int | None
    weights: int | None

    @property
    def bytes(self) -> int | None:
        """All that has to cross the border at least once."""
        if self.bytes_in is None or self.bytes_out is None or self.weights is None:
            return None
        return self.bytes_in + self.bytes_out + self.weights


def work(region: Region, weights: Collection[str] = ()) -> Work:
    """What a region has to do. `weights` names inputs that are constants too (of a graph stored without them)."""
    counted = [operations(op, region.types) for op in region.ops]
    constants = {*region.constants, *(name for name in region.inputs if name in weights)}
    inputs = [name for name in region.inputs if name not in constants]
    return Work(
        operations=None if None in counted else sum(cast("list[int]", counted)),
        bytes_in=total_bytes(region.types, inputs),
        bytes_out=total_bytes(region.types, region.outputs),
        weights=total_bytes(region.types, constants),
    )


def together(regions: Sequence[Region]) -> Region:
    """Neighbouring regions, each of which reads what the one before makes, as one; what lies between is no border."""
    if len(regions) == 1:
        return regions[0]
    read = {name for region in regions for name in region.inputs}
    made = {name for region in regions for name in region.outputs}
    return Region(
        regions[-1].name,
        None,
        tuple(op for region in regions for op in region.ops),
        tuple(dict.fromkeys(name for region in regions for name in region.inputs if name not in made)),
        tuple(name for region in regions for name in region.outputs if name not in read),
        {name: type_ for region in regions for name, type_ in region.types.items()},
        {name: reader for region in regions for name, reader in region.constants.items()},
    )


def numbers(region: Region) -> str:
    """Format of the numbers that a region computes with: what is widened inside it counts as what it was before.

    "int8" stands for bytes with and without a sign.
    """
    makers = {name: op for op in region.ops for name in op.outputs}
    first = next((op for op in region.ops if operations(op, region.types)), region.ops[0])
    name = first.input(0)
    while name in makers and makers[name].op_type in ("Cast", "DequantizeLinear") and makers[name].input(0):
        name = makers[name].input(0)
    found = region.types.get(name)
    return "" if found is None else found.dtype.replace("uint8", "int8")


def total_bytes(types: Mapping[str, TensorType], names: Collection[str]) -> int | None:
    """Plain size of some values together; None if one of them has no size that is known."""
    sizes = [nbytes(types[name]) for name in names]
    return None if None in sizes else sum(cast("list[int]", sizes))


def nbytes(type_: TensorType) -> int | None:
    """Plain size of a value in bytes; None if its shape is not known, or it is no tensor of numbers."""
    if any(size < 0 for size in type_.shape):
        return None
    try:
        kind = numpy_dtype(type_.dtype)
    except (KeyError, ValueError, TypeError):
        return None
    return None if kind.hasobject else prod(type_.shape) * kind.itemsize


def operations(op: Op, types: Mapping[str, TensorType]) -> int | None:
    """Operations of one node; None where a size is not known, a graph is inside, or nobody has counted it yet."""

    def shape(name: str) -> Shape | None:
        found = types.get(name)
        return None if found is None or any(size < 0 for size in found.shape) else found.shape

    kind = op.op_type
    if kind in FREE and not op.domain:
        return 0
    out, first = shape(op.output(0)), shape(op.input(0))
    if out is None or op.domain not in ("", "ai.onnx"):
        return None
    if kind in ELEMENTWISE:
        return prod(out) * max(1, len(op.inputs) - 1 if kind in ("Sum", "Max", "Min", "Mean") else 1)
    if kind in PER_ELEMENT:
        return prod(out) * PER_ELEMENT[kind]
    if kind in POOLS:
        return prod(out) * prod(cast(Shape, op.attributes.get("kernel_shape", ())))
    if first is None:
        return None
    if kind in REDUCTIONS:
        return prod(first)
    return _products(op, out, first, [shape(name) for name in op.inputs])


def _products(op: Op, out: Shape, first: Shape, shapes: list[Shape | None]) -> int | None:
    """Two operations for each multiply-add of convolutions, matrix products and recurrent networks."""
    kind = op.op_type
    second = shapes[3 if kind in ("QLinearConv", "QLinearMatMul") else 1] if len(shapes) > 1 else None
    if second is None:
        return None
    if kind in ("Conv", "ConvInteger", "QLinearConv"):
        return 2 * prod(out) * prod(second[1:])
    if kind == "ConvTranspose":
        return 2 * prod(first) * prod(second[1:])
    if kind == "Gemm":
        return 2 * prod(out) * first[0 if op.attributes.get("transA") else 1]
    if kind in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return 2 * prod(out) * first[-1]
    if kind in ("LSTM", "GRU", "RNN"):
        # W is [directions, gates * hidden, input], R the same with hidden; both are used at every step.
        steps = first[0] * first[1]
        recurrent = shapes[2] if len(shapes) > 2 else None
        return None if recurrent is None else 2 * steps * (prod(second) + prod(recurrent))
    if kind == "Attention" and len(first) == 3 and len(shapes) > 2 and len(shapes) < 5:
        # Scores and weighted sums: [batch, queries, heads * size] with [batch, keys, heads * size].
        return 2 * first[0] * first[1] * second[1] * (first[2] + out[2])
    if kind == "Attention" and len(first) == 4 and len(shapes) > 2 and len(shapes) < 5:
        return 2 * first[0] * first[1] * first[2] * second[2] * (first[3] + out[3])
    return None
