"""The model that the quantizer works on: simplified, deterministic, every node and tensor with a name of its own."""

from __future__ import annotations

import onnx_ir.passes.common as common

from nestc.graph import pipeline
from nestc.graph.model import Model, unbound_dims


def prepare(model: Model) -> Model:
    """A copy of `model` as calibration, overrides, reports and the quantized model see it; the same for the same model.

    Static shapes are simplified by the whole pipeline (batch normalizations folded, composites fused); with open
    dimensions only by the passes that no size enters, so that the dimensions stay open. Every node has a unique name.
    """
    prepared = pipeline.simplify(model) if unbound_dims(model) else pipeline.optimize(model)
    common.NameFixPass()(prepared.ir)
    _name_nodes(prepared)
    return prepared


def _name_nodes(model: Model) -> None:
    """Name the nodes without a name after their first output, which is unique already."""
    taken = {node.name for node in model.ir.graph if node.name}
    for node in model.ir.graph:
        if node.name:
            continue
        name = node.outputs[0].name or node.op_type
        while name in taken:
            name += "_"
        node.name = name
        taken.add(name)
