"""Convolutions and matrix products as terms of a sum."""

from __future__ import annotations

import numpy as np

from nestc.graph.region import Op
from nestc.targets.vta.layers_values import Constant, Refused, Source, Term


def integers(op: Op, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    value = op.attributes.get(name, default)
    assert isinstance(value, tuple)
    return tuple(int(x) for x in value) if value else default


def window(op: Op, kernel: tuple[int, ...]) -> tuple[tuple[int, int], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Strides, taps and pads (top, left, bottom, right) of a window operator of one or two axes, as of two."""
    if len(kernel) not in (1, 2):
        raise Refused(f"{op.op_type} has {len(kernel)} spatial axes; VTA's maps have one or two")
    if op.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
        raise Refused(f"{op.op_type} has pads that are not given as numbers")
    axes = len(kernel)
    strides, dilations = (integers(op, name, (1,) * axes) for name in ("strides", "dilations"))
    pads = integers(op, "pads", (0,) * (2 * axes))
    if axes == 1:
        kernel, strides, dilations, pads = (1, *kernel), (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    taps = tuple(
        (y * dilations[0] - pads[0], x * dilations[1] - pads[1]) for y in range(kernel[0]) for x in range(kernel[1])
    )
    return (strides[0], strides[1]), taps, pads


def convolution(op: Op, x: Source, weights: Constant) -> Term:
    """A Conv without its bias: kernels [o, i / group, kh, kw] or [o, i / group, k], a scale for each o or for all."""
    strides, taps, _ = window(op, weights.shape[2:])
    group = op.attributes.get("group", 1)
    assert isinstance(group, int)
    count, width = weights.shape[:2]
    outs = np.arange(count)
    ins = None
    if group > 1:
        ins = (outs // (count // group) * width)[:, None] + np.arange(width)
    kernels = _narrow(weights.integers.reshape(count, width, -1))
    return Term(x.map, strides, taps, outs, ins, kernels, _exponents(weights, 0, count) + x.exponent)


def matrix_product(x: Source, weights: Constant, transposed: bool) -> Term:
    """A matrix [m, k] times constant [k, n], or [n, k] if `transposed`; a scale for each n or for all."""
    matrix = weights.integers if transposed else weights.integers.T
    count = matrix.shape[0]
    exponents = _exponents(weights, 0 if transposed else 1, count) + x.exponent
    return Term(x.map, (1, 1), ((0, 0),), np.arange(count), None, _narrow(matrix[:, :, None]), exponents)


def _narrow(weights: np.ndarray) -> np.ndarray:
    """The same integers in 8 bits if they fit, so that large layers take little memory."""
    fits = int(weights.min(initial=0)) >= -128 and int(weights.max(initial=0)) <= 127
    return weights.astype(np.int8) if fits else weights


def _exponents(weights: Constant, axis: int, count: int) -> np.ndarray:
    """The exponent of each slice along the axis of output channels."""
    if not weights.quantized:
        raise Refused(f"weights {weights.name!r} are not quantized: quantize with scheme int8-pow2")
    exponents = weights.exponents
    if exponents.ndim and exponents.shape[axis] != exponents.size:
        raise Refused(f"weights {weights.name!r} have scales along another axis than their output channels")
    return np.broadcast_to(exponents.reshape(-1), (count,)).astype(np.int64)
