"""Matrices of Winograd's minimal filtering F(m, r), made with fractions from interpolation points (Cook-Toom)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod

Matrix = tuple[tuple[Fraction, ...], ...]

# Pairs of points beside 0 and infinity, by their number. Symmetric pairs share work (even and odd powers apart), 1
# saves multiplications, and powers of two as denominators leave the entries of ``bt`` exact. Points near 1 keep the
# entries of one size, which decides the error (Barabasz et al., "Error analysis and improving the accuracy of Winograd
# convolution for deep neural networks", 2020): 5/8 makes half the error of the usual 2 in F(4x4, 3x3).
_PAIRS: dict[int, tuple[Fraction, ...]] = {
    0: (),
    1: (Fraction(1),),
    2: (Fraction(1), Fraction(5, 8)),
    3: (Fraction(1), Fraction(2), Fraction(1, 2)),
}


@dataclass(frozen=True, eq=False)
class Transform:
    """``m`` outputs of a correlation with ``r`` taps from ``n = m + r - 1`` inputs: y = at ((g w) * (bt d)).

    ``at`` is [m][n], ``g`` [n][r], ``bt`` [n][n]. The points are 0, a, -a for each a of `pairs`, and infinity, in this
    order; of a pair, row 1 + 2 * i of ``bt`` belongs to a and the next one to -a. (Lavin and Gray, "Fast algorithms for
    convolutional neural networks", 2016, arXiv 1509.09308, section 4; of one tap it is the identity.)

    With `phases` it is of stride 2: the outputs are the sum of two correlations of stride 1, of the even inputs with
    the even taps and of the odd ones with the odd ones, and the products of the even one come first. There are again
    as many products as inputs, 2 * m + r - 2.
    Compared by identity: `transform` makes each once.
    """

    m: int
    r: int
    pairs: tuple[Fraction, ...]
    at: Matrix
    g: Matrix
    bt: Matrix
    phases: tuple[Transform, Transform] | None = None

    @property
    def stride(self) -> int:
        """Inputs from one output to the next."""
        return 1 if self.phases is None else 2

    @property
    def n(self) -> int:
        """Inputs of a tile."""
        return self.stride * (self.m - 1) + self.r


@cache
def transform(m: int, r: int, pairs: tuple[Fraction, ...] | None = None) -> Transform:
    """F(m, r) for even m + r - 1 (or r = 1), at the points 0, +-`pairs` and infinity.

    Raises ValueError where the number of points does not fit.
    """
    if r == 1:
        one = tuple(tuple(Fraction(int(i == j)) for j in range(m)) for i in range(m))
        return Transform(m, 1, (), one, ((Fraction(1),),) * m, one)
    n = m + r - 1
    pairs = _PAIRS.get(n // 2 - 1) if pairs is None else pairs
    if n % 2 or pairs is None or 2 * len(pairs) + 2 != n:
        raise ValueError(f"F({m}, {r}) needs {n - 1} points beside infinity, which are not 0 and {pairs}")
    points = [Fraction(0), *(sign * a for a in pairs for sign in (1, -1))]
    at = tuple((*(a**i for a in points), Fraction(int(i == m - 1))) for i in range(m))
    g = [tuple(a**j / prod(a - b for b in points if b != a) for j in range(r)) for a in points]
    bt = [(*_product(tuple(b for b in points if b != a)), Fraction(0)) for a in points]
    infinity = tuple(Fraction(int(j == r - 1)) for j in range(r))
    return Transform(m, r, pairs, at, (*g, infinity), (*bt, _product(tuple(points))))


@cache
def strided(m: int, r: int) -> Transform:
    """`m` outputs of a correlation of stride 2 with `r` taps, from F(m, ceil(r / 2)) and F(m, floor(r / 2)).

    Raises ValueError where the number of points of one of the two does not fit.
    """
    even, odd = transform(m, (r + 1) // 2), transform(m, r // 2)
    at = tuple((*a, *b) for a, b in zip(even.at, odd.at, strict=True))
    n = 2 * (m - 1) + r
    g = (*_spread(even.g, 0, r), *_spread(odd.g, 1, r))
    bt = (*_spread(even.bt, 0, n), *_spread(odd.bt, 1, n))
    return Transform(m, r, (), at, g, bt, (even, odd))


def _spread(rows: Matrix, first: int, width: int) -> Matrix:
    """Rows with their entries in every second place, from `first` on, and zeros between."""
    places = {first + 2 * i: i for i in range(len(rows[0]))}
    return tuple(tuple(row[places[j]] if j in places else Fraction(0) for j in range(width)) for row in rows)


def _product(roots: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """Coefficients, lowest power first, of the polynomial with these roots and leading coefficient 1."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        result = [a - root * b for a, b in zip(shifted, [*result, Fraction(0)])]
    return tuple(result)
