"""Find the graph inputs whose values decide shapes or axes, so that code has to be specialised for them."""

from __future__ import annotations

import onnx_ir as ir

from nestc.graph.kinds import has_body
from nestc.graph.model import Model

LARGEST = 64
"""An input of more elements is data: a shape or a list of axes has no more than twice a tensor's rank."""

# Operand numbers, by operator, whose value decides the shape of the result or how its elements are found.
OPERANDS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "If": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
}


def shape_operands(model: Model) -> tuple[str, ...]:
    """Inputs of an optimised model, with static shapes, that code must be specialised for, in graph order.

    An operand of `OPERANDS` that is computed from inputs counts all of these, unless one is too large to be anything
    but data: then the result is of a size known only at run time, and stays so.
    """
    needed: set[ir.Value] = set()
    for node in model.ir.graph:
        if node.domain:
            continue
        for index in OPERANDS.get(node.op_type, ()):
            if index < len(node.inputs) and node.inputs[index] is not None:
                sources = _sources(node.inputs[index])
                if sources is not None and all(_small(value) for value in sources):
                    needed |= sources
    return tuple(value.name or "" for value in model.ir.graph.inputs if value in needed)


def _sources(value: ir.Value | None) -> set[ir.Value] | None:
    """The graph inputs that a value is computed from; None if a node with a graph inside stands between."""
    sources: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            if current.is_graph_input():
                sources.add(current)
            continue
        if has_body(node):
            return None
        # Shape and Size read no values; with static shapes they are folded, and otherwise say nothing of contents.
        if node.domain or node.op_type not in ("Shape", "Size"):
            pending.extend(node.inputs)
    return sources


def _small(value: ir.Value) -> bool:
    """Whether an input is small enough to be a shape, an axis or a flag."""
    if value.shape is None or not value.shape.is_static():
        return False
    size = 1
    for dim in value.shape:
        size *= dim if isinstance(dim, int) else 0
    return size <= LARGEST
