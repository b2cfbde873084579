"""Products of bytes with weights of 8 bits in sums of 16 bits that cannot saturate.

pmaddubsw (`PairSum`) adds two products of a byte and a weight in 16 bits; that saturates where two weights of one sign
exceed 128 together, since 255 * 128 < 2**15. A *unit* is four neighbouring channels of all outputs of a register
column: two such sums an output. The weights are known, and so is which units can be multiplied as they are. In others
inputs are complemented: ``w * x = -w * (255 - x) + 255 * w`` makes two weights of one sign two of both, for all weights
but -128, and costs an exclusive or with a mask that is constant, and a constant in the sum. A unit leaves room enough
in 16 bits that two units can be added before they are widened, if those two are chosen that fit together.

Hence three kinds of steps: *plain* (two units as they are), *flipped* (two units, inputs of the second complemented
where it takes that) and *single* (one unit, likewise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BOUND = 128  # of the positive, and of the negative, weights of one 16-bit sum: 255 * 128 = 32640
UNITS = (2, 2, 1)
"""Units of a plain, a flipped and a single step."""
VECTORS = (2, 3, 2)
"""Constants that they read: the weights of the units, then the mask of the last one."""
_TURNS = 12  # partners that are tried for a unit in a round
_Fits = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PairedUnits:
    """The units of all register columns in steps.

    A column has ``counts`` (int64 [columns][chunks][3], at most ``most``) plain, flipped and single steps in each of
    its chunks. ``numbers`` (int64 [columns][chunks][units]) says which unit of the column each is; ``vectors`` (int8
    [columns][chunks][constants][width]) holds what `VECTORS` says. In both the flipped steps begin at 0 and the single
    ones at ``ends``, where the plain ones end, the first of them last: so every kind begins at the same place in all
    columns, and what is not used lies between two of them. ``offset`` (int64 [columns][width / 4]) has to be added to
    the sums.
    """

    most: tuple[int, int, int]
    ends: tuple[int, int]
    counts: np.ndarray
    numbers: np.ndarray
    vectors: np.ndarray
    offset: np.ndarray

    @property
    def chunks(self) -> int:
        """Parts of a column."""
        return self.counts.shape[1]

    def places(self, kind: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where units and constants of step s of a kind begin: two (a, b) for ``a * s + b``."""
        (unit, vector), (units, vectors) = self.ends, (UNITS[kind], VECTORS[kind])
        if kind == 0:
            return (-units, unit - units), (-vectors, vector - vectors)
        return (units, 0 if kind == 1 else unit), (vectors, 0 if kind == 1 else vector)


class Pairing:
    """Chooses the steps of int8 units ``[columns][units][width]``; four neighbours of the last axis are one output's
    and the width a multiple of 16.

    ``counts`` ([columns][3]) is how many plain, flipped and single steps each column has.
    """

    def __init__(self, units: np.ndarray) -> None:
        self.columns, self.each, self.width = units.shape
        self._gather(units)
        size = self.positive.sum(axis=1, dtype=np.int32) + self.negative.sum(axis=1, dtype=np.int32)
        order = np.lexsort((-size[:-1], self.column))
        good, bad = order[self.good[order]], order[~self.good[order]]
        # Those that need a complement come first: they fit with few others. So do the large ones among the others.
        first, good, bad = self._match(good, bad, self._fit_flipped)
        plain, good = self._among(good, self._fit)
        second, good, bad = self._match(good, bad, self._fit_flipped)
        lowest = self.lowest[good]
        third, free = self._among(good[~lowest], self._fit_flipped)
        single = np.concatenate([free, good[lowest], bad])
        self.steps = [self._sorted(s) for s in (plain, np.concatenate([first, second, third]), single[:, None])]
        kinds = [np.bincount(self.column[steps[:, 0]], minlength=self.columns) for steps in self.steps]
        self.counts = np.stack(kinds, axis=1)

    def _gather(self, units: np.ndarray) -> None:
        """All units in one list by columns; the last one of all is zero.

        ``positive`` and ``negative`` (uint8 [units][width / 2]) are the sums of the weights of either sign of a pair;
        ``good``: needs no complement; ``lowest``: has a weight of -128, whose opposite is no int8.
        """
        columns, count, width = units.shape
        self.column = np.repeat(np.arange(columns), count)
        self.number = np.tile(np.arange(count), columns)
        weights = units.reshape(-1, width)
        # A unit that needs a complement has no -128: what that is more than -127 becomes a unit of its own.
        lowest = np.flatnonzero((weights == -128).any(axis=1))
        lowest = lowest[~_good(weights[lowest])]
        if lowest.size:
            weights = np.concatenate([weights, np.where(weights[lowest] == -128, -1, 0).astype(np.int8)])
            weights[lowest] = np.maximum(weights[lowest], -127)
            self.column = np.concatenate([self.column, self.column[lowest]])
            self.number = np.concatenate([self.number, self.number[lowest]])
            order = np.argsort(self.column, kind="stable")
            self.column, self.number, weights = self.column[order], self.number[order], weights[order]
        self.number = np.append(self.number, 0)
        self.weights = np.concatenate([weights, np.zeros((1, width), np.int8)])
        self.positive, self.negative = _signs(self.weights)
        self.good = _good(self.weights)[:-1]
        self.lowest = (self.weights == -128).any(axis=1)
        self.sizes = np.abs(self.weights[:, 0::2]).view(np.uint8), np.abs(self.weights[:, 1::2]).view(np.uint8)

    # -- what fits

    def _fit(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether units can be added as they are."""
        fits = self.positive.take(a, axis=0) <= BOUND - self.positive.take(b, axis=0)
        fits &= self.negative.take(a, axis=0) <= BOUND - self.negative.take(b, axis=0)
        return _all(fits)

    def _fit_flipped(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether they can with inputs of `b` complemented (each weight of `b` can take either sign)."""
        up, down, first, second = self._room(a, b)
        both = first + second
        fits = both <= up
        fits |= both <= down
        fits |= (first <= up) & (second <= down)
        fits |= (second <= up) & (first <= down)
        return _all(fits)

    def _room(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
        """What `a` leaves for positive and negative weights, and the magnitudes of the two weights of `b`."""
        rooms = (BOUND - part.take(a, axis=0) for part in (self.positive, self.negative))
        return (*rooms, *(part.take(b, axis=0) for part in self.sizes))

    # -- who goes with whom

    def _match(self, first: np.ndarray, second: np.ndarray, fits: _Fits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs (one of `first`, one of `second`, of the same column) that fit, and what is left of both."""
        found: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
        sides = [first, second]
        counts = [np.bincount(self.column[side], minlength=self.columns) for side in sides]
        for turn in range(_TURNS):
            least = np.minimum(*counts)
            if not least.any():
                break
            # The shorter side in order, of the longer one a run that starts further on at each turn.
            which = np.repeat(np.arange(self.columns), least)
            rank = _ranks(least)
            tried: list[np.ndarray] = []
            for count, turned in zip(counts, (counts[0] > counts[1], counts[0] <= counts[1])):
                place = rank + np.where(turned, turn, 0)[which]
                place %= count[which]
                place += (np.cumsum(count) - count)[which]
                tried.append(place)
            held = np.flatnonzero(fits(sides[0][tried[0]], sides[1][tried[1]]))
            if not held.size:
                continue
            found.append(np.stack([side[place[held]] for side, place in zip(sides, tried)], axis=1))
            matched = np.bincount(which[held], minlength=self.columns)
            counts = [count - matched for count in counts]
            for i, place in enumerate(tried):
                left = np.ones(sides[i].size, bool)
                left[place[held]] = False
                sides[i] = sides[i][left]
        return np.concatenate(found), sides[0], sides[1]

    def _among(self, units: np.ndarray, fits: _Fits) -> tuple[np.ndarray, np.ndarray]:
        """Pairs among `units` (the largest of a column first) that fit, and what is left: large with small ones, then
        every other one with its neighbours."""
        found: list[np.ndarray] = []
        for halves in (True, False):
            counts = np.bincount(self.column[units], minlength=self.columns)
            rank = _ranks(counts)
            early = rank < np.repeat(counts // 2, counts) if halves else rank % 2 == 0
            large, small = units[early], units[~early]
            if halves:
                small = small[np.lexsort((-rank[~early], self.column[small]))]
            pairs, large, small = self._match(large, small, fits)
            found.append(pairs)
            units = np.sort(np.concatenate([large, small]))
        return np.concatenate(found), units

    def _sorted(self, steps: np.ndarray) -> np.ndarray:
        """Steps by columns, and in the order of their first unit, so that inputs are met as they lie."""
        return steps[np.argsort(steps[:, 0], kind="stable")]

    # -- the result

    def pack(self, chunk_bytes: int) -> PairedUnits:
        """The steps with their constants, in as many chunks as it takes for one to have at most `chunk_bytes`."""
        chunks = max(1, -(-int((self.counts @ VECTORS).max()) * self.width // chunk_bytes))
        shares = -(-self.counts // chunks)
        counts = np.clip(self.counts[:, None] - np.arange(chunks)[:, None] * shares[:, None], 0, shares[:, None])
        # Layers of one shape share a kernel more often if the numbers are few.
        coarse = max(1, self.each // 32)
        most = [-(-int(each) // coarse) * coarse for each in counts.max(axis=(0, 1))]
        packed = [_empty(counts, most, each) for each in (UNITS, VECTORS)]
        numbers = np.zeros((self.columns, chunks, packed[0][1]), np.int64)
        vectors = np.zeros((self.columns, chunks, packed[1][1], self.width), np.int8)
        ends = (packed[0][0], packed[1][0])
        offset = np.zeros((self.columns, self.width // 4), np.int64)
        result = PairedUnits((most[0], most[1], most[2]), ends, counts, numbers, vectors, offset)
        for kind, steps in enumerate(self.steps):
            column = self.column[steps[:, 0]]
            chunk, step = np.divmod(_ranks(self.counts[:, kind]), np.maximum(shares[:, kind], 1)[column])
            unit, vector = (step * a + b for a, b in result.places(kind))
            for i in range(UNITS[kind]):
                numbers[column, chunk, unit + i] = self.number[steps[:, i]]
                vectors[column, chunk, vector + i] = self.weights.take(steps[:, i], axis=0)
            if kind:
                flips = self._flips(steps[:, 0] if kind == 1 else None, steps[:, -1])
                weights = self.weights.take(steps[:, -1], axis=0)
                flipped = np.where(flips, weights, 0)
                lanes = flipped.reshape(len(steps), self.width // 4, 4).sum(axis=2, dtype=np.int64)
                np.add.at(offset, column, 255 * lanes)
                last = vector + UNITS[kind] - 1
                vectors[column, chunk, last] = weights - 2 * flipped
                vectors[column, chunk, last + 1] = -flips.astype(np.int8)
        return result

    def _flips(self, a: np.ndarray | None, b: np.ndarray) -> np.ndarray:
        """Of which weights of the units `b` the inputs are complemented, so that they fit (with those of `a`)."""
        a = np.full(b.shape, len(self.number) - 1) if a is None else a
        up, down, first, second = self._room(a, b)
        weights = self.weights.take(b, axis=0).reshape(*first.shape, 2)
        as_is = (self.positive.take(b, axis=0) <= up) & (self.negative.take(b, axis=0) <= down)
        both = first + second
        # The sign that each weight takes: as it is, both positive, both negative, or one of each.
        cases = [both <= up, both <= down, (first <= up) & (second <= down)]
        signs = np.stack([np.select(cases, [1, -1, 1], -1), np.select(cases, [1, -1, -1], 1)], axis=-1)
        flips = (weights != 0) & (np.sign(weights) != signs) & ~as_is[..., None]
        return np.asarray(flips.reshape(len(b), self.width))


def _empty(counts: np.ndarray, most: list[int], each: tuple[int, int, int]) -> tuple[int, int]:
    """Where single steps begin if steps have `each` elements, and the elements of all."""
    end = max(int((counts[..., :2] @ each[:2]).max()), most[0] * each[0], most[1] * each[1])
    return end, end + most[2] * each[2]


def _signs(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the positive and of the negative weights of each pair, as uint8 (at most 254 and 255)."""
    first, second = weights[:, 0::2], weights[:, 1::2]
    negative = np.minimum(first, 0, dtype=np.int16) + np.minimum(second, 0)
    positive = np.maximum(first, 0).view(np.uint8) + np.maximum(second, 0).view(np.uint8)
    return positive, np.minimum(-negative, 255).astype(np.uint8)


def _good(weights: np.ndarray) -> np.ndarray:
    """Whether no pair of a unit can saturate."""
    positive, negative = _signs(weights)
    return _all((positive <= BOUND) & (negative <= BOUND))


def _all(flags: np.ndarray) -> np.ndarray:
    """Whether all flags of a row hold, eight at a time (`all` along a short axis takes thirty times as long)."""
    words = np.ascontiguousarray(flags).view(np.uint64)
    held = words[:, 0] == 0x0101010101010101
    for word in range(1, words.shape[1]):
        held &= words[:, word] == 0x0101010101010101
    return np.asarray(held)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the runs of these lengths."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
