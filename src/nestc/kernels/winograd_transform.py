"""One-dimensional Winograd transforms as vector statements, with the work that symmetric points share done once."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from nestc.kernels.winograd_matrices import Transform
from nestc.kernels.winograd_tiles import Named
from nestc.tensor.build import Builder, constant
from nestc.tensor.ir import Binary, Expr, Fma


class Transforms(Named):
    """Emits ``bt d`` and ``at m`` for vectors of channels; values have names, so that each is computed once."""

    def __init__(self, builder: Builder, lanes: int) -> None:
        super().__init__(builder, lanes, "float32")

    def scaled(self, factor: Fraction, x: Expr, plus: Expr | None) -> Expr:
        """``factor * x + plus``, in the cheapest way."""
        if plus is None:
            return x if factor == 1 else self.name(Binary("mul", x, self.constant(factor)))
        if factor == 1:
            return self.name(Binary("add", plus, x))
        if factor == -1:
            return self.name(Binary("sub", plus, x))
        return self.name(Fma(x, self.constant(factor), plus))

    def constant(self, value: Fraction) -> Expr:
        """A factor in every lane."""
        return constant(float(value), "float32", self.lanes)

    def combination(self, factors: Sequence[Fraction], xs: Sequence[Expr]) -> Expr | None:
        """Sum of products, from the last term, which has the factor 1 in all rows of ``bt``; None if it is empty."""
        total: Expr | None = None
        for factor, x in reversed(list(zip(factors, xs, strict=True))):
            if factor:
                total = self.scaled(factor, x, total)
        return total

    def inputs(self, t: Transform, d: Sequence[Expr]) -> list[Expr]:
        """``bt d``: even and odd powers of a pair of points are summed once, for E + O and E - O."""
        if t.phases is not None:
            return [*self.inputs(t.phases[0], d[0::2]), *self.inputs(t.phases[1], d[1::2])]
        if t.r == 1:
            return list(d)
        zero = Fraction(0)
        rows = [_some(self.combination(t.bt[0], d))]
        for i, a in enumerate(t.pairs):
            row = t.bt[1 + 2 * i]
            even = _some(self.combination([c if j % 2 == 0 else zero for j, c in enumerate(row)], d))
            # Every odd coefficient has the factor a; without it the last one is 1.
            odd = _some(self.combination([c / a if j % 2 else zero for j, c in enumerate(row)], d))
            rows += [self.scaled(a, odd, even), self.scaled(-a, odd, even)]
        return [*rows, _some(self.combination(t.bt[-1], d))]

    def outputs(self, t: Transform, m: Sequence[Expr]) -> list[Expr]:
        """``at m``: sums of a pair of points serve the even powers, their differences the odd ones."""
        if t.phases is not None:
            even, odd = t.phases
            both = zip(self.outputs(even, m[: even.n]), self.outputs(odd, m[even.n :]), strict=True)
            return [self.name(Binary("add", x, y)) for x, y in both]
        if t.r == 1:
            return list(m)
        pairs = [(m[1 + 2 * i], m[2 + 2 * i]) for i in range(len(t.pairs))]
        sums = [self.name(Binary("add", x, y)) for x, y in pairs]
        differences = [self.name(Binary("sub", x, y)) for x, y in pairs] if t.m > 1 else []
        rows: list[Expr] = []
        for i in range(t.m):
            terms = differences if i % 2 else sums
            powers = [a**i for a in t.pairs]
            total = self.combination(powers[::-1], terms[::-1])
            total = total if i else self.scaled(Fraction(1), m[0], total)
            rows.append(_some(total if i < t.m - 1 else self.scaled(Fraction(1), m[-1], total)))
        return rows


def _some(value: Expr | None) -> Expr:
    assert value is not None
    return value
