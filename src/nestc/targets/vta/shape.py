"""The geometry of a layer's tiles: which source pixels a tile needs, which outputs a tap reaches, which blocks meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layer import FeatureMap, Maximum, Product

Range = tuple[int, int]
Move = tuple[int, int, int]

START = 8
"""About the cycles of an ALU instruction beside its micro-ops, to weigh one of two cycles against several of one."""


@dataclass(frozen=True)
class Span:
    """Source pixels that are loaded: `height` rows, `row_step` apart, of `width` neighbours, from `first` on."""

    first: tuple[int, int]
    height: int
    width: int
    row_step: int

    @property
    def size(self) -> int:
        """Pixels."""
        return self.height * self.width


@dataclass(frozen=True)
class Rectangle:
    """Outputs from `first` on, `extent` rows and columns, whose pixel under one tap exists: `source` is the first's."""

    first: tuple[int, int]
    extent: tuple[int, int]
    source: tuple[int, int]
    step: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Input blocks whose products are summed together, and the pairs of a product that they take part in.

    ``runs``: where the weights of the pairs lie, as (first pair, length, count, stride, place): `count` runs of
    `length` pairs, `stride` apart in DRAM and packed from the pair `place` of the chunk on.
    """

    inputs: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True)
class Part:
    """Pairs of a chunk that loops can walk: from (output, input, pair), by extents and moves of the three.

    ``output`` counts from the tile's first block, ``input`` and ``pair`` from the chunk's first.
    """

    output: int
    input: int
    pair: int
    dimensions: tuple[tuple[int, tuple[int, int, int]], ...]


def stored_weights(step: Product) -> np.ndarray:
    """The weights of a product with one tap where all taps are the same, and one pair where all pairs are.

    int8 (pairs or 1, taps or 1, block, block). A diagonal for a sum or an average is one block then, not hundreds.
    """
    weights = step.weights
    if weights.shape[1] > 1 and np.array_equal(weights[0, 0], weights[0, 1]) and (weights == weights[:, :1]).all():
        weights = weights[:, :1]
    if len(weights) > 1 and np.array_equal(weights[0], weights[1]) and (weights == weights[:1]).all():
        weights = weights[:1]
    return weights


def lone_tap(step: Maximum) -> tuple[int, int] | None:
    """A tap whose row and column of pixels no other row or column of taps reads, of windows that are full rectangles.

    Windows that overlap at strides above 1 have one in their middle.
    """
    down, across = (sorted({tap[axis] for tap in step.taps}) for axis in (0, 1))
    if sorted(step.taps) != [(dy, dx) for dy in down for dx in across]:
        return None
    found: list[int] = []
    for offsets, stride in ((down, step.strides[0]), (across, step.strides[1])):
        alone = [k for k in offsets if sum((k - other) % stride == 0 for other in offsets) == 1]
        if not alone:
            return None
        found.append(min(alone, key=lambda k: abs(2 * k - offsets[0] - offsets[-1])))
    return found[0], found[1]


def block_count(map_: FeatureMap, config: VtaConfig) -> int:
    """Blocks of channels."""
    return -(-map_.channels // config.block)


def elements(map_: FeatureMap, config: VtaConfig) -> int:
    """Elements of a map in DRAM."""
    return -(-map_.batch // config.batch) * block_count(map_, config) * map_.height * map_.width


@lru_cache(maxsize=4096)
def source_span(step: Product | Maximum, source: FeatureMap, y: Range, x: Range) -> Span:
    """The source pixels of the outputs in rows `y` and columns `x`. Rows that no tap reads are left out."""
    (sy, sx), down, across = step.strides, [dy for dy, _ in step.taps], [dx for _, dx in step.taps]
    row_step = sy if len({dy % sy for dy in down}) == 1 else 1
    top, bottom = y[0] * sy + min(down), (y[1] - 1) * sy + max(down)
    if top < 0:
        top += (row_step - 1 - top) // row_step * row_step
    while bottom >= source.height:
        bottom -= row_step
    left, right = max(0, x[0] * sx + min(across)), min(source.width - 1, (x[1] - 1) * sx + max(across))
    if left < sx and right >= source.width - sx:
        left, right = 0, source.width - 1  # whole rows lie one after the other in DRAM
    height = max(0, (bottom - top) // row_step + 1)
    return Span((top, left), height, max(0, right - left + 1), row_step)


@lru_cache(maxsize=65536)
def rectangle(
    strides: tuple[int, int], tap: tuple[int, int], source: FeatureMap, y: Range, x: Range
) -> Rectangle | None:
    """The outputs of rows `y` and columns `x` whose source pixel under `tap` exists; None if there is none."""
    (first_y, last_y), (first_x, last_x) = (
        (max(low, -(offset // stride)), min(high, (size - 1 - offset) // stride + 1))
        for (low, high), offset, stride, size in zip((y, x), tap, strides, (source.height, source.width), strict=True)
    )
    if first_y >= last_y or first_x >= last_x:
        return None
    pixel = (first_y * strides[0] + tap[0], first_x * strides[1] + tap[1])
    return Rectangle((first_y, first_x), (last_y - first_y, last_x - first_x), pixel, strides)


@dataclass(frozen=True)
class TapGroup:
    """Taps under which the same outputs have a pixel: from number `tap`, whose rectangle is `area`.

    ``loops``: extents, and the moves (rows, columns, taps) in the source and in the list of taps.
    """

    area: Rectangle
    tap: int
    loops: tuple[tuple[int, Move], ...]


@lru_cache(maxsize=65536)
def tap_groups(
    strides: tuple[int, int], taps: tuple[tuple[int, int], ...], source: FeatureMap, y: Range, x: Range
) -> tuple[TapGroup, ...]:
    """The taps that reach a pixel from rows `y` and columns `x`, those at equal distances together, also in two loops.

    Inside a map a square of taps is one group; at a border those that reach over it are others.
    """
    alike: dict[tuple[Range, Range], list[tuple[int, Rectangle]]] = {}
    for tap, offset in enumerate(taps):
        area = rectangle(strides, offset, source, y, x)
        if area is not None:
            alike.setdefault((area.first, area.extent), []).append((tap, area))
    groups: list[TapGroup] = []
    for members in alike.values():
        areas = dict(members)
        runs = _runs_of_taps([(*area.source, tap) for tap, area in members])
        outer: tuple[tuple[int, Move], ...] = ()
        squares = _runs_of_taps([first for first, _, _ in runs])
        if len(squares) == 1 and len({run[1:] for run in runs}) == 1:
            outer, runs = (squares[0][1:],), runs[:1]
        groups += [TapGroup(areas[first[2]], first[2], (*outer, (count, move))) for first, count, move in runs]
    return tuple(groups)


def _runs_of_taps(places: list[Move]) -> list[tuple[Move, int, Move]]:
    """Places (row, column, tap) cut into runs (first, count, move) of equal moves that go on in the source."""
    runs: list[tuple[Move, int, Move]] = []
    for place in places:
        if runs:
            first, count, move = runs[-1]
            if count == 1:
                move = place[0] - first[0], place[1] - first[1], place[2] - first[2]
            next_ = first[0] + count * move[0], first[1] + count * move[1], first[2] + count * move[2]
            if place == next_ and move[:2] > (0, 0):
                runs[-1] = first, count + 1, move
                continue
        runs.append((place, 1, (0, 0, 0)))
    return runs


@lru_cache(maxsize=1024)
def chunks(pairs: tuple[tuple[int, int], ...], blocks: Range, inputs: int) -> tuple[Chunk, ...]:
    """The pairs of a product whose output block is among `blocks`, cut into chunks of `inputs` input blocks."""
    found = [(index, pair) for index, pair in enumerate(pairs) if blocks[0] <= pair[0] < blocks[1]]
    order = sorted({i for _, (_, i) in found})
    made: list[Chunk] = []
    for first in range(0, len(order), inputs):
        chosen = set(order[first : first + inputs])
        indices = [index for index, (_, i) in found if i in chosen]
        made.append(Chunk(tuple(order[first : first + inputs]), tuple(pairs[k] for k in indices), _runs(indices)))
    return tuple(made)


def _runs(indices: list[int]) -> tuple[tuple[int, int, int, int, int], ...]:
    """Runs of neighbouring numbers, equal ones at equal distances together."""
    simple: list[list[int]] = []
    for index in indices:
        if simple and simple[-1][0] + simple[-1][1] == index:
            simple[-1][1] += 1
        else:
            simple.append([index, 1])
    merged: list[tuple[int, int, int, int, int]] = []
    place = 0
    for first, length in simple:
        if merged:
            start, size, count, stride, at = merged[-1]
            if size == length and (count == 1 or first - start == count * stride):
                merged[-1] = (start, size, count + 1, first - start if count == 1 else stride, at)
                place += length
                continue
        merged.append((first, length, 1, length, place))
        place += length
    return tuple(merged)


def block_amounts(amounts: np.ndarray) -> list[int | None]:
    """The one amount by which a block is shifted, or None where its channels differ; int64 (blocks, block)."""
    return [int(row[0]) if (row == row[0]).all() else None for row in amounts]


def shift_runs(amounts: Sequence[int | None], positions: int) -> list[tuple[int, int, int | None]]:
    """Runs (first, last, amount) of a tile's blocks, each with one amount, or None for those shifted by a vector.

    A vector takes two cycles an accumulator; another instruction costs `START` cycles.
    """
    runs: list[tuple[int, int, int | None]] = []
    for block, amount in enumerate(amounts):
        if runs and runs[-1][2] == amount:
            runs[-1] = runs[-1][0], block + 1, amount
        else:
            runs.append((block, block + 1, amount))
    cycles = sum(START + (last - first) * positions * (2 if amount is None else 1) for first, last, amount in runs)
    return runs if cycles <= START + 2 * len(amounts) * positions else [(0, len(amounts), None)]


@lru_cache(maxsize=1024)
def groups_of(chunk: Chunk, first_block: int) -> tuple[Part, ...]:
    """The pairs of a chunk as loops: dense, diagonal and grouped products are one nest each."""
    at = {i: place for place, i in enumerate(chunk.inputs)}
    dense: list[list[int]] = []  # output, outputs, input, inputs, pair of a dense rectangle
    row: list[int] = []
    rows: list[list[int]] = []
    for pair, (o, i) in enumerate(chunk.pairs):
        if row and row[0] == o and row[1] + row[2] == at[i]:
            row[2] += 1
        else:
            row = [o, at[i], 1, pair]
            rows.append(row)
    for o, i, count, pair in rows:
        last = dense[-1] if dense else None
        if last and last[0] + last[1] == o and last[2:4] == [i, count] and pair == last[4] + last[1] * count:
            last[1] += 1
        else:
            dense.append([o, 1, i, count, pair])
    alike = len({(height, width) for _, height, _, width, _ in dense}) == 1
    moves = [tuple(b[k] - a[k] for k in (0, 2, 4)) for a, b in pairwise(dense)]
    if alike and len(set(moves)) <= 1 and all(move >= 0 for move in (moves[0] if moves else ())):
        o, height, i, width, pair = dense[0]
        outer = ((len(dense), (moves[0][0], moves[0][1], moves[0][2])),) if moves else ()
        return (Part(o - first_block, i, pair, (*outer, *_inner(height, width))),)
    return tuple(Part(o - first_block, i, pair, _inner(height, width)) for o, height, i, width, pair in dense)


def _inner(height: int, width: int) -> tuple[tuple[int, tuple[int, int, int]], ...]:
    return ((height, (1, 0, width)), (width, (0, 1, 1)))
