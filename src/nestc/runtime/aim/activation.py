"""Activation functions as the AF command computes them: tables of lines, looked up and interpolated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import erf

import ml_dtypes
import numpy as np

FUNCTIONS = ("relu", "sigmoid", "tanh", "gelu", "identity")
"""What CFR_AF selects, by place."""

SEGMENTS = 512
"""Lines of a table: offset and slope each, 1,024 numbers of 16 bits, which is a row of a bank."""

RANGE = 8.0
"""Lines cover inputs from -RANGE to RANGE; beyond, the function is its asymptote."""

# AiM holds the tables in DRAM and interpolates between entries (Lee et al., ISSCC 2022, "A 1ynm 1.25V 8Gb
# GDDR6-Based Accelerator-in-Memory Supporting 1TFLOPS MAC Operation and Various Activation Functions"). Neither the
# number of entries nor their range is published: these are ours, and fill one row. relu and identity need no table.


def apply(name: str, values: np.ndarray, number: np.dtype[np.generic]) -> np.ndarray:
    """The function of float32 `values`, as float32 before it is rounded to `number`, the format of table entries.

    The line is offset + slope * (x - start of the segment), in float32.
    """
    if name == "identity":
        return values
    if name == "relu":
        return np.maximum(values, np.float32(0))
    offset, slope = _table(name, number.name)
    step = np.float32(2 * RANGE / SEGMENTS)
    inside = np.clip(np.nan_to_num(values, nan=0.0), -RANGE, RANGE)
    index = np.minimum(np.floor((inside + np.float32(RANGE)) / step).astype(np.int64), SEGMENTS - 1)
    start = index.astype(np.float32) * step - np.float32(RANGE)
    lines = offset[index] + slope[index] * (inside - start)
    below, above = _ASYMPTOTES[name]
    result = np.where(values < -RANGE, below(values), np.where(values >= RANGE, above(values), lines))
    return np.where(np.isnan(values), values, result).astype(np.float32)


def exact(name: str, values: np.ndarray) -> np.ndarray:
    """The function itself, in float64."""
    return np.vectorize(_EXACT[name], otypes=[np.float64])(np.asarray(values, np.float64))


@cache
def _table(name: str, number: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and slopes of the lines, rounded to the format of the table: float32 arrays of SEGMENTS."""
    points = np.linspace(-RANGE, RANGE, SEGMENTS + 1)
    y = exact(name, points)
    slopes = np.diff(y) / np.diff(points)
    dtype = np.dtype(ml_dtypes.bfloat16) if number == "bfloat16" else np.dtype(number)
    return y[:-1].astype(dtype).astype(np.float32), slopes.astype(dtype).astype(np.float32)


def _zero(x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x)


def _one(x: np.ndarray) -> np.ndarray:
    return np.ones_like(x)


def _minus_one(x: np.ndarray) -> np.ndarray:
    return -np.ones_like(x)


def _same(x: np.ndarray) -> np.ndarray:
    return x


_Curve = Callable[[np.ndarray], np.ndarray]
_ASYMPTOTES: dict[str, tuple[_Curve, _Curve]] = {
    "sigmoid": (_zero, _one),
    "tanh": (_minus_one, _one),
    "gelu": (_zero, _same),
}
_EXACT: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: float(1 / (1 + np.exp(-x))) if x >= 0 else float(np.exp(x) / (1 + np.exp(x))),
    "tanh": lambda x: float(np.tanh(x)),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / 2**0.5)),
    "identity": lambda x: x,
}
