"""The order of the L1 passes, and why each stands where it stands."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from nestc.graph.decompose import expand
from nestc.graph.infer_shapes import InferShapes
from nestc.graph.model import Model, require_static
from nestc.graph.passes.cancel import Cancel
from nestc.graph.passes.fold_affine import FoldAffine, LowerBatchNormalization
from nestc.graph.passes.fold_constants import FoldConstants, LiftConstants
from nestc.graph.passes.fuse_activation import FuseActivation
from nestc.graph.passes.fuse_attention import FuseAttention
from nestc.graph.passes.fuse_normalization import FuseNormalization
from nestc.graph.passes.fuse_pad import FusePad
from nestc.graph.passes.implied_clamps import ImpliedClamps
from nestc.graph.passes.integer_moves import IntegerMoves
from nestc.graph.passes.integer_operators import IntegerOperators
from nestc.graph.passes.own_dequantize import NarrowViews, OwnDequantize
from nestc.graph.passes.own_outputs import OwnOutputs
from nestc.graph.passes.quantized_weights import DequantizeWeights, QuantizeWeights
from nestc.graph.passes.simplify import Simplify
from nestc.graph.passes.sink import Sink
from nestc.graph.passes.trim_taps import TrimTaps
from nestc.graph.passes.unroll import UnrollAll
from nestc.graph.quiet import quiet

_BROKEN = frozenset({"MeanVarianceNormalization"})
"""Composites whose shape onnx 1.23 and ONNX Runtime 1.32 cannot infer inside a function, so inside a region."""

_SMALL = 16
"""Elements up to which equal constants become one: scales and zero points, not weights."""


def passes(notes: list[str]) -> list[ir.passes.PassBase]:
    """The passes in order; each leaves valid ONNX with the same results."""
    return [
        # One form of constant for all that follows.
        LiftConstants(),
        # Shapes become constants here, and inference after it sees every Reshape's operand.
        FoldConstants(notes),
        InferShapes(),
        # Loops of known length once shapes are known; what is constant in each step is folded, and so are inner loops.
        UnrollAll(notes),
        # One form of quantized operator for all that follows, before anything looks at Conv or MatMul.
        IntegerOperators(notes),
        # Integer weights from the float ones that training exports; equal scales are one value, so that CSE sees it.
        QuantizeWeights(notes),
        common.DeduplicateInitializersPass(size_limit=_SMALL),
        # No-ops first, so that later patterns need not look through them.
        Simplify(notes),
        common.CommonSubexpressionEliminationPass(),
        # Composites while their parts still stand as the exporter wrote them: folding below would take parts away.
        FuseNormalization(notes),
        FuseAttention(notes),
        FuseActivation(notes),
        # Transposes meet only after they have sunk, and may sink further once a pair has gone.
        ir.passes.PassManager([Cancel(notes), Sink(notes), Simplify(notes)], steps=8),
        # Before FoldAffine, which leaves alone a shift in front of a padded convolution.
        FusePad(notes),
        # Once all padding is the convolution's own; FoldAffine can do more where none is left.
        TrimTaps(notes),
        # After FusePad, which wants the padding beside the convolution, not on the integers. What meets on integers may
        # cancel there, and then more can move.
        ir.passes.PassManager([IntegerMoves(notes), Cancel(notes), Simplify(notes)], steps=8),
        ImpliedClamps(notes),
        # Once it is seen which activations are quantized; before FoldAffine, which folds into float weights only.
        DequantizeWeights(notes),
        FoldAffine(notes),
        # What could not be folded becomes elementwise, so that regions can take it in.
        LowerBatchNormalization(notes),
        # The folded weights may be shared constants again, and dead ones must not reach the bundle.
        FoldConstants(notes),
        common.RemoveUnusedNodesPass(),
        NarrowViews(notes),
        # After the last pass that shares equal nodes.
        OwnDequantize(notes),
        InferShapes(),
        # Last, since folding may turn an output into a constant.
        OwnOutputs(notes),
    ]


def optimize(model: Model) -> Model:
    """Run all passes over a copy of `model`; its inputs need static shapes.

    Raises `ShapeError` for an input with a dimension that has no size.
    """
    require_static(model)
    broken = [node.name or "" for node in model.ir.graph if node.op_type in _BROKEN and not node.domain]
    optimized = expand(model, broken)
    with quiet("onnxscript", "onnx_ir"):
        for step in passes(optimized.notes):
            step(optimized.ir)
    return optimized
