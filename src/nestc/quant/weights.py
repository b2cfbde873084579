"""Round weights to integers: a scale a tensor, a channel or a block, by the largest magnitude or by squared error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestc.quant.scheme import Format

Array = NDArray[np.float32]

SMALLEST_SCALE = np.float32(2.0**-100)
"""Scales do not become smaller, so that their products (those of biases) are still normal float32 numbers."""

SHRINK = np.linspace(1.0, 0.4, 25)
"""Fractions of the largest magnitude that the search by squared error tries as threshold."""

_CHUNK = 1 << 18
"""Weights that the search rounds at once, few enough to stay in the cache."""


def weight_scales(values: Array, format: Format, axis: int, method: str) -> Array:
    """Scales of a weight: () a tensor, (n,) a slice along `axis`, or `axis` divided into blocks; never 0.

    `method` ``minmax`` takes the largest magnitude, any other searches the threshold of least squared error (methods
    that look at histograms of activations mean nothing else for a few hundred weights). Slices that are zero get
    scale 1.
    """
    rows = _rows(values, format, axis)
    largest = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    full = largest / format.high
    if format.pow2:
        exponents = np.ceil(np.log2(np.where(full > 0, full, 1.0)))
        candidates = [np.exp2(exponents - less) for less in ((0,) if method == "minmax" else (0, 1, 2, 3))]
    else:
        candidates = [full * shrink for shrink in (SHRINK[:1] if method == "minmax" else SHRINK)]
    best = candidates[0]
    if len(candidates) > 1:
        errors = np.stack([_squared_errors(rows, scale, format) for scale in candidates])
        best = np.take_along_axis(np.stack(candidates), errors.argmin(axis=0)[None], 0)[0]
    scale = np.maximum(np.where(largest > 0, best, 1.0).astype(np.float32), SMALLEST_SCALE)
    return _shaped(scale, values, format, axis)


def round_weights(values: Array, scale: Array, format: Format) -> NDArray[np.generic]:
    """The nearest integers (ties to even, as QuantizeLinear rounds); `scale` is broadcastable. int4 comes in int8."""
    if format.is_float:
        return values
    rounded = np.clip(np.rint(values / scale), format.low, format.high)
    return rounded.astype("int8" if format.dtype == "int4" else format.dtype)


def _squared_errors(rows: Array, scale: NDArray[np.float64], format: Format) -> NDArray[np.float64]:
    """The squared error of each row rounded with its scale."""
    errors = np.zeros(len(rows))
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    safe = np.where(scale > 0, scale, 1.0).astype(np.float32)[:, None]
    for start in range(0, len(rows), step):
        part, by = rows[start : start + step], safe[start : start + step]
        error = part / by
        np.clip(np.rint(error, out=error), format.low, format.high, out=error)
        error *= by
        error -= part
        errors[start : start + step] = np.einsum("ij,ij->i", error, error)
    return errors


def _rows(values: Array, format: Format, axis: int) -> Array:
    """The weights as rows that share a scale; the last block of a row of blocks is filled with zeros."""
    if format.block:
        moved = np.moveaxis(values, axis, -1)
        missing = -moved.shape[-1] % format.block
        padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, missing)])
        return padded.reshape(-1, format.block)
    if format.per_channel:
        return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return values.reshape(1, -1)


def _shaped(scale: Array, values: Array, format: Format, axis: int) -> Array:
    if format.block:
        moved = np.moveaxis(values, axis, -1).shape
        return np.ascontiguousarray(np.moveaxis(scale.reshape(*moved[:-1], -1), -1, axis))
    return scale if format.per_channel else scale.reshape(())
