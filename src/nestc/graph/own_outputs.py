"""Make every graph output the result of a node, so that a region computes it."""

from __future__ import annotations

import onnx_ir as ir

from nestc.graph.model import Model


def own_outputs(model: Model) -> Model:
    """A copy in which an output that is a constant (folding can make any so) is copied by an Identity.

    An output that is an input needs no copy: the runtime passes it on.
    """
    owned = model.clone()
    graph = owned.ir.graph
    for index, value in enumerate(graph.outputs):
        if not value.is_initializer() or value.name is None:
            continue
        name = value.name
        del graph.initializers[name]
        value.name = f"{name}.constant"
        graph.initializers[value.name] = value
        copy = ir.Node("", "Identity", [value], name=f"{name}.copy")
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
        graph.append(copy)
        graph.outputs[index] = copy.outputs[0]
    return owned
