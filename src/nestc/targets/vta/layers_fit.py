"""Products with numbers that are no powers of two: integers so that (z * M + K) >> n is the exact rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nestc.targets.vta.layers_values import Refused

DIGIT = 7
"""Bits of a digit of a weight that is wider than 8 bits."""
_MOST_DIGITS = 4
_AT_ONCE = 64  # rows that are tried together
_NEAR = 2  # how far from the slope multipliers are tried
_MOST_POINTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Line:
    """round(z * slope + offset) of each row: (z * numerators + offsets) / denominator, all Python integers.

    One half for the rounding is already in ``offsets``.
    """

    numerators: np.ndarray
    offsets: np.ndarray
    denominator: int


@dataclass(frozen=True, eq=False)
class Fit:
    """clip((z * multipliers + constants) >> shift) equals the clipped floor of the line; int64, one a row.

    Multipliers times the widest weight have `digits` digits of 7 bits and a sign; the shift is at least that of all
    digits but one.
    """

    multipliers: np.ndarray
    constants: np.ndarray
    shift: int
    digits: int


def fit(line: Line, least: int, most: int, low: int, high: int, widest: int) -> Fit:
    """The smallest multipliers that are exact for every integer z in least .. most, results clipped to low .. high.

    For a multiplier M and a shift n, an integer z whose result is t needs t * 2**n <= z * M + K < (t + 1) * 2**n. Each
    bound of K is linear in z, so K exists if the largest lower bound is at most the smallest upper one; both are
    computed for all z where t changes. A result at ``low`` needs no lower and one at ``high`` no upper bound, as it is
    clipped. For N integers z the slopes that give the same results lie between two neighbours of the Farey sequence of
    order N, 1 / N**2 apart or more, so that n of 2 * log2(N) + 1 is enough; the fewest digits and then the smallest n
    that do are taken. `widest` is the largest weight that a multiplier is still multiplied with. Raises Refused if
    none fits 31 bits.
    """
    rows = len(line.numerators)
    pairs = np.array([*zip(line.numerators, line.offsets, strict=True)], object)
    keys: dict[tuple[int, int], int] = {}
    place = np.array([keys.setdefault((int(p), int(q)), len(keys)) for p, q in pairs])
    found = _Search(tuple(keys), line.denominator, least, most, low, high).run(widest)
    assert len(place) == rows
    return Fit(found.multipliers[place], found.constants[place], found.shift, found.digits)


class _Search:
    def __init__(
        self, rows: tuple[tuple[int, int], ...], denominator: int, least: int, most: int, low: int, high: int
    ) -> None:
        if len(rows) * (most - least + 1) > _MOST_POINTS:
            raise Refused("a constant that is no power of two multiplies sums too wide for exact integers")
        self.slopes = np.array([p / denominator for p, _ in rows])
        points = np.arange(least, most + 1, dtype=np.int64)
        exact = np.array([q / denominator for _, q in rows])[:, None] + self.slopes[:, None] * points
        results = np.floor(exact)
        # Close to an integer the rounding of float64 could decide; there are few such places.
        for row, column in np.argwhere(np.abs(exact - np.rint(exact)) < 1e-6):
            p, q = rows[row]
            results[row, column] = (int(points[column]) * p + q) // denominator
        results = np.clip(results, low, high)
        changes = (results[:, 1:] != results[:, :-1]).any(axis=0)
        kept = np.concatenate([[True], changes]) | np.concatenate([changes, [True]])
        self.points, self.results = points[kept], results[:, kept].astype(np.int64)
        self.order = np.arange(len(rows))
        self.open_below, self.open_above = self.results <= low, self.results >= high

    def run(self, widest: int) -> Fit:
        for digits, shift in self.candidates(widest):
            found = self.at(shift, (127 << (DIGIT * (digits - 1))) // widest)
            if found is not None:
                return Fit(*found, shift, digits)
        raise Refused("a constant that is no power of two needs more bits than VTA's accumulators have")

    def candidates(self, widest: int) -> Iterator[tuple[int, int]]:
        """Digits and shifts to try, cheapest first."""
        steepest = float(np.abs(self.slopes).max(initial=0.0)) * widest
        for digits in range(1, _MOST_DIGITS + 1):
            most = 127 << (DIGIT * (digits - 1))
            for shift in range(DIGIT * (digits - 1), 31):
                # Shifts that fewer digits do are tried with those; a multiplier may be rounded to one beyond.
                if (most >> (DIGIT + 1)) - 1 <= steepest * 2.0**shift <= most:
                    yield digits, shift

    def at(self, shift: int, largest: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A multiplier, `largest` at most, and a constant for each row; None if one has none."""
        multipliers = np.rint(np.ldexp(self.slopes, shift)).astype(np.int64)
        constants = np.zeros_like(multipliers)
        for first in range(0, len(multipliers), _AT_ONCE):
            left = self.order[first : first + _AT_ONCE]
            for more in sorted(range(-_NEAR, _NEAR + 1), key=abs):
                tried = multipliers[left] + more
                chosen, fits = self.constants(tried, left, shift)
                fits &= np.abs(tried) <= largest
                multipliers[left[fits]], constants[left[fits]] = tried[fits], chosen[fits]
                left = left[~fits]
                if not left.size:
                    break
            if left.size:  # what failed now is likely to fail next, so it comes first
                self.order = np.concatenate([left, self.order[~np.isin(self.order, left)]])
                return None
        return multipliers, constants

    def constants(self, multipliers: np.ndarray, rows: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """A constant for each of the rows with its multiplier, and whether it is right."""
        products = multipliers[:, None] * self.points
        results = self.results[rows]
        far = np.int64(1) << 45
        lower = np.where(self.open_below[rows], -far, (results << shift) - products).max(axis=1)
        upper = np.where(self.open_above[rows], far, ((results + 1) << shift) - 1 - products).min(axis=1)
        middle = (lower + upper) >> 1
        # Where all results are clipped on one side any number beyond the other bound will do.
        middle = np.where(lower == -far, np.minimum(upper, 0), np.where(upper == far, np.maximum(lower, 0), middle))
        return middle, (lower <= upper) & (np.abs(middle) < 1 << 30)


def digits_of(weights: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` integers of 7 bits and a sign for each weight, least significant first: weight = sum of d[k] * 128**k."""
    rest, found = weights.astype(np.int64), list[np.ndarray]()
    for _ in range(count - 1):
        digit = ((rest + 64) & 127) - 64
        found.append(digit)
        rest = (rest - digit) >> DIGIT
    return [*found, rest]
