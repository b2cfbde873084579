"""Choose the range that a tensor's integers cover, and from it the scale and the zero point."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nestc.errors import QuantizationError
from nestc.quant.profile import METHODS, Histogram, TensorStats
from nestc.quant.scheme import Format, nearest

PERCENTILE = 99.99
"""Percent of the values inside the range that method `percentile` chooses."""

CANDIDATES = 32
"""Ranges that a search tries at once; the search by squared error then looks closer around the best of them."""

TINY = float(np.finfo(np.float32).tiny)
"""The smallest scale, so that a range of almost nothing has one that can be divided by."""

_LISTED = ", ".join(METHODS)

Range = tuple[float, float]
Floats = NDArray[np.float64]


def parse_method(text: str) -> tuple[str, float]:
    """A method and its percentage of ``minmax``, ``percentile``, ``percentile:99.9``, ``mse`` or ``entropy``.

    Raises QuantizationError for another method, or a percentage that is not above 50 and at most 100.
    """
    name, colon, number = text.partition(":")
    if name not in METHODS or (colon and name != "percentile"):
        raise QuantizationError(f"there is no calibration method {text!r}{nearest(name, METHODS)}; choose {_LISTED}")
    try:
        percent = float(number) if colon else PERCENTILE
    except ValueError:
        percent = math.nan
    if not 50.0 < percent <= 100.0:
        raise QuantizationError(f"the method {text!r} needs a percentage above 50 and at most 100, as percentile:99.9")
    return name, percent


def thresholds(stats: TensorStats, format: Format, method: str = "minmax", pow2: bool | None = None) -> Range:
    """The range (low, high), with low <= 0 <= high, that the integers of `format` are to cover.

    ``method`` is as `parse_method` reads it. A symmetric format gets the range around 0 that its integers cover with
    zero point 0. With `pow2` (by default the format's) the scale of the range is a power of two. Raises
    QuantizationError for an unknown method.
    """
    method, percent = parse_method(method)
    power = format.pow2 if pow2 is None else pow2
    full = (min(stats.min, 0.0), max(stats.max, 0.0))
    usable = stats.histogram.total > 0 and full != (0.0, 0.0)
    if method == "minmax" or not usable:
        return _rounded_up(full, format, power)
    if method == "percentile":
        return _rounded_up(_percentile(stats, percent), format, power)
    if power:
        # Few scales are near enough to matter: each half of the one before, the first of them covering everything.
        score = _mse if method == "mse" else _divergence
        steps = _powers(full, format)
        return min(steps, key=lambda each: score(stats.histogram, each, format))
    if method == "mse":
        return _least_error(stats.histogram, full, format)
    return _least_divergence(stats.histogram, full, format)


def scale_zero_point(low: float, high: float, format: Format) -> tuple[np.float32, int]:
    """Scale and zero point of a range: real = scale * (integer - zero_point); the scale is at least `TINY`.

    The zero point is one of the format's integers, 0 for a symmetric format. A range of only 0 has scale 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return np.float32(1.0), 0 if format.symmetric else min(max(0, format.low), format.high)
    scale = _scale((low, high), format)
    if format.pow2:
        scale = _power_above(scale)
    step = np.float32(max(scale, TINY))
    if format.symmetric:
        return step, 0
    return step, int(min(max(round(format.low - low / float(step)), format.low), format.high))


def _scale(bounds: Range, format: Format) -> float:
    """The smallest scale at which the format's integers cover the range (asymmetric: but for rounding the zero)."""
    low, high = bounds
    if not format.symmetric:
        return (high - low) / format.levels
    return max(high / format.high, low / format.low if format.low < 0 else 0.0)


def _power_above(scale: float) -> float:
    """The smallest power of two that is not below `scale`, but for rounding errors of a few units in the last place."""
    fraction, exponent = math.frexp(scale * (1 - 1e-9))
    return math.ldexp(1.0, exponent) if fraction > 0.5 else math.ldexp(1.0, exponent - 1)


def _covered(scale: float, bounds: Range, format: Format) -> Range:
    """What the integers cover at a scale, with the zero point that suits the range best."""
    if format.symmetric:
        return (scale * format.low, scale * format.high)
    low, high = bounds
    # What does not fit is cut from both ends in proportion, so a range of one sign loses nothing at 0.
    share = min(1.0, format.levels * scale / (high - low))
    zero = min(max(round(-low * share / scale), 0), format.levels)
    return (-zero * scale, (format.levels - zero) * scale)


def _rounded_up(bounds: Range, format: Format, power: bool) -> Range:
    """The range that integers cover when their scale is no smaller than `bounds` needs."""
    if bounds == (0.0, 0.0):
        return bounds
    if not power:
        return bounds if not format.symmetric else _covered(_scale(bounds, format), bounds, format)
    scale = _power_above(_scale(bounds, format))
    if not format.symmetric and _covered(scale, bounds, format)[1] < bounds[1]:
        scale *= 2  # rounding the zero point has pushed the top out by up to half a step
    return _covered(scale, bounds, format)


def _powers(full: Range, format: Format, halvings: int = 5) -> list[Range]:
    """Ranges of power-of-two scales, from the one that covers everything downwards."""
    top = _rounded_up(full, format, True)
    scale = (top[1] - top[0]) / format.levels
    return [_covered(scale / 2**k, full, format) for k in range(halvings + 1)]


def _percentile(stats: TensorStats, percent: float) -> Range:
    """The range that leaves out half of the other values at each end."""
    outside = (100.0 - percent) / 2
    return min(stats.percentile(outside), 0.0), max(stats.percentile(100.0 - outside), 0.0)


def _steps(low: Floats, high: Floats, format: Format) -> tuple[Floats, Floats, Floats]:
    """Scale, and lowest and highest multiple of it that is represented, of many ranges at once."""
    if format.symmetric:
        scale = np.maximum(high / format.high, low / format.low if format.low < 0 else 0.0)
        first = np.full_like(scale, format.low)
    else:
        scale = (high - low) / format.levels
        first = np.rint(low / np.maximum(scale, TINY))
    return np.maximum(scale, TINY), first, first + format.levels


def squared_errors(histogram: Histogram, low: Floats, high: Floats, format: Format) -> Floats:
    """Mean squared error of rounding and clipping the counted values to each range (low[i], high[i]).

    Values are taken to be spread evenly inside their bins. The integral of the squared error from 0 to x, with n the
    represented multiple of the scale s nearest to x, is n s^3 / 12 + (x - n s)^3 / 3, also where x is clipped.
    """
    scale, first, last = (each[:, None] for each in _steps(low, high, format))
    edges = histogram.edges[None, :]
    step = np.clip(np.rint(edges / scale), first, last)
    rest = edges - step * scale
    integral = step * (scale**3 / 12) + rest * rest * rest / 3
    return np.diff(integral, axis=1) @ histogram.counts / (histogram.width * max(histogram.total, 1))


def _mse(histogram: Histogram, bounds: Range, format: Format) -> float:
    return float(squared_errors(histogram, np.array([bounds[0]]), np.array([bounds[1]]), format)[0])


def _least_error(histogram: Histogram, full: Range, format: Format) -> Range:
    """The range of least mean squared error: one end after the other, then again closer around the best.

    One end (a symmetric format, values of one sign) is searched as a whole, which finds the minimum on the grid; two
    ends in turn, which may stop at a minimum that no change of a single end improves.
    """
    low, high = _rounded_up(full, format, False)
    if format.symmetric:

        def both(factors: Floats) -> Floats:
            return squared_errors(histogram, low * factors, high * factors, format)

        factor = _search(both)
        return low * factor, high * factor
    lower = upper = 1.0
    for _ in range(2 if low < 0.0 < high else 1):
        if high > 0.0:
            kept = np.full(CANDIDATES, low * lower)
            upper = _search(lambda factors, kept=kept: squared_errors(histogram, kept, high * factors, format))
        if low < 0.0:
            kept = np.full(CANDIDATES, high * upper)
            lower = _search(lambda factors, kept=kept: squared_errors(histogram, low * factors, kept, format))
    return low * lower, high * upper


def _search(errors: Callable[[Floats], Floats]) -> float:
    """The factor in (0, 1] of least error: on a grid, then on a finer one between the neighbours of the best."""
    grid = np.arange(1, CANDIDATES + 1) / CANDIDATES
    best = float(grid[int(np.argmin(errors(grid)))])
    fine = np.linspace(max(best - 1 / CANDIDATES, 1 / CANDIDATES**2), min(best + 1 / CANDIDATES, 1.0), CANDIDATES)
    return float(fine[int(np.argmin(errors(fine)))])


def _least_divergence(histogram: Histogram, full: Range, format: Format) -> Range:
    """The range whose quantized distribution diverges least (Kullback-Leibler) from the distribution seen.

    The algorithm of S. Migacz, "8-bit inference with TensorRT", GTC 2017, for any format: candidates are the ranges
    clipped at -T and T, from as many bins as the format has steps to all of them. With fewer bins than steps nothing
    can be said, and the whole range is taken.
    """
    filled = np.flatnonzero(histogram.counts)
    bins = int(filled[-1] - filled[0] + 1)
    reach = max(-full[0], full[1])
    if bins <= format.levels:
        return _rounded_up(full, format, False)
    least = format.levels / 2 if format.symmetric and full[0] < 0.0 else format.levels
    tops = np.linspace(min(least * histogram.width, reach), reach, 3 * CANDIDATES)
    ranges = [_rounded_up((max(full[0], -top), min(full[1], top)), format, False) for top in tops.tolist()]
    # Of ranges that are equally near the largest, which clips least.
    return min(reversed(ranges), key=lambda each: _divergence(histogram, each, format))


def _divergence(histogram: Histogram, bounds: Range, format: Format) -> float:
    """Kullback-Leibler divergence of the distribution, clipped to a range, from the same in the format's steps.

    What is clipped counts at the ends of the reference and is missing from the quantized one, which is what makes
    clipping cost. The bin of the exact zeros, which every format represents, is levelled with its neighbours.
    """
    low, high = bounds
    scale = (high - low) / format.levels
    centres = histogram.edges[:-1] + histogram.width / 2
    inside = (centres >= low - scale / 2) & (centres <= high + scale / 2)
    seen = histogram.counts.astype(np.float64)
    zero = -histogram.first
    if 0 <= zero < len(seen):
        around = [seen[i] for i in (zero - 1, zero + 1) if 0 <= i < len(seen)]
        seen[zero] = min(seen[zero], max(around, default=0.0))
    kept = seen[inside]
    if not kept.sum():
        return math.inf
    reference = kept.copy()
    reference[0] += seen[centres < centres[inside][0]].sum()
    reference[-1] += seen[centres > centres[inside][-1]].sum()
    group = np.clip(np.rint((centres[inside] - low) / scale), 0, format.levels).astype(np.intp)
    filled = (kept > 0).astype(np.float64)
    sums, members = np.bincount(group, kept), np.bincount(group, filled)
    spread = (sums / np.maximum(members, 1))[group] * filled
    p, q = reference / reference.sum(), spread / spread.sum()
    # A bin that holds only what was clipped is empty in q; the smallest share of a counted value stands for it.
    q = np.where(q > 0, q, 1.0 / max(histogram.total, 1) / len(q))
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
