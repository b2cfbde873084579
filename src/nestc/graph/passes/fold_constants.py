"""Compute what depends on constants only, so that shapes become static and branches are decided."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from nestc.graph.kinds import NONDETERMINISTIC, QUANTIZERS, is_constant, widens
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, operand

GROWTH = 1 << 16
"""Elements by which folding one operator may make the weights larger than its operands were."""

_NARROW_WEIGHTS = frozenset({"MatMul", "Gemm"})
"""Operators whose kernels read bfloat16 weights, half as many bytes as what folding their Cast would make."""


class LiftConstants(ir.passes.InPlacePass):
    """Turn Constant nodes into initializers, so that every later pass meets constants in one form only."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's constant folding, which also infers shapes node by node and puts a decided If's branch in its place.

    Operators run in `onnx.reference`. An operator is not folded if the result would be much larger than its operands;
    quantizers stay, since they carry meaning for the targets, and so do bfloat16 weights of matrix products.
    """

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__()
        self.notes = [] if notes is None else notes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = len(model.graph)
        # onnxscript makes a Cast of CastLike and forgets its attributes, so that has to be done before.
        modified = CastLikes(self.notes)(model).modified
        modified |= ViewConstants(self.notes)(model).modified
        modified |= self.fold(model)
        # A branch that was decided may bring more of these constants into the graph.
        while ViewConstants(self.notes)(model).modified:
            modified |= self.fold(model)
        _forget_dead_users(model)
        modified |= LiftConstants()(model).modified
        modified |= common.RemoveUnusedNodesPass()(model).modified
        if len(model.graph) < before:
            self.notes.append(f"operators on constants folded: {before - len(model.graph)}")
        return ir.passes.PassResult(model, modified)

    def fold(self, model: ir.Model) -> bool:
        try:
            return optimizer.fold_constants_ir(
                model, onnx_shape_inference=True, should_fold=_worth_folding, output_size_limit=1 << 62
            ).modified
        except RuntimeError as error:
            # onnxscript 0.7 fails on some uses of sequences; what it folded before is sound.
            common.NameFixPass()(model)
            self.notes.append(f"constant folding stopped: {str(error).splitlines()[0]}")
            return True


def _forget_dead_users(model: ir.Model) -> None:
    """Take values from nodes that are in no graph any more: a branch not taken still counts as using what it reads."""
    alive = set(model.graph.all_nodes())
    made = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *made):
        for user, index in tuple(value.uses()):
            if user not in alive:
                user.replace_input_with(index, None)


def _worth_folding(node: ir.Node) -> bool | None:
    """For onnxscript: True to fold a node of constant operands, False not to, None where it is not our matter."""
    if node.domain or node.op_type in NONDETERMINISTIC | QUANTIZERS | {"DynamicQuantizeLinear"}:
        return False
    if widens(node) and all(user.op_type in _NARROW_WEIGHTS for user, _ in node.outputs[0].uses()):
        return False
    if node.op_type in {"Constant", "ConstantOfShape"} or len(node.outputs) != 1:
        return False
    shape = static_shape(node.outputs[0])
    if shape is None:
        return None
    tensors = [value.const_value for value in node.inputs if value is not None]
    return math.prod(shape) <= sum(tensor.size for tensor in tensors if tensor is not None) + GROWTH


class ViewConstants(Rewrite):
    """Make constants of ConstantOfShape, and of Expand and Split of a constant: numpy views, without memory."""

    what = "constants that are views"

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type == "Split":
            return self.split(node)
        if node.op_type == "ConstantOfShape":
            shape = array(node.inputs[0])
            fill = node.attributes.get("value")
            if shape is None:
                return False
            element = np.zeros((), np.float32) if fill is None else fill.as_tensor().numpy().reshape(())
            dtype = ir.DataType.FLOAT if fill is None else fill.as_tensor().dtype
        elif node.op_type == "Expand" and is_constant(node.inputs[0]) and array(node.inputs[1]) is not None:
            data, target = array(node.inputs[0]), array(node.inputs[1])
            dtype = node.outputs[0].dtype
            if data is None or target is None or data.size != 1 or dtype is None:
                return False
            element = data.reshape(())
            shape = np.array(np.broadcast_shapes(data.shape, tuple(int(size) for size in target)), np.int64)
        else:
            return False
        if node.outputs[0].is_graph_output():
            return False
        full = np.broadcast_to(element, tuple(int(size) for size in shape))
        self.replace(node.outputs[0], self.constant(full, f"{node.outputs[0].name}.filled", dtype))
        return True

    def split(self, node: ir.Node) -> bool:
        """Parts of a constant, which onnxscript does not fold because they are several."""
        source, whole = node.inputs[0], array(node.inputs[0])
        if source is None or whole is None or any(value.is_graph_output() for value in node.outputs):
            return False
        axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
        sizes = array(operand(node, 1))
        each = -(-whole.shape[axis] // count)
        ends = each * np.arange(1, count) if sizes is None else np.cumsum(sizes)[:-1]
        for value, part in zip(node.outputs, np.split(whole, ends, axis), strict=True):
            self.replace(value, self.constant(part, f"{value.name}.part", source.dtype))
        return True


class CastLikes(Rewrite):
    """Say Cast where the type that CastLike takes from its second operand is known."""

    what = "types of CastLike written out"

    def rewrite(self, node: ir.Node) -> bool:
        dtype = None if node.op_type != "CastLike" or node.inputs[1] is None else node.inputs[1].dtype
        if dtype is None:
            return False
        kept = {name: node.attributes.get_int(name) for name in ("saturate",) if name in node.attributes}
        kept |= {name: node.attributes.get_string(name) for name in ("round_mode",) if name in node.attributes}
        attributes = {"to": int(dtype), **{name: value for name, value in kept.items() if value is not None}}
        made = self.insert(node, "Cast", [node.inputs[0]], attributes, like=node.outputs[0], dtype=dtype)
        self.replace(node.outputs[0], made)
        return True
