"""Give every consumer of a dequantized tensor a DequantizeLinear of its own, so that a region can take it in."""

from __future__ import annotations

import onnx_ir as ir

from nestc.graph.kinds import is_elementwise
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite


class OwnDequantize(Rewrite):
    """A DequantizeLinear with several uses is repeated for each; all of them read the same integers.

    Not for an elementwise operator with a larger result, which would dequantize each element many times: those share
    one.
    """

    what = "dequantizers given to each consumer"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type != "DequantizeLinear":
            return False
        result = node.outputs[0]
        uses = [(user, index) for user, index in result.uses() if not self.shares(user, result)]
        kept = 0 if result.is_graph_output() or len(uses) < len(result.uses()) else 1
        for user, index in uses[kept:]:
            copy = self.insert(node, "DequantizeLinear", list(node.inputs), like=result)
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
