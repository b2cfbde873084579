"""Give every consumer of a narrow tensor a DequantizeLinear (or Cast) of its own, so that a region can take it in."""

from __future__ import annotations

import onnx_ir as ir

from nestc.graph.kinds import is_elementwise, is_view, widens
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, producer


class NarrowViews(Rewrite):
    """A Cast from bfloat16 sinks below views and Transposes: what they give is narrow, and who reads it widens it."""

    what = "views moved to bfloat16"

    def rewrite(self, node: ir.Node) -> bool:
        moves = is_view(node) or node.op_type == "Transpose"
        source = producer(node.inputs[0], "Cast") if moves else None
        if source is None or not widens(source):
            return False
        narrow, result = source.inputs[0], node.outputs[0]
        assert narrow is not None
        shaped = self.insert(
            node, node.op_type, [narrow, *node.inputs[1:]], like=result, dtype=ir.DataType.BFLOAT16,
            name=f"{result.name}.narrow",
        )  # fmt: skip
        made = shaped.producer()
        assert made is not None
        made.attributes.update(node.attributes)
        self.replace(result, self.insert(node, "Cast", [shaped], {"to": int(ir.DataType.FLOAT)}, like=result))
        return True


class OwnDequantize(Rewrite):
    """A DequantizeLinear with several uses is repeated for each; all of them read the same integers.

    So is a Cast from bfloat16.

    Not for an elementwise operator with a larger result, which would dequantize each element many times: those share
    one.
    """

    what = "dequantizers given to each consumer"

    def rewrite(self, node: ir.Node) -> bool:
        if not widens(node):
            return False
        result = node.outputs[0]
        uses = [(user, index) for user, index in result.uses() if not self.shares(user, result)]
        kept = 0 if result.is_graph_output() or len(uses) < len(result.uses()) else 1
        for user, index in uses[kept:]:
            copy = self.insert(node, node.op_type, list(node.inputs), like=result)
            made = copy.producer()
            assert made is not None
            made.attributes.update(node.attributes)
            user.replace_input_with(index, copy)
        return len(uses) > kept

    def shares(self, user: ir.Node, value: ir.Value) -> bool:
        """Whether a user is better off with the tensor of floats."""
        if user.graph is not self.graph:
            return True
        return is_elementwise(user) and static_shape(user.outputs[0]) != static_shape(value)
