"""Scales of weights: powers of two are the best of all powers of two, others the best of the grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.quant.scheme import Format
from nestc.quant.weights import SHRINK, weight_scales


def squared_error(values: np.ndarray, scale: float, format: Format) -> float:
    rounded = np.clip(np.rint(values / np.float32(scale)), format.low, format.high) * np.float32(scale)
    return float(np.square(rounded - values, dtype=np.float64).sum())


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999), per_channel=st.booleans(), size=st.floats(1e-3, 1e3), tail=st.integers(1, 9),
    dtype=st.sampled_from(["int8", "int4"]),
)  # fmt: skip
def test_powers_of_two_are_the_best_of_an_exhaustive_search(
    seed: int, per_channel: bool, size: float, tail: int, dtype: str
) -> None:
    random = np.random.default_rng(seed)
    values = (size * random.standard_normal((4, 3, 3, 3)) ** tail).astype(np.float32)
    format = Format(dtype, per_channel=per_channel, pow2=True, narrow=True)  # pyright: ignore[reportArgumentType]
    scales = weight_scales(values, format, 0, "mse")
    rows = values.reshape(4, -1) if per_channel else values.reshape(1, -1)
    for row, scale in zip(rows, scales.reshape(-1), strict=True):
        assert np.exp2(np.rint(np.log2(scale))) == scale
        candidates = 2.0 ** np.arange(-60.0, 40.0)
        least = min(squared_error(row, float(each), format) for each in candidates)
        assert squared_error(row, float(scale), format) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
def test_other_scales_are_the_best_of_the_grid(per_channel: bool) -> None:
    values = (np.random.default_rng(0).standard_normal((4, 27)) ** 3).astype(np.float32)
    format = Format("int4", per_channel=per_channel, narrow=True)
    scales = weight_scales(values, format, 0, "mse").reshape(-1)
    for row, scale in zip(values if per_channel else values.reshape(1, -1), scales, strict=True):
        grid = [np.abs(row).max() / 7 * shrink for shrink in SHRINK]
        least = min(squared_error(row, float(each), format) for each in grid)
        assert squared_error(row, float(scale), format) == pytest.approx(least, rel=1e-4)
