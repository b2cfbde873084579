"""The elementwise tail of a region, inlined where the anchor's kernel stores its result."""

from __future__ import annotations

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region
from nestc.kernels.elementwise import apply_elementwise, elementwise_refusal, operand_index
from nestc.kernels.operands import Index, Operands
from nestc.kernels.small import SMALL
from nestc.tensor.build import within
from nestc.tensor.ir import Const, Expr, Stmt
from nestc.tensor.rewrite import binary


def after(region: Region, anchor: Op) -> tuple[Op, ...]:
    """The operators after `anchor`. What stands before it widens its operands and is the anchor's own business."""
    return region.ops[next(i for i, op in enumerate(region.ops) if op is anchor) + 1 :]


def tail_refusal(region: Region, anchor: Op) -> str | None:
    """Why the operators after `anchor` cannot be computed where it stores; None if they can.

    Every one must be elementwise with the shape of the anchor's first output, in terms of it, of other values of
    the region and of constants.
    """
    shape = region.types[anchor.outputs[0]].shape
    for op in after(region, anchor):
        refusal = elementwise_refusal(op, region)
        if refusal:
            return refusal
        if any(name and region.types[name].dtype in SMALL for name in (*op.inputs, *op.outputs)):
            return f"{op.op_type} (node {op.name!r}) works on elements of 8 bits or fewer"
        if region.types[op.outputs[0]].shape != shape:
            return f"{op.op_type} (node {op.name!r}) changes the shape of its anchor"
    return None


class Tail:
    """Turns the anchor's value at an index into stores of the region's outputs."""

    def __init__(self, operands: Operands, anchor: Op) -> None:
        refusal = tail_refusal(operands.region, anchor)
        if refusal:
            raise UnsupportedOp(f"region {operands.region.name}: {refusal}")
        self.operands = operands
        self.region = operands.region
        self.anchor = anchor

    def declare(self) -> None:
        """Declare the outputs as parameters now, so that their order does not depend on the loops."""
        for name in self.region.outputs:
            self.operands.buffer(name)

    def stores(self, index: Index, value: Expr, mask: Expr | None = None) -> tuple[Stmt, ...]:
        """Scalar stores of every output of the region at logical `index`, where the anchor's first output is `value`.

        The index may run past the shape (ragged tiles): reads and writes are masked there, and the channel padding of
        blocked layouts is filled with zeros. The caller vectorises the statements (`tensor.vectorize`).
        """
        region, operands = self.region, self.operands
        shape = region.types[self.anchor.outputs[0]].shape
        valid: Expr = Const(True, "bool") if mask is None else mask
        for i, extent in zip(index, shape):
            valid = binary("and", valid, within(i, extent))
        values: dict[str, Expr] = {self.anchor.outputs[0]: value}
        inner = None if isinstance(valid, Const) and valid.value else valid

        for op in after(region, self.anchor):
            arguments: list[Expr | None] = []
            for position, name in enumerate(op.inputs):
                place = operand_index(op, position, index, region)
                known = None if place is None else values.get(name)
                arguments.append(known if place is None or known is not None else operands.load(name, place, inner))
            values[op.outputs[0]] = self.apply(op, arguments)
        return tuple(s for name in region.outputs for s in operands.stores(name, index, values[name], mask))

    def apply(self, op: Op, arguments: list[Expr | None]) -> Expr:
        """One operator of the tail on one element."""
        return apply_elementwise(op, arguments, self.region)
