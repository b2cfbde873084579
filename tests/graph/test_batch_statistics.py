"""Batch normalization in training mode becomes plain operators that compute what the reference evaluator does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graph_support import assert_same, parse, run
from onnx.reference import ReferenceEvaluator

from nestc.graph import pipeline


def test_batch_normalization_by_its_own_statistics() -> None:
    text = """g (float[4,3,5] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[4,3,5] y, float[3] n, float[3] w) {
        y, n, w = BatchNormalization <training_mode = 1, momentum = 0.75, epsilon = 0.01> (x, s, b, m, v) }"""
    model = parse(text)
    random = np.random.default_rng(0)
    feeds = {name: random.uniform(0.5, 2, shape).astype(np.float32) for name, (_, shape) in model.inputs.items()}
    lowered = pipeline.optimize(model)
    assert "BatchNormalization" not in {node.op_type for node in lowered.ir.graph}
    wanted = ReferenceEvaluator(ir.to_proto(model.ir)).run(None, feeds)
    assert_same(list(wanted), run(lowered, feeds))
