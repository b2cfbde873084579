"""Pooling: where windows lie, how many elements each averages, and the steps of a maximum."""

from __future__ import annotations

import numpy as np

from nestc.graph.region import Op, Region
from nestc.targets.vta.layer import Maximum
from nestc.targets.vta.layers_linear import integers, window
from nestc.targets.vta.layers_values import Refused, Source, Term


def maximum(op: Op, x: Source) -> Maximum:
    """The maximum of a MaxPool or GlobalMaxPool; elements outside the map take no part."""
    if len(op.outputs) > 1 and op.outputs[1]:
        raise Refused("MaxPool gives indices too; VTA gives only values")
    strides, taps, _ = _window(op, x)
    return Maximum(x.map.name, strides, taps)


def average(op: Op, x: Source, output: tuple[int, ...]) -> tuple[Term, int]:
    """The sum of an AveragePool or GlobalAveragePool, whose result has shape `output`, and its divisor.

    Raises Refused if windows at the border average fewer elements than others.
    """
    strides, taps, pads = _window(op, x)
    height, width = (x.map.height, x.map.width)
    rows, columns = (1, output[2]) if len(output) == 3 else output[2:]
    padded = bool(op.attributes.get("count_include_pad", 0))
    tops, lefts = sorted({y for y, _ in taps}), sorted({x for _, x in taps})
    counts = [
        _counts(rows, strides[0], tops, height, pads[0] if padded else 0, pads[2] if padded else 0),
        _counts(columns, strides[1], lefts, width, pads[1] if padded else 0, pads[3] if padded else 0),
    ]
    if any(len(found) > 1 for found in counts):
        raise Refused(f"{op.op_type} divides by fewer elements at the border, and VTA has one divisor for all places")
    lanes = np.arange(x.map.channels)
    weights = np.ones((len(lanes), 1, len(taps)), np.int64)
    exponents = np.full(len(lanes), x.exponent, np.int64)
    term = Term(x.map, strides, taps, lanes, lanes[:, None], weights, exponents)
    return term, counts[0].pop() * counts[1].pop()


def is_spatial_mean(op: Op, region: Region) -> bool:
    """Whether a ReduceMean averages exactly the axes behind the channels."""
    rank = len(region.types[op.inputs[0]].shape)
    listed = region.constant(op.input(1)) if op.input(1) else None
    axes = integers(op, "axes", ()) if listed is None else tuple(int(axis) for axis in listed.reshape(-1))
    return rank in (3, 4) and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _window(op: Op, x: Source) -> tuple[tuple[int, int], tuple[tuple[int, int], ...], tuple[int, ...]]:
    if op.op_type.startswith("Global") or op.op_type == "ReduceMean":
        taps = tuple((y, column) for y in range(x.map.height) for column in range(x.map.width))
        return (1, 1), taps, (0, 0, 0, 0)
    return window(op, integers(op, "kernel_shape", ()))


def _counts(places: int, stride: int, taps: list[int], size: int, before: int, after: int) -> set[int]:
    """How many taps lie inside the map and what counts of its padding, over all places of an axis."""
    found: set[int] = set()
    for place in range(places):
        found.add(sum(-before <= place * stride + tap < size + after for tap in taps))
    return found
