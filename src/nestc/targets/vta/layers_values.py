"""Values while a region is read: integer maps, exact constants, and sums of sparse products that have no code yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region
from nestc.targets.vta.layer import FeatureMap

ABSENT = 1 << 20
"""Exponent of a channel that a term adds nothing to."""


class Refused(UnsupportedOp):
    """VTA does not take a region; the message is the reason shown to the user."""


def feature_map(name: str, shape: tuple[int, ...]) -> FeatureMap:
    """The map that a value of an ONNX shape is: [n, c, h, w], [n, c, w] or a matrix [m, k]."""
    if len(shape) == 4:
        return FeatureMap(name, *shape)
    if len(shape) == 3:
        return FeatureMap(name, shape[0], shape[1], 1, shape[2])
    if len(shape) == 2:
        return FeatureMap(name, 1, shape[1], 1, shape[0])
    raise Refused(f"value {name!r} of shape {list(shape)} is neither a matrix nor a map of channels")


@dataclass(frozen=True, eq=False)
class Reals:
    """Exact numbers ``integers * 2**exponent`` (integers: an array of Python integers, of any size)."""

    integers: np.ndarray
    exponent: int

    @staticmethod
    def of(integers: np.ndarray, exponents: np.ndarray) -> Reals:
        """integers * 2**exponents, elementwise (shapes that broadcast)."""
        whole, powers = np.broadcast_arrays(integers.astype(object), exponents)
        used = powers[whole != 0]
        least = int(used.min()) if used.size else 0
        shifts = np.maximum(powers - least, 0).astype(object)
        return Reals(np.asarray(whole * (2**shifts), object).reshape(whole.shape), least)

    def plus(self, other: Reals) -> Reals:
        """The sum, elementwise."""
        least = min(self.exponent, other.exponent)
        a, b = (r.integers * 2 ** (r.exponent - least) for r in (self, other))
        return Reals(np.asarray(a + b, object), least)

    def times(self, other: Reals) -> Reals:
        """The product, elementwise."""
        return Reals(np.asarray(self.integers * other.integers, object), self.exponent + other.exponent)

    def floor_at(self, exponents: np.ndarray) -> np.ndarray:
        """floor(x / 2**exponents) as integers of any size."""
        shifts = (np.asarray(exponents) - self.exponent).astype(object)
        up, down = 2 ** np.maximum(-shifts, 0), 2 ** np.maximum(shifts, 0)
        return np.asarray(self.integers * up // down, object)

    def is_at(self, exponents: np.ndarray) -> np.ndarray:
        """Whether x is a multiple of 2**exponents, elementwise."""
        down = 2 ** np.maximum((np.asarray(exponents) - self.exponent).astype(object), 0)
        return np.asarray(self.integers % down == 0, bool)


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant operand: ``integers * 2**exponents`` (of ONNX's shape; exponents broadcast to it).

    ``quantized``: it came through a DequantizeLinear; else from float32.
    """

    name: str
    integers: np.ndarray
    exponents: np.ndarray
    quantized: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """ONNX shape."""
        return self.integers.shape

    def channels(self, rank: int, count: int) -> Reals:
        """The constant as one number a channel, for a value of `rank` whose axis 1 has `count` channels.

        Raises Refused if it varies along other axes.
        """
        shape = (1,) * (rank - len(self.shape)) + self.shape
        along = shape[min(1, rank - 1)]
        if len(shape) > rank or int(np.prod(shape)) != along or along not in (1, count):
            raise Refused(f"constant {self.name!r} of shape {list(self.shape)} varies along more than the channels")
        powers = np.broadcast_to(self.exponents, self.shape).reshape(-1)
        reals = Reals.of(self.integers.reshape(-1), powers)
        return Reals(np.broadcast_to(reals.integers, (count,)), reals.exponent)


@dataclass(frozen=True, eq=False)
class Source:
    """An int8 map in memory; its real value is ``integer * 2**exponent``. ``shape`` is ONNX's."""

    map: FeatureMap
    shape: tuple[int, ...]
    exponent: int = 0


@dataclass(frozen=True, eq=False)
class Term:
    """A product that is added to a sum: acc[outs[n]] += weights[n, j, tap] * source[ins[n, j]] at the taps.

    ``ins`` None: every output channel in order, from every channel of the source. ``weights`` are integers of any
    width, (n, j, taps). ``exponents`` (int64, one an output channel): the unit of the products is 2**exponent; ABSENT
    where nothing is added.
    """

    source: FeatureMap
    strides: tuple[int, int]
    taps: tuple[tuple[int, int], ...]
    outs: np.ndarray
    ins: np.ndarray | None
    weights: np.ndarray
    exponents: np.ndarray

    def largest(self, channels: int) -> np.ndarray:
        """The largest magnitude among the weights of each output channel, int64."""
        found = np.zeros(channels, np.int64)
        flat = self.weights.reshape(len(self.outs), -1).astype(np.int64, copy=False)
        np.maximum.at(found, self.outs, np.abs(flat).max(axis=1, initial=0))
        return found

    def reach(self, channels: int, low: int = -128, high: int = 127) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the products' sum for each output channel, int64, where the source is within low .. high."""
        flat = self.weights.reshape(len(self.outs), -1)
        positive = np.maximum(flat, 0).sum(axis=1, dtype=np.int64)
        negative = np.minimum(flat, 0).sum(axis=1, dtype=np.int64)
        least, most = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
        # An element outside the source counts as 0, so that 0 is always possible.
        np.add.at(least, self.outs, positive * min(low, 0) + negative * max(high, 0))
        np.add.at(most, self.outs, positive * max(high, 0) + negative * min(low, 0))
        return least, most

    def times(self, factors: np.ndarray) -> Term:
        """The term with the weights of each output channel times an integer (int64, one a channel)."""
        scaled = self.weights.astype(np.int64) * factors[self.outs][:, None, None]
        return Term(self.source, self.strides, self.taps, self.outs, self.ins, scaled, self.exponents)


def identity(source: Source, channels: int, first: int = 0, weight: int = 1) -> Term:
    """The term that adds a source, its channels starting at output channel `first` of `channels`."""
    count = source.map.channels
    lanes = np.arange(count)
    exponents = np.full(channels, ABSENT, np.int64)
    exponents[first : first + count] = source.exponent
    weights = np.full((count, 1, 1), weight, np.int64)
    return Term(source.map, (1, 1), ((0, 0),), lanes + first, lanes[:, None], weights, exponents)


def constant_of(name: str, region: Region) -> Constant | None:
    """A constant of the region as exact numbers: integers as they are, floats by their mantissas."""
    array = region.constant(name)
    if array is None:
        return None
    if array.dtype.kind in "iu":
        return Constant(name, array, np.zeros((), np.int64), False)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise Refused(f"constant {name!r} is not finite")
    mantissas, exponents = np.frexp(values)
    return Constant(name, np.ldexp(mantissas, 53).astype(np.int64), exponents.astype(np.int64) - 53, False)


@dataclass(frozen=True, eq=False)
class Scale:
    """Constant parameters of a QuantizeLinear or DequantizeLinear along `axis`: log2 of the scales, and zero points."""

    exponents: np.ndarray
    zero_points: np.ndarray
    axis: int


def scale_of(op: Op, region: Region) -> Scale:
    """The parameters of a QuantizeLinear or DequantizeLinear. Raises Refused if they do not suit shifts."""
    scales, zeros = region.constant(op.inputs[1]), region.constant(op.input(2))
    label = op.inputs[0] if op.op_type == "DequantizeLinear" else op.outputs[0]
    if scales is None or (op.input(2) and zeros is None):
        raise Refused(f"scale or zero point of {label!r} is computed when the model runs")
    if op.attributes.get("block_size", 0):
        raise Refused(f"value {label!r} has a scale for each block of elements")
    flat = np.asarray(scales, np.float64).reshape(-1)
    mantissas, powers = np.frexp(flat)
    odd = flat[mantissas != 0.5]
    if odd.size:
        raise Refused(f"scale {odd[0]:.6g} of {label!r} is not a power of two: quantize with scheme int8-pow2")
    offsets = np.zeros(flat.size, np.int64) if zeros is None else zeros.astype(np.int64).reshape(-1)
    axis = op.attributes.get("axis", 1)
    assert isinstance(axis, int)
    return Scale(powers.astype(np.int64) - 1, offsets, axis)


def spread(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Parameters of an axis in a form that broadcasts over a value of `rank`; one parameter becomes a scalar."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
