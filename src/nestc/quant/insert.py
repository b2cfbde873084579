"""New constants and elementwise operators in a float model, each under a name of its own."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from nestc.graph.model import Model


def constant(model: Model, values: np.ndarray, name: str) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(np.ascontiguousarray(values).reshape(values.shape), name=_fresh(model, name))
    made = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor
    )
    model.ir.graph.register_initializer(made)
    return made


def follow(
    model: Model, node: ir.Node, op_type: str, operand: ir.Value, readers: Collection[ir.Node] | None = None
) -> ir.Value:
    """Put an elementwise operator with a constant behind a node's first output, in front of `readers` (None: all).

    Returns its result. Where all that followed the node reads the result, that takes over the name of the output.
    """
    graph, result = model.ir.graph, node.outputs[0]
    label = _fresh(model, f"{node.name}.{op_type}")
    output = ir.Value(name=_fresh(model, f"{result.name}.{op_type}"), type=result.type, shape=result.shape)
    made = ir.node(op_type, [result, operand], outputs=[output], name=label, version=graph.opset_imports.get(""))
    for user, index in tuple(result.uses()):
        if user is not made and (readers is None or user in readers):
            user.replace_input_with(index, output)
    graph.insert_after(node, made)
    if readers is None:
        result.name, output.name = output.name, result.name
    return output


def _fresh(model: Model, name: str) -> str:
    """A name that no value and no node of the main graph has."""
    graph = model.ir.graph
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
    taken |= {value.name for value in graph.inputs} | {node.name for node in graph.all_nodes()}
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}.{count}", count + 1
    return candidate
