"""Move transposes and views down past elementwise operators, so that those meet the operator they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import BROADCASTING, UNARY, is_constant, is_view
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, ints, only_use, operand

_REDUCTIONS = frozenset(
    """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare""".split()
)


class Sink(Rewrite):
    """f(Transpose(x)) becomes Transpose(f(x)), for f elementwise, Concat, Pad or a reduction; the same for views.

    This lets a convolution take in the activation after it, and lets transposes meet and cancel: exporters of models
    with channels last put a pair of them around every convolution. The number of transposes never grows.
    """

    what = "transposes and views moved below other operators"

    def rewrite(self, node: ir.Node) -> bool:
        if len(node.outputs) != 1 or static_shape(node.outputs[0]) is None:
            return False
        if node.op_type in UNARY or node.op_type in BROADCASTING:
            return self.elementwise(node)
        if node.op_type == "Concat":
            return self.concat(node)
        if node.op_type in _REDUCTIONS:
            return self.reduction(node)
        if node.op_type == "Pad":
            return self.pad(node)
        return False

    def elementwise(self, node: ir.Node) -> bool:
        given = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        moved = [(index, value) for index, value in given if not is_constant(value)]
        sources = [self.source(value) for _, value in moved]
        if not moved or sources[0] is None or any(source is None for source in sources):
            return False
        if not any(only_use(value) or _used_by(value, node) for _, value in moved):
            return False
        heads = [source for source in sources if source is not None]
        first = heads[0]
        if first.op_type == "Transpose":
            return self.below_transposes(node, heads, [index for index, _ in moved])
        return self.below_views(node, heads, [index for index, _ in moved])

    def source(self, value: ir.Value) -> ir.Node | None:
        """The Transpose or view of known shape that computes a value."""
        node = value.producer()
        if node is None or node.graph is not self.graph or node.domain:
            return None
        if node.op_type != "Transpose" and not (is_view(node) and node.op_type != "Identity"):
            return None
        known = node.inputs[0] is not None and static_shape(node.inputs[0]) is not None
        return node if known and static_shape(node.outputs[0]) is not None else None

    def below_transposes(self, node: ir.Node, heads: Sequence[ir.Node], places: Sequence[int]) -> bool:
        shape = static_shape(node.outputs[0]) or ()
        rank = len(shape)
        order = ints(heads[0], "perm", range(rank)[::-1])
        if any(head.op_type != "Transpose" or ints(head, "perm", range(len(order))[::-1]) != order for head in heads):
            return False
        if len(order) != rank or any(static_shape(head.outputs[0]) != shape for head in heads):
            return False
        inverse = [order.index(axis) for axis in range(rank)]
        inputs = list(node.inputs)
        for place, head in zip(places, heads, strict=True):
            inputs[place] = head.inputs[0]
        for index, value in enumerate(inputs):
            if index in places or value is None:
                continue
            constant = array(value)
            if constant is None or constant.ndim > rank:
                return False
            if constant.size > 1:
                full = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
                turned = np.ascontiguousarray(full.transpose(inverse))
                inputs[index] = self.constant(turned, f"{value.name}.moved", value.dtype)
        below = [shape[axis] for axis in inverse]
        result = self.same_operator(node, inputs, below)
        self.replace(node.outputs[0], self.insert(node, "Transpose", [result], {"perm": order}, like=node.outputs[0]))
        return True

    def below_views(self, node: ir.Node, heads: Sequence[ir.Node], places: Sequence[int]) -> bool:
        shape = static_shape(node.outputs[0])
        if any(head.op_type == "Transpose" or static_shape(head.outputs[0]) != shape for head in heads):
            return False
        before = {static_shape(head.inputs[0]) for head in heads if head.inputs[0] is not None}
        source = heads[0].inputs[0]
        others = [value for index, value in enumerate(node.inputs) if index not in places]
        constants = [value for value in others if value is not None]
        if len(before) != 1 or source is None:
            return False
        if any(value.const_value is None or value.const_value.size != 1 for value in constants):
            return False
        below = before.pop() or ()
        if shape is None or 0 in shape or any(len(value.shape or ()) > len(below) for value in constants):
            return False
        inputs = list(node.inputs)
        for place, head in zip(places, heads, strict=True):
            inputs[place] = head.inputs[0]
        result = self.same_operator(node, inputs, below)
        sizes = self.constant(np.array(shape, np.int64), f"{node.outputs[0].name}.shape")
        self.replace(node.outputs[0], self.insert(node, "Reshape", [result, sizes], like=node.outputs[0]))
        return True

    def same_operator(self, node: ir.Node, inputs: Sequence[ir.Value | None], shape: Sequence[int]) -> ir.Value:
        result = self.insert(node, node.op_type, inputs, like=node.outputs[0], shape=shape)
        made = result.producer()
        assert made is not None
        made.attributes.update(node.attributes)
        made.name = node.name
        return result

    def one_order(self, node: ir.Node) -> tuple[int, ...] | None:
        """The order that all data operands of `node` are transposed by, if none of them is used elsewhere."""
        values = [node.inputs[0]] if node.op_type != "Concat" else list(node.inputs)
        orders: set[tuple[int, ...]] = set()
        for value in values:
            head = None if value is None or not only_use(value) else self.source(value)
            if head is None or head.op_type != "Transpose":
                return None
            orders.add(ints(head, "perm", range(len(static_shape(head.outputs[0]) or ()))[::-1]))
        return orders.pop() if len(orders) == 1 else None

    def concat(self, node: ir.Node) -> bool:
        order = self.one_order(node)
        if order is None:
            return False
        shape = static_shape(node.outputs[0]) or ()
        heads = [value.producer() for value in node.inputs if value is not None]
        inputs = [head.inputs[0] for head in heads if head is not None]
        below = [shape[order.index(axis)] for axis in range(len(order))]
        result = self.same_operator(node, inputs, below)
        axis = order[node.attributes["axis"].as_int() % len(order)]
        result.producer().attributes["axis"] = ir.AttrInt64("axis", axis)  # pyright: ignore[reportOptionalMemberAccess]
        self.replace(node.outputs[0], self.insert(node, "Transpose", [result], {"perm": order}, like=node.outputs[0]))
        return True

    def reduction(self, node: ir.Node) -> bool:
        order, chosen = self.one_order(node), array(operand(node, 1))
        if order is None or chosen is None or chosen.size == 0 or node.inputs[0] is None:
            return False
        head = node.inputs[0].producer()
        source = None if head is None else head.inputs[0]
        before = None if source is None else static_shape(source)
        if source is None or before is None:
            return False
        rank = len(order)
        axes = sorted({order[int(axis) % rank] for axis in chosen})
        sizes = self.constant(np.array(axes, np.int64), f"{node.outputs[0].name}.axes")
        if node.attributes.get_int("keepdims", 1):
            below = [1 if axis in axes else size for axis, size in enumerate(before)]
            left = list(order)
        else:
            kept = [axis for axis in range(rank) if axis not in axes]
            below = [before[axis] for axis in kept]
            left = [kept.index(axis) for axis in order if axis not in axes]
        result = self.same_operator(node, [source, sizes], below)
        if left != list(range(len(left))):
            result = self.insert(node, "Transpose", [result], {"perm": left}, like=node.outputs[0])
        self.replace(node.outputs[0], result)
        return True

    def pad(self, node: ir.Node) -> bool:
        order, amounts = self.one_order(node), array(operand(node, 1))
        if order is None or amounts is None or operand(node, 3) is not None or node.inputs[0] is None:
            return False
        head = node.inputs[0].producer()
        source = None if head is None else head.inputs[0]
        rank, shape = len(order), static_shape(node.outputs[0]) or ()
        places = [order.index(axis) for axis in range(rank)]
        moved = np.concatenate([amounts[:rank][places], amounts[rank:][places]])
        sizes = self.constant(moved, f"{node.outputs[0].name}.pads")
        inputs = [source, sizes, *node.inputs[2:]]
        result = self.same_operator(node, inputs, [shape[place] for place in places])
        self.replace(node.outputs[0], self.insert(node, "Transpose", [result], {"perm": order}, like=node.outputs[0]))
        return True


def _used_by(value: ir.Value, node: ir.Node) -> bool:
    """Whether `node` alone uses the value, perhaps at several places."""
    return not value.is_graph_output() and all(user is node for user, _ in value.uses())
