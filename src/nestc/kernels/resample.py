"""Where a Resize reads: for each axis the input positions and weights of every output, computed when compiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isclose

import numpy as np

from nestc.graph.region import Op, Region

MODES = frozenset(
    "half_pixel half_pixel_symmetric pytorch_half_pixel align_corners asymmetric tf_crop_and_resize"
    " tf_half_pixel_for_nn".split()
)


@dataclass(frozen=True)
class Axis:
    """Taps of one axis: output o is the sum over k of ``weights[o, k] * input[positions[o, k]]``.

    Every position is inside the input. Where ``outside[o]``, the result is the extrapolation value instead.
    """

    positions: np.ndarray
    weights: np.ndarray
    outside: np.ndarray

    @property
    def taps(self) -> int:
        """Number of taps of an output."""
        return self.positions.shape[1]


@dataclass(frozen=True)
class Resampling:
    """A whole Resize: the axes it changes, by number; ``nearest`` if values are only copied."""

    axes: dict[int, Axis]
    nearest: bool
    extrapolation: float


def resampling(op: Op, region: Region) -> Resampling | str:
    """Read a Resize or Upsample node; a sentence where it cannot be compiled."""
    where = f"{op.op_type} (node {op.name!r})"
    size, out = region.types[op.inputs[0]].shape, region.types[op.outputs[0]].shape
    rank = len(size)
    mode = str(op.attributes.get("mode", "nearest"))
    mode = "linear" if mode in ("bilinear", "trilinear") else mode
    old = op.op_type == "Upsample" or len(op.inputs) == 2  # before opset 11: scales only
    transform = str(op.attributes.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"))
    if mode not in ("nearest", "linear", "cubic") or transform not in MODES:
        return f"{where} has mode {mode!r} with {transform!r}"
    given = op.attributes.get("axes")
    axes = [int(a) % rank for a in given] if isinstance(given, tuple) and given else list(range(rank))
    scales = _scales(op, region, axes, old)
    if isinstance(scales, str):
        return f"{where}: {scales}"
    roi = np.concatenate([np.zeros(rank), np.ones(rank)]).astype(np.float32)
    if transform == "tf_crop_and_resize":
        value = region.constant(op.input(1))
        if value is None or value.size != 2 * len(axes):
            return f"{where} needs a constant region of interest"
        for i, axis in enumerate(axes):
            roi[axis], roi[rank + axis] = value[i], value[len(axes) + i]
    found: dict[int, Axis] = {}
    for axis, scale in zip(axes, scales):
        span = (float(roi[axis]), float(roi[rank + axis]))
        if isclose(scale, 1.0) and size[axis] == out[axis] and span == (0.0, 1.0):
            continue
        x, outside = _coordinates(transform, size[axis], out[axis], np.float32(scale), span)
        if mode == "nearest":
            rounding = str(op.attributes.get("nearest_mode", "floor" if old else "round_prefer_floor"))
            found[axis] = _nearest(x, size[axis], rounding, outside)
        else:
            found[axis] = _filtered(op, mode, x, size[axis], float(scale), outside)
    extrapolation = op.attributes.get("extrapolation_value", 0.0)
    assert isinstance(extrapolation, (int, float))
    return Resampling(found, mode == "nearest", float(extrapolation))


def _scales(op: Op, region: Region, axes: Sequence[int], old: bool) -> Sequence[float] | str:
    """The factor of each axis in `axes`, in float32 as ONNX Runtime computes it."""
    size = region.types[op.inputs[0]].shape
    given = op.attributes.get("scales")
    if isinstance(given, tuple):
        return [float(s) for s in given]
    scales = op.input(1) if old else op.input(2)
    if scales and region.types[scales].shape != (0,):
        value = region.constant(scales)
        return "its scales are not constant" if value is None else [float(s) for s in value.reshape(-1)]
    if not op.input(3):
        return "it has neither scales nor sizes"
    value = region.constant(op.input(3))
    if value is None:
        return "its sizes are not constant"
    factors = [float(np.float32(n) / np.float32(size[axis])) for n, axis in zip(value.reshape(-1), axes)]
    policy = op.attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "not_larger":
        return [min(factors)] * len(factors)
    return [max(factors)] * len(factors) if policy == "not_smaller" else factors


def _coordinates(
    transform: str, size: int, out: int, scale: np.float32, roi: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Input coordinate of each output (float32, as ONNX Runtime computes it), and which lie outside the image."""
    y = np.arange(out, dtype=np.float32)
    half, one = np.float32(0.5), np.float32(1)
    width = scale * np.float32(size)
    inside = np.zeros(out, bool)
    if transform == "align_corners":
        return (y * 0 if width == one else y * np.float32(size - 1) / (width - one)), inside
    if transform == "asymmetric":
        return y / scale, inside
    if transform == "tf_half_pixel_for_nn":
        return (y + half) / scale, inside
    if transform == "tf_crop_and_resize":
        start, end = np.float32(roi[0]), np.float32(roi[1])
        last = np.float32(size - 1)
        if width == one or out == 1:
            x = np.full(out, half * (start + end) * last, np.float32)
        else:
            x = start * last + y * (end - start) * last / (width - one)
        return x, (x < 0) | (x > last)
    if transform == "pytorch_half_pixel" and out == 1:
        return y * 0, inside
    x = (y + half) / scale - half
    if transform == "half_pixel_symmetric":
        x += np.float32(size) * half * (one - np.float32(out) / width)
    return x, inside


def _nearest(x: np.ndarray, size: int, rounding: str, outside: np.ndarray) -> Axis:
    rounded = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_ceil": lambda v: np.floor(v + np.float32(0.5)),
        "round_prefer_floor": lambda v: np.ceil(v - np.float32(0.5)),
    }[rounding](x)
    positions = np.clip(rounded, 0, size - 1).astype(np.int64)[:, None]
    return Axis(positions, np.ones(positions.shape), outside)


def _filtered(op: Op, mode: str, x: np.ndarray, size: int, scale: float, outside: np.ndarray) -> Axis:
    """Linear or cubic taps; with `antialias` the filter is as wide as the outputs lie apart. Edges are repeated."""
    x = x.astype(np.float64)
    support = 1 if mode == "linear" else 2
    shrink = min(scale, 1.0) if op.attributes.get("antialias", 0) else 1.0
    first = floor(-support / shrink) + 1
    steps = np.arange(first, 2 - first)
    base = np.ceil(x) - 1 if shrink < 1 else np.floor(x)
    distance = np.abs(steps[None, :] - (x - base)[:, None]) * shrink
    if mode == "linear":
        weights = np.clip(1 - distance, 0, 1)
    else:
        a = op.attributes.get("cubic_coeff_a", -0.75)
        assert isinstance(a, (int, float))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    positions = base.astype(np.int64)[:, None] + steps[None, :]
    if op.attributes.get("exclude_outside", 0):
        weights = np.where((positions < 0) | (positions >= size), 0.0, weights)
    if op.attributes.get("exclude_outside", 0) or shrink < 1:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    return Axis(np.clip(positions, 0, size - 1), weights, outside)
