"""Bounds in front of QuantizeLinear that its saturation makes superfluous."""

from __future__ import annotations

import numpy as np
import pytest
from qdq_support import HEAD, run
from quant_nets import parsed

from nestc.quant.saturate import drop_saturated

BOUNDED = """
bounded (float[2, 3] x) => (int8[2, 3] y) {
  low = Max (x, least)
  high = Min (low, most)
  y = QuantizeLinear (high, scale, zero)
}
"""


@pytest.mark.parametrize(
    ("least", "most", "dropped"),
    [(-70.0, 63.5, 2), (-70.0, 70.0, 2), (-70.0, 63.0, 0), (-60.0, 70.0, 1), (-64.0, 80.0, 2)],
)
def test_only_bounds_outside_the_integers_go(least: float, most: float, dropped: int) -> None:
    zero, scale = np.zeros((), np.int8), np.asarray(0.5, np.float32)
    model = parsed(
        f"{HEAD} {BOUNDED}",
        zero=zero,
        scale=scale,
        least=np.full(3, least, np.float32),
        most=np.full(3, most, np.float32),
    )
    x = np.linspace(-90, 90, 6).astype(np.float32).reshape(2, 3)
    before = run(model, {"x": x})["y"]
    assert drop_saturated(model) == dropped
    assert np.array_equal(run(model, {"x": x})["y"], before)
    left = [node.op_type for node in model.ir.graph if node.op_type in ("Min", "Max")]
    assert len(left) == 2 - dropped
