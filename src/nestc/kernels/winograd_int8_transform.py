"""Winograd transforms in integers: matrices without fractions, and the code that applies them, exact modulo 2**32.

The transform of a kernel has rows with the denominators d; without them it is integral, and what a position's products
are too large by is made up for when they are transformed back (Lavin and Gray, 2016, scale F(2, 3) by 2 in the same
way). There the sums of row j come out ``odd * 2**shifts[j]`` times too large. The odd factor has an inverse modulo
2**32, and a power of two is shifted away, so that every step before may wrap: the result is right as long as
``2**shifts[j]`` times it fits in 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import lcm

from nestc.kernels.winograd_matrices import transform
from nestc.kernels.winograd_tiles import Named
from nestc.tensor.build import constant
from nestc.tensor.ir import Binary, Expr

_POINTS = {1: (), 4: (1,), 6: (1, 2)}  # beside 0 and infinity, by the inputs of a tile: small integers for small sums

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class IntegerTransform:
    """F(m, r) in integers: ``odd * 2**shifts[j] * y[j] = at[j] ((g w) * (bt d))``.

    ``at`` is [m][n], ``g`` [n][r], ``bt`` [n][n]; row 1 + 2 * i of ``bt`` and ``g`` belongs to the point ``points[i]``
    and the next one to its negative, the first to 0 and the last to infinity. Compared by identity: `integer_transform`
    makes each once.
    """

    m: int
    r: int
    points: tuple[int, ...]
    at: Rows
    g: Rows
    bt: Rows
    odd: int
    shifts: tuple[int, ...]

    @property
    def stride(self) -> int:
        """Inputs from one output to the next."""
        return 1

    @property
    def n(self) -> int:
        """Inputs of a tile."""
        return self.m + self.r - 1

    @property
    def input_growth(self) -> int:
        """How many times larger than the largest input a transformed one can be."""
        return max(sum(map(abs, row)) for row in self.bt)

    @property
    def weight_growth(self) -> int:
        """How many times larger than the largest weight a transformed one can be."""
        return max(sum(map(abs, row)) for row in self.g)


@cache
def integer_transform(m: int, r: int) -> IntegerTransform | None:
    """F(m, r) in integers; None if it needs other points than 0, 1, -1, 2, -2 and infinity."""
    points = _POINTS.get(m + r - 1)
    if points is None or (m == 1) != (r == 1):
        return None
    t = transform(m, r, tuple(map(Fraction, points)))
    if not points:
        return IntegerTransform(1, 1, (), ((1,),), ((1,),), ((1,),), 1, (0,))
    # What each row of g is divided by; the rows of 0 and infinity take the factor that they have in their only output.
    denominators = [next(1 / x for x in row if x) for row in t.g]
    scaled = [[a / d for a, d in zip(row, denominators, strict=True)] for row in t.at]
    wholes = [lcm(*(x.denominator for x in row)) for row in scaled]
    rows = [[x * whole for x in row] for row, whole in zip(scaled, wholes, strict=True)]
    factors = [Fraction(1)] * t.n
    factors[0], factors[-1] = rows[0][0], rows[-1][-1]
    shifts = [(whole & -whole).bit_length() - 1 for whole in wholes]
    odds = {whole >> shift for whole, shift in zip(wholes, shifts, strict=True)}
    if len(odds) != 1:
        return None
    return IntegerTransform(
        m,
        r,
        points,
        _integers([[x / f for x, f in zip(row, factors, strict=True)] for row in rows]),
        _integers([[x * d * f for x in row] for row, d, f in zip(t.g, denominators, factors, strict=True)]),
        _integers(t.bt),
        odds.pop(),
        tuple(shifts),
    )


def _integers(rows: Sequence[Sequence[Fraction]]) -> Rows:
    assert all(x.denominator == 1 for row in rows for x in row)
    return tuple(tuple(int(x) for x in row) for row in rows)


class IntegerTransforms(Named):
    """Emits ``bt d`` and ``at m`` for vectors of integers; values have names, so that each is computed once."""

    def combination(self, factors: Sequence[int], xs: Sequence[Expr]) -> Expr:
        """Sum of products with small factors, of which one is not zero; those of 1 come first."""
        terms = sorted((c != 1, i) for i, c in enumerate(factors) if c)
        total: Expr | None = None
        for _, i in terms:
            c, x = factors[i], xs[i]
            part = x if abs(c) == 1 else self.name(Binary("mul", x, constant(abs(c), self.dtype, self.lanes)))
            if total is None:
                total = part if c > 0 else self.name(Binary("sub", constant(0, self.dtype, self.lanes), part))
            else:
                total = self.name(Binary("add" if c > 0 else "sub", total, part))
        assert total is not None
        return total

    def inputs(self, t: IntegerTransform, d: Sequence[Expr]) -> list[Expr]:
        """``bt d``: even and odd powers of a pair of points are summed once, for E + O and E - O."""
        if t.n == 1:
            return list(d)
        rows = [self.combination(t.bt[0], d)]
        for i in range(len(t.points)):
            row = t.bt[1 + 2 * i]
            even = self.combination([0 if j % 2 else c for j, c in enumerate(row)], d)
            odd = self.combination([c if j % 2 else 0 for j, c in enumerate(row)], d)
            rows += [self.name(Binary("add", even, odd)), self.name(Binary("sub", even, odd))]
        return [*rows, self.combination(t.bt[-1], d)]

    def outputs(self, t: IntegerTransform, m: Sequence[Expr]) -> list[Expr]:
        """``at m``: sums of a pair of points serve the even powers, their differences the odd ones."""
        if t.n == 1:
            return list(m)
        pairs = [(m[1 + 2 * i], m[2 + 2 * i]) for i in range(len(t.points))]
        sums = [self.name(Binary("add", x, y)) for x, y in pairs]
        differences = [self.name(Binary("sub", x, y)) for x, y in pairs]
        rows: list[Expr] = []
        for j, row in enumerate(t.at):
            inner = row[1:-1:2]
            xs = [m[0], *(differences if j % 2 else sums), m[-1]]
            rows.append(self.combination([row[0], *inner, row[-1]], xs))
        return rows
