"""How far two engines' outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference, and largest difference relative to the scale (largest magnitude) of its output."""

    max_abs: float
    max_rel: float


def difference(reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Difference:
    """Compare outputs in order. Infinite where number, shapes, or the places of NaN and infinity disagree."""
    if [a.shape for a in reference] != [b.shape for b in outputs]:
        return Difference(float("inf"), float("inf"))
    absolute = relative = 0.0
    for a, b in zip(reference, outputs, strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            return Difference(float("inf"), float("inf"))
        worst = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
        scale = float(np.abs(x[finite]).max(initial=0.0))
        absolute = max(absolute, worst)
        relative = max(relative, worst / scale if scale else (0.0 if worst == 0.0 else float("inf")))
    return Difference(absolute, relative)
