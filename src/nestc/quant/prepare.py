"""The model that the quantizer works on: simplified, deterministic, every node and tensor with a name of its own."""

from __future__ import annotations

import onnx_ir.passes.common as common

from nestc.graph.model import Model
from nestc.graph.passes.affine_convolutions import AffineToConvolution
from nestc.graph.pipeline import passes
from nestc.graph.quiet import quiet


def prepare(model: Model) -> Model:
    """A copy of `model` as calibration, overrides, reports and the quantized model see it; the same for the same model.

    Constants and batch normalizations are folded and composites fused; open dimensions stay open, since every pass
    leaves alone what depends on a size that is not known. Normalizations that nothing took in are convolutions, which
    `nestc.quant.apply` undoes where they stay float. Every node has a name, which no other has.
    """
    prepared = model.clone()
    with quiet("onnxscript", "onnx_ir"):
        for step in passes(prepared.notes):
            step(prepared.ir)
        AffineToConvolution(prepared.notes)(prepared.ir)
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
