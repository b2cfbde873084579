"""Sums of products and their requantization: from terms with scales to steps on accumulators, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from nestc.targets.vta.layer import FeatureMap, Init, Shift
from nestc.targets.vta.layers_fit import DIGIT, Line, digits_of, fit
from nestc.targets.vta.layers_steps import MAX_PIECES, Draft, add_constant, bounds_of, clip_within
from nestc.targets.vta.layers_values import ABSENT, Reals, Refused, Source, Term, feature_map, identity

_MOST_SHIFT = 30


@dataclass(frozen=True, eq=False)
class Chain:
    """int8 integers that the steps leave in the accumulators; the real value is ``integer * 2**exponent``.

    ``name`` is the ONNX value that they are, ``shape`` its shape. ``maps`` are the maps that Maximum steps read.
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[Draft, ...]
    maps: Mapping[str, FeatureMap]
    exponent: int = 0


@dataclass(frozen=True, eq=False)
class Factor:
    """What a sum is multiplied with: a number a channel, divided by ``divisor``."""

    numbers: Reals
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class Sum:
    """clip((head + terms) * factor + constant, low, high) in real numbers; nothing is rounded yet.

    ``head`` are integers already in the accumulators, ``constant`` is one number a channel.
    """

    shape: tuple[int, ...]
    head: Chain | None = None
    terms: tuple[Term, ...] = ()
    constant: Reals | None = None
    factor: Factor | None = None
    low: Fraction | None = None
    high: Fraction | None = None

    @property
    def channels(self) -> int:
        """Size of axis 1."""
        return self.shape[1]

    @property
    def clipped(self) -> bool:
        """Whether a bound stands after the sum."""
        return self.low is not None or self.high is not None

    def clip(self, low: Fraction | None, high: Fraction | None) -> Sum:
        """The sum with further bounds after those it has."""
        limits = [_bounded(bound, low, high) for bound in (self.low, self.high)]
        lowest = low if limits[0] is None else limits[0]
        highest = high if limits[1] is None else limits[1]
        return dataclasses.replace(self, low=lowest, high=highest)

    def plus(self, other: Sum) -> Sum:
        """The sum of both, of which one at most has a head; neither has bounds or a factor."""
        constants = [each.constant for each in (self, other) if each.constant is not None]
        constant = constants[0] if constants else None
        for more in constants[1:]:
            constant = more if constant is None else constant.plus(more)
        return Sum(self.shape, self.head or other.head, self.terms + other.terms, constant)

    def plus_constant(self, numbers: Reals) -> Sum:
        """The sum and one number a channel."""
        constant = numbers if self.constant is None else self.constant.plus(numbers)
        return dataclasses.replace(self, constant=constant)

    def times(self, numbers: Reals) -> Sum:
        """The sum times one number a channel; it has no head and no bounds."""
        constant = None if self.constant is None else self.constant.times(numbers)
        odd, powers = _odd_parts(numbers)
        largest = np.max([term.largest(self.channels) for term in self.terms], axis=0, initial=0)
        if self.factor is None and bool((np.abs(odd) * largest <= 127).all()):
            scaled = [term.times(odd.astype(np.int64)) for term in self.terms]
            terms = tuple(dataclasses.replace(t, exponents=_moved(t.exponents, powers)) for t in scaled)
            return dataclasses.replace(self, terms=terms, constant=constant)
        factor = Factor(numbers) if self.factor is None else Factor(self.factor.numbers.times(numbers))
        if self.factor is not None:
            factor = dataclasses.replace(factor, divisor=self.factor.divisor)
        return dataclasses.replace(self, constant=constant, factor=factor)


def lift(value: Source | Chain | Sum) -> Sum:
    """A value as a sum."""
    if isinstance(value, Sum):
        return value
    if isinstance(value, Chain):
        return Sum(value.shape, value)
    return Sum(value.shape, None, (identity(value, value.map.channels),))


def quantized(value: Sum, exponent: int, name: str, block: int) -> Chain | None:
    """clip(floor(value / 2**exponent + 1 / 2), -128, 127), named `name`.

    None if that is not possible with the head still in the accumulators: it has to become a map in memory first.
    Raises Refused if there is no such sequence of steps at all.
    """
    low, high = _integer_bounds(value, exponent)
    if value.factor is not None:
        assert value.head is None
        steps = _fitted(value, exponent, low, high)
    elif value.head is not None:
        steps = _onto_head(value, value.head, exponent)
    else:
        steps = _summed(value, exponent, block)
    if steps is None:
        return None
    bounds = bounds_of(steps, value.channels)
    maps = {} if value.head is None else value.head.maps
    return Chain(name, value.shape, (*steps, *clip_within(bounds, low, high)), maps)


def settled(value: Sum) -> Chain | None:
    """A head with bounds as a chain; None if a bound is no integer of its scale or something else is in the sum."""
    head = value.head
    if head is None or value.terms or value.factor is not None or value.constant is not None:
        return None
    limits: list[int] = []
    for bound, default in ((value.low, -128), (value.high, 127)):
        scaled = Fraction(default) if bound is None else bound / Fraction(2) ** head.exponent
        if scaled.denominator != 1:
            return None
        limits.append(min(max(int(scaled), -128), 127))
    clips = clip_within(bounds_of(head.steps, value.channels), *limits)
    return dataclasses.replace(head, steps=(*head.steps, *clips))


def _summed(value: Sum, exponent: int, block: int) -> tuple[Draft, ...]:
    """Init, products and one requantization."""
    channels = value.channels
    units = _units(value.terms, channels)
    amounts = np.where(units == ABSENT, -ABSENT, exponent - units)
    terms = tuple(_aligned(term, units) for term in value.terms)
    largest = np.max([term.largest(channels) for term in terms], axis=0, initial=0)
    amounts = _uniform(amounts, largest, block)
    units = exponent - amounts
    terms = tuple(_aligned(term, units) for term in value.terms)
    steps: list[Draft] = [Init(_rounding(value.constant, exponent, units)), *terms]
    least = int(amounts.min())
    if least < 0:
        steps.append(Shift(np.asarray(least, np.int64)))
        amounts = amounts - least
    if amounts.any():
        steps.append(Shift(_one(amounts)))
    return tuple(steps)


def _onto_head(value: Sum, head: Chain, exponent: int) -> tuple[Draft, ...] | None:
    """Products added to integers in the accumulators, with one more requantization."""
    unit = min(head.exponent, int(_units(value.terms, value.channels).min(initial=ABSENT)))
    units = np.full(value.channels, unit, np.int64)
    steps: list[Draft] = list(head.steps)
    if head.exponent > unit:
        steps.append(Shift(np.asarray(unit - head.exponent, np.int64)))
    steps += [_aligned(term, units) for term in value.terms]
    constants = _rounding(value.constant, exponent, units)
    if constants.ndim:
        return None
    rounded = add_constant(steps, int(constants))
    if rounded is None or exponent == unit:
        return rounded
    return (*rounded, Shift(np.asarray(exponent - unit, np.int64)))


def _fitted(value: Sum, exponent: int, low: int, high: int) -> tuple[Draft, ...]:
    """Products with multipliers of several digits, least significant first, the sums shifted down before the next.

    VTA's ALU does not multiply, so that the multiplier M goes into the weights: (z * M + K) >> n. Since
    floor(floor(a / 128) + b) = floor((a + 128 * b) / 128), shifting down between the digits loses nothing.
    """
    channels, factor = value.channels, value.factor
    assert factor is not None
    units = _units(value.terms, channels)
    unit = int(units.min())
    terms = [_aligned(term, np.full(channels, unit, np.int64)) for term in value.terms]
    least, most = (np.sum(ends, axis=0) for ends in zip(*(term.reach(channels) for term in terms), strict=True))
    widest = int(max(term.largest(channels).max() for term in terms))
    line = _line(factor, value.constant, unit, exponent, channels)
    found = fit(line, int(least.min()), int(most.max()), low, high, widest)
    steps: list[Draft] = [Init(_one(found.constants))]
    wide = [term.times(found.multipliers) for term in terms]
    split = [digits_of(term.weights, found.digits) for term in wide]
    last = found.digits - 1
    for place in range(found.digits):
        for term, digits in zip(wide, split, strict=True):
            if digits[place].any():
                steps.append(dataclasses.replace(term, weights=digits[place]))
        amount = DIGIT if place < last else found.shift - DIGIT * last
        if amount:
            steps.append(Shift(np.asarray(amount, np.int64)))
    return tuple(steps)


def _line(factor: Factor, constant: Reals | None, unit: int, exponent: int, channels: int) -> Line:
    """Accumulators in units of 2**unit -> results in units of 2**exponent, with one half for the rounding."""
    slope = factor.numbers.exponent + unit - exponent
    offset = 0 if constant is None else constant.exponent - exponent
    least = min(slope, offset, -1)
    numerators = np.broadcast_to(factor.numbers.integers * 2 ** (slope - least), (channels,))
    half = 2 ** (-1 - least) * factor.divisor
    offsets = np.full(channels, half, object)
    if constant is not None:
        offsets = offsets + constant.integers * 2 ** (offset - least) * factor.divisor
    return Line(numerators, np.asarray(offsets, object), factor.divisor * 2**-least)


def _units(terms: tuple[Term, ...], channels: int) -> np.ndarray:
    """The finest unit of each channel among terms whose weights are not all zero; ABSENT if there is none."""
    units = np.full(channels, ABSENT, np.int64)
    for term in terms:
        units = np.minimum(units, np.where(term.largest(channels) > 0, term.exponents, ABSENT))
    return units


def _aligned(term: Term, units: np.ndarray) -> Term:
    """The term with its weights in units of 2**units, which are at least as fine as its own."""
    active = term.exponents != ABSENT
    powers = np.where(active & (term.largest(len(units)) > 0), term.exponents - units, 0)
    if not powers.any():
        return term
    if int(powers.max()) > 20:
        raise Refused("its scales are so far apart that 8-bit weights cannot align them")
    scaled = term.times(np.int64(1) << np.maximum(powers, 0))
    if int(scaled.largest(len(units)).max()) > 127 * MAX_PIECES:
        raise Refused("its scales are so far apart that 8-bit weights cannot align them")
    return scaled


def _uniform(amounts: np.ndarray, largest: np.ndarray, block: int) -> np.ndarray:
    """Shift amounts made equal, over all channels or else within blocks, where small weights leave room to be doubled.

    The ALU takes one cycle an element to shift by an immediate and two to shift by a vector. Channels without a
    product (amount -ABSENT) take any amount.
    """
    dead = amounts == -ABSENT
    if dead.all():
        return np.zeros_like(amounts)
    doublings = np.floor(np.log2(127 / np.clip(largest, 1, 127))).astype(np.int64)
    highest = np.where(dead, ABSENT, amounts + doublings)
    common = int(amounts[~dead].max())
    if bool((highest >= common).all()):
        return np.full_like(amounts, common)
    result = np.where(dead, common, amounts)
    for first in range(0, len(amounts), block):
        part = slice(first, first + block)
        alive = ~dead[part]
        target = int(amounts[part][alive].max()) if alive.any() else common
        if bool((highest[part] >= target).all()):
            result[part] = target
        else:
            result[part] = np.where(alive, amounts[part], target)
    return result


def _rounding(constant: Reals | None, exponent: int, units: np.ndarray) -> np.ndarray:
    """floor((constant + half of 2**exponent) / 2**units): what makes the later shift round, int64.

    floor((acc + b) / 2**s) = floor((acc + floor(b)) / 2**s) for a real number b, so that the constant may be finer than
    the accumulators. Where they are coarser than the result (they will be shifted left) nothing is rounded.
    """
    if int((exponent - units).max()) > _MOST_SHIFT:
        raise Refused(f"its scales differ by more than 2**{_MOST_SHIFT}")
    zero = Reals(np.zeros(len(units), object), 0)
    number = zero if constant is None else constant
    coarse = units > exponent
    if bool((coarse & ~number.is_at(units)).any()):
        raise Refused("a bias is finer than the sum that it is added to, and the sum is coarser than the result")
    half = Reals(np.ones(len(units), object), exponent - 1)
    found = np.where(coarse, number.floor_at(units), number.plus(half).floor_at(units))
    if max(abs(int(x)) for x in found) >= 1 << 31:
        raise Refused("its bias needs more than the 32 bits of VTA's accumulators")
    return _one(found.astype(np.int64))


def _one(values: np.ndarray) -> np.ndarray:
    """One number for all channels where they have the same."""
    return values if (values != values[0]).any() else np.asarray(values[0])


def _integer_bounds(value: Sum, exponent: int) -> tuple[int, int]:
    """Bounds of the rounded result: rounding is monotone, so that bounds are rounded like everything else."""
    unit = Fraction(2) ** exponent
    low = -128 if value.low is None else min(max(floor(value.low / unit + Fraction(1, 2)), -128), 127)
    high = 127 if value.high is None else min(max(floor(value.high / unit + Fraction(1, 2)), -128), 127)
    return min(low, high), high


def _bounded(bound: Fraction | None, low: Fraction | None, high: Fraction | None) -> Fraction | None:
    if bound is None:
        return None
    raised = bound if low is None else max(bound, low)
    return raised if high is None else min(raised, high)


def _odd_parts(numbers: Reals) -> tuple[np.ndarray, np.ndarray]:
    """numbers = odd * 2**powers (0 = 0 * 2**0)."""
    odd, powers = np.zeros(len(numbers.integers), object), np.zeros(len(numbers.integers), np.int64)
    for i, whole in enumerate(numbers.integers):
        number = int(whole)
        power = (number & -number).bit_length() - 1 if number else 0
        odd[i], powers[i] = number >> power, power + numbers.exponent if number else 0
    return odd, powers


def _moved(exponents: np.ndarray, powers: np.ndarray) -> np.ndarray:
    return np.where(exponents == ABSENT, ABSENT, exponents + powers)


def output_map(chain: Chain) -> FeatureMap:
    """The map in memory that a chain's integers become."""
    return feature_map(chain.name, chain.shape)
