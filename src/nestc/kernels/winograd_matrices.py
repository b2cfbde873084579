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
    convolutional neural networks", 2016, arXiv 1509.09308, section 4; without points it is the identity, r = m = 1.)
    Compared by identity: `transform` makes each once.
    """

    m: int
    r: int
    pairs: tuple[Fraction, ...]
    at: Matrix
    g: Matrix
    bt: Matrix

    @property
    def n(self) -> int:
        """Inputs of a tile."""
        return self.m + self.r - 1


@cache
def transform(m: int, r: int, pairs: tuple[Fraction, ...] | None = None) -> Transform:
    """F(m, r) for even m + r - 1 (or m = r = 1), at the points 0, +-`pairs` and infinity.

    Raises ValueError where the number of points does not fit.
    """
    if m == r == 1:
        one = ((Fraction(1),),)
        return Transform(1, 1, (), one, one, one)
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


def _product(roots: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """Coefficients, lowest power first, of the polynomial with these roots and leading coefficient 1."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        result = [a - root * b for a, b in zip(shifted, [*result, Fraction(0)])]
    return tuple(result)
