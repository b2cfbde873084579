"""Let a node compute every graph output, so that each belongs to a region."""

from __future__ import annotations

import onnx_ir as ir


class OwnOutputs(ir.passes.InPlacePass):
    """Put an Identity before an output that is a weight, or given out twice."""

    def __init__(self, notes: list[str] | None = None) -> None:
        super().__init__()
        self.notes = [] if notes is None else notes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        names = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
        names |= {value.name for value in graph.inputs}
        seen: set[ir.Value] = set()
        changed = False
        for value in graph.outputs:
            _complete(graph, value)
        for index, value in enumerate(graph.outputs):
            # An input given out as it is keeps its name, which is part of the interface; the runtime passes it on.
            if (value.producer() is not None or value.is_graph_input()) and value not in seen:
                seen.add(value)
                continue
            label = value.name
            copy = ir.Value(name=label, type=value.type, shape=value.shape)
            version = graph.opset_imports.get("")
            node = ir.node("Identity", [value], outputs=[copy], name=f"{label}.output", version=version)
            graph.append(node)
            graph.outputs[index] = copy
            if value.is_graph_input() or value.producer() is not None:
                # The first one keeps the name, so that the second gets another.
                copy.name = f"{label}.copy" if f"{label}.copy" not in names else f"{label}.copy.{index}"
            else:
                value.name = f"{label}.value"
            names.add(copy.name)
            changed = True
        if changed:
            self.notes.append("outputs that are constants copied")
        return ir.passes.PassResult(model, changed)


def _complete(graph: ir.Graph, value: ir.Value) -> None:
    """Make a weight of an output that a Constant node computes, and give a weight the shape of its tensor."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and not producer.domain:
        tensor = ir.convenience.get_const_tensor(value, propagate_shape_type=True)
        if tensor is None:
            return
        kept = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)
        value.name = f"{value.name}.lifted"
        value.replace_all_uses_with(kept, replace_graph_outputs=True)
        graph.remove(producer, safe=True)
        graph.register_initializer(kept)
        value = kept
    if value.const_value is not None and value.is_initializer():
        value.shape = ir.Shape(value.const_value.shape.numpy())
