"""The sizes of a layer that its cycles depend on, without its numbers: what it reads of its sources, tile by tile."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.constants import Vectors, bound_that_sets
from nestc.targets.vta.layer import Clip, Init, Layer, Maximum, Product, Shift
from nestc.targets.vta.shape import block_amounts, block_count, lone_tap, stored_weights
from nestc.targets.vta.tiling import Share

Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Steps that only touch accumulators: `cycles` an accumulator in `starts` instructions a tile.

    ``digits``: weight blocks of an `Init`, an output block. ``vector``: the ALU reads a vector of channels. ``first``:
    cycles more, in an instruction more, the first time that a slot is used.
    """

    cycles: int
    starts: int
    digits: int = 0
    vector: bool = False
    first: int = 0


@dataclass(frozen=True, eq=False)
class Shifts:
    """A shift by amounts that differ: a number for each block that tells amounts apart, None where channels differ."""

    amounts: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Read:
    """What a `Product` or `Maximum` reads: a source of (blocks, height, width), at taps.

    ``by_block[o]``: the input blocks that output block o needs, sorted. ``shared``: all pairs have the same weights;
    ``stored``: taps of weights in memory. ``lone``: a maximum starts with a tap whose pixels no other tap reads.
    """

    source: tuple[int, int, int]
    strides: tuple[int, int]
    down: tuple[int, ...]
    across: tuple[int, ...]
    row_step: int
    by_block: tuple[tuple[int, ...], ...]
    maximum: bool
    shared: bool
    stored: int
    lone: bool = False


Part: TypeAlias = Elementwise | Shifts | Read


@dataclass(frozen=True, eq=False)
class Geometry:
    """All of a layer that its cycles depend on: layers of equal `key` are tiled alike.

    ``images`` x ``blocks`` x ``height`` x ``width`` output elements; ``digits`` of a bias, ``vectors`` of channels.
    """

    key: str
    images: int
    blocks: int
    height: int
    width: int
    parts: tuple[Part, ...]
    digits: int
    vectors: int

    @cached_property
    def reads(self) -> list[Read]:
        """The steps that read a source."""
        return [part for part in self.parts if isinstance(part, Read)]


def geometry(layer: Layer, config: VtaConfig) -> Geometry:
    """The sizes of a layer, without its numbers."""
    out = layer.output
    images, blocks = -(-out.batch // config.batch), block_count(out, config)
    vectors = Vectors(layer, Share((0, blocks), (0, out.height)), config)
    parts = [_part(layer, number, vectors, config) for number in range(len(layer.steps))]
    digest = hashlib.sha256(repr((images, blocks, out.height, out.width, vectors.digits, vectors.count)).encode())
    for part in parts:
        if isinstance(part, Read):
            digest.update(repr(replace(part, by_block=())).encode())
            digest.update(b"".join(np.array(inputs, np.int32).tobytes() + b"|" for inputs in part.by_block))
        else:
            digest.update(repr(part).encode())
    key = digest.hexdigest()
    return Geometry(key, images, blocks, out.height, out.width, tuple(parts), vectors.digits, vectors.count)


def _part(layer: Layer, number: int, vectors: Vectors, config: VtaConfig) -> Part:
    step = layer.steps[number]
    if isinstance(step, Product | Maximum):
        return _read(layer, step, config)
    if isinstance(step, Init):
        if not step.values.any():
            return Elementwise(1, 1)
        if step.values.ndim == 0:
            return Elementwise(2, 2) if bound_that_sets(step.values) is None else Elementwise(1, 1, first=1)
        if vectors.by_digits(number):
            return Elementwise(1 + vectors.digits, 2, vectors.digits)
        return Elementwise(3, 2, vector=True)
    if isinstance(step, Clip):
        bounds = (step.low is not None) + (step.high is not None)
        return Elementwise(bounds, bounds)
    if isinstance(step, Shift):
        amounts = vectors.blocked(step.amounts)
        if (amounts == amounts.flat[0]).all():
            instructions = int(amounts.flat[0] != 0)
            return Elementwise(instructions, instructions)
        names: dict[int | None, int | None] = {None: None}
        return Shifts(tuple(names.setdefault(amount, len(names)) for amount in block_amounts(amounts)))
    return Elementwise(1, 1)


def _read(layer: Layer, step: Product | Maximum, config: VtaConfig) -> Read:
    source = layer.sources[step.source]
    down, across = tuple(dy for dy, _ in step.taps), tuple(dx for _, dx in step.taps)
    row_step = step.strides[0] if len({dy % step.strides[0] for dy in down}) == 1 else 1
    blocks = block_count(layer.output, config)
    inputs: list[list[int]] = [[block] if isinstance(step, Maximum) else [] for block in range(blocks)]
    if isinstance(step, Product):
        for out, into in step.pairs:
            inputs[out].append(into)
    by_block, sizes = tuple(tuple(each) for each in inputs), (block_count(source, config), source.height, source.width)
    if isinstance(step, Maximum):
        lone = row_step == 1 and lone_tap(step) is not None
        return Read(sizes, step.strides, down, across, row_step, by_block, True, False, 0, lone)
    pairs, taps = stored_weights(step).shape[:2]
    return Read(sizes, step.strides, down, across, row_step, by_block, False, pairs < len(step.pairs), taps)


@dataclass(frozen=True)
class Axis:
    """One dimension of what a tile reads: source positions loaded, and for each tap the outputs that have a source."""

    size: int
    outputs: tuple[Range, ...]


@lru_cache(maxsize=65536)
def rows_read(cut: Range, stride: int, size: int, offsets: tuple[int, ...], step: int) -> Axis:
    """Rows of a source of `size` rows that the outputs of `cut` read at `offsets`; see `shape.source_span`."""
    first, bottom = cut[0] * stride + min(offsets), (cut[1] - 1) * stride + max(offsets)
    top = first if first >= 0 else first + -(first // step) * step
    bottom -= max(0, -(-(bottom - size + 1) // step)) * step
    return Axis(max(0, (bottom - top) // step + 1), _outputs(cut, stride, size, offsets))


@lru_cache(maxsize=65536)
def columns_read(cut: Range, stride: int, size: int, offsets: tuple[int, ...]) -> Axis:
    """As `_rows`, of columns, which are loaded without gaps."""
    left, right = max(0, cut[0] * stride + min(offsets)), min(size - 1, (cut[1] - 1) * stride + max(offsets))
    if left < stride and right >= size - stride:
        left, right = 0, size - 1
    return Axis(max(0, right - left + 1), _outputs(cut, stride, size, offsets))


def _outputs(cut: Range, stride: int, size: int, offsets: tuple[int, ...]) -> tuple[Range, ...]:
    """Outputs of `cut`, counted from its first, whose source exists, for each offset."""
    return tuple(
        (max(cut[0], -(offset // stride)) - cut[0], min(cut[1], (size - 1 - offset) // stride + 1) - cut[0])
        for offset in offsets
    )


@dataclass(frozen=True)
class Reach:
    """What a tile of outputs reads of a source: (rows, columns) that are loaded, and how its taps are summed.

    ``sums``: micro-ops of a pair of blocks. ``groups``: extents (height, width, taps) of each instruction.
    """

    rows: int
    columns: int
    sums: int
    groups: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=65536)
def reach_of(rows: Axis, columns: Axis) -> Reach:
    """Taps under which the same outputs have a source are one instruction; see `shape.tap_groups`."""
    alike = Counter(zip(rows.outputs, columns.outputs, strict=True))
    groups = tuple(
        (bottom - top, right - left, taps)
        for ((top, bottom), (left, right)), taps in alike.items()
        if top < bottom and left < right
    )
    return Reach(rows.size, columns.size, sum(h * w * taps for h, w, taps in groups), groups)
