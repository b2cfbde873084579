"""Random small models compute what ONNX Runtime computes without its optimisations, on one thread and on two."""

from __future__ import annotations

import numpy as np
import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import random_model

import nestc


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), threads=st.sampled_from([1, 2]))
def test_as_onnxruntime(seed: int, threads: int) -> None:
    model, feeds = random_model(seed)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with nestc.compile(model, threads=threads) as executable:
        found = executable.run(feeds)
        assert not executable.fallback_ops
    for info, want in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        got = found[info.name]
        assert got.shape == want.shape
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale, err_msg=info.name)
