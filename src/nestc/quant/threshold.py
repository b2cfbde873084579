"""Choose the range that a tensor's integers cover, and from it the scale and the zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nestc.quant.profile import Histogram, TensorStats

if TYPE_CHECKING:
    from nestc.quant.scheme import Format

PERCENTILE = 99.99
"""Percent of the values inside the range that method `percentile` chooses."""


def thresholds(
    stats: TensorStats, format: Format, method: str = "minmax", pow2: bool | None = None, *, percent: float = PERCENTILE
) -> tuple[float, float]:
    """The range (low, high), with low <= 0 <= high, that the integers of `format` are to cover.

    ``method`` is one of `nestc.quant.profile.METHODS`. A symmetric format gets low = -high * (its lowest integer over
    its highest), so that zero point 0 fits; with `pow2` (by default the format's) the scale is a power of two.
    """
    raise NotImplementedError


def scale_zero_point(low: float, high: float, format: Format) -> tuple[np.float32, int]:
    """Scale and zero point of a range: real = scale * (integer - zero_point); the scale is never 0.

    The zero point is in the range of the format's integers, 0 for a symmetric format.
    """
    raise NotImplementedError
