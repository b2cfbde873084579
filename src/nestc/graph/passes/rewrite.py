"""The base of passes that look at one node after the other and replace what they find."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from nestc.graph.kinds import is_constant

_EAGER_BYTES = 1 << 16

AttributeInput = int | float | str | Sequence[int] | Sequence[float]


class Rewrite(ir.passes.InPlacePass):
    """Visits each node of the main graph once, in topological order; subclasses say what to do with it.

    Nodes that lose their last user disappear after the visit, weights with them. What was done is added to `notes`.
    """

    what: ClassVar[str]
    """What one change is called in the notes, e.g. ``batch normalizations folded``."""

    domain: ClassVar[str] = ""
    """Whose operators are visited."""

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__()
        self.notes = [] if notes is None else notes
        self.graph: ir.Graph = ir.Graph([], [], nodes=[])
        self.names: set[str] = set()

    @abstractmethod
    def rewrite(self, node: ir.Node) -> bool:
        """Change the graph at `node`; return whether anything changed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.graph = model.graph
        self.names = {value.name or "" for node in self.graph.all_nodes() for value in node.outputs}
        self.names |= {value.name or "" for value in self.graph.inputs} | set(self.graph.initializers)
        changes = 0
        for node in list(self.graph):
            if node.graph is self.graph and node.domain == self.domain and used(node):
                changes += self.rewrite(node)
        if changes:
            common.RemoveUnusedNodesPass()(model)
            self.notes.append(f"{self.what}: {changes}")
        return ir.passes.PassResult(model, changes > 0)

    def fresh(self, name: str) -> str:
        """A value name that nothing in the graph has yet, made from `name`."""
        candidate, count = name, 1
        while candidate in self.names:
            candidate, count = f"{name}.{count}", count + 1
        self.names.add(candidate)
        return candidate

    def constant(self, array: np.ndarray, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer."""
        name = self.fresh(name)
        tensor = ir.Tensor(array, dtype=dtype, name=name) if dtype else ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def lazy(self, compute: Callable[[], np.ndarray], like: ir.Value, name: str) -> ir.Value:
        """A new initializer of the dtype and shape of a constant, computed only when somebody reads it.

        Small ones are computed at once. Large ones are not kept, so that folded weights never stand beside the
        original ones in memory as a whole.
        """
        tensor = like.const_value
        if tensor is None:
            return self.constant(compute(), name, like.dtype)
        return self.later(compute, tensor.dtype, [int(size) for size in tensor.shape.numpy()], name)

    def later(self, compute: Callable[[], np.ndarray], dtype: ir.DataType, dims: Sequence[int], name: str) -> ir.Value:
        """A new initializer of this dtype and shape, computed as in `lazy`."""
        if math.prod(dims) * dtype.bitwidth <= 8 * _EAGER_BYTES:
            return self.constant(compute(), name, dtype)
        name = self.fresh(name)
        shape = ir.Shape(dims)
        lazy = ir.LazyTensor(lambda: ir.Tensor(compute(), dtype=dtype, name=name), dtype, shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)
        self.graph.register_initializer(value)
        return value

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeInput] | None = None,
        *,
        like: ir.Value,
        shape: Sequence[int | ir.SymbolicDim] | None = None,
        dtype: ir.DataType | None = None,
        name: str = "",
    ) -> ir.Value:
        """A new node of one output before `before`; the output is typed as `like` unless told otherwise."""
        label = self.fresh(name or f"{like.name}.{op_type}")
        output = ir.Value(
            name=label,
            type=ir.TensorType(dtype) if dtype else like.type,
            shape=ir.Shape(shape) if shape is not None else like.shape,
        )
        version = self.graph.opset_imports.get("")
        made = ir.node(op_type, list(inputs), dict(attributes or {}), outputs=[output], name=label, version=version)
        self.graph.insert_before(before, made)
        return output

    def replace(self, value: ir.Value, by: ir.Value) -> None:
        """Let everything that uses `value` use `by`; a graph output keeps its name."""
        if not value.is_graph_output():
            value.replace_all_uses_with(by)
            return
        producer = by.producer()
        if producer is not None and producer.graph is self.graph and not by.is_graph_output():
            name = value.name
            value.replace_all_uses_with(by, replace_graph_outputs=True)
            value.name, by.name = self.fresh(f"{name}.old"), name
            return
        old = value.producer()
        assert old is not None
        if old.op_type == "Identity" and old.domain == "" and old.inputs[0] is by:
            for user, index in tuple(value.uses()):
                user.replace_input_with(index, by)
            return
        copy = self.insert(old, "Identity", [by], like=value)
        name = value.name
        value.replace_all_uses_with(copy, replace_graph_outputs=True)
        value.name, copy.name = self.fresh(f"{name}.old"), name


def used(node: ir.Node) -> bool:
    """Whether anything uses an output of the node."""
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def only_use(value: ir.Value) -> bool:
    """Whether exactly one input of one node uses the value, and the graph does not give it out."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def array(value: ir.Value | None) -> np.ndarray | None:
    """The value of a constant, else None. Large weights are mapped, not copied."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant of a single element, else None."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    if value.dtype == ir.DataType.STRING:
        return None
    return float(value.const_value.numpy().reshape(()))


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of a node, None if absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def ints(node: ir.Node, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    attribute = node.attributes.get(name)
    return tuple(default) if attribute is None else tuple(attribute.as_ints())


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard node that computes `value` if it is one of `op_types`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None
