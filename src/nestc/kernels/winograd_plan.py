"""How a Winograd convolution is cut: register tiles, items, and what it costs by the model."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, prod

from nestc.kernels.choices import below
from nestc.kernels.conv_shape import spilling
from nestc.kernels.position_products import Plan
from nestc.kernels.winograd_matrices import Transform
from nestc.kernels.winograd_tiles import Tiles


class Tiling(Tiles[Transform]):
    """The tiles of a convolution of floats."""


_FUSED_TILES = 96  # tiles from which on there are enough items for each to transform its inputs itself
_FUSED_WEIGHTS = 8  # or weights that are no larger than one part of L2 in so many, since every item reads them
_LEAST_TILES, _MOST_TILES = 10, 42  # of an item: so often is a weight used that was read from L3 or memory
_REUSE = 0.1  # share of the time that an item takes to read its weights which nothing hides
_PRODUCTS = 8  # share of L2 that M may take, which is read soon after it was written: one part in so many

# Of the cycles that the model counts (measured on a Zen 3 with layers of ResNet-18 and VGG16, one core).
_TRANSFORM = 0.5  # cycles of an instruction of the transforms
TILE = 25.0  # cycles that a register tile takes beside its multiply-adds, and a tile beside its transform
_RESULT = 2.5  # cycles of a register tile for each vector of results, where tiles are compared
MEMORY = 4.5  # bytes a cycle that weights come from memory with
_L2, L3 = 32.0, 10.0  # bytes a cycle that weights come from there with, or V is written and read
_EXPOSED = 0.25  # part of the shorter of two things that are done at once, and which is not hidden by the longer one
_DIRECT = 0.85  # share of the peak that direct kernels reach


@lru_cache(maxsize=1024)
def plan(t: Tiling, fused: bool | None = None) -> Plan:
    """A cut for `t` by sizes alone; `fused` may be given."""
    mr, nr = tile(t.count, t.vectors, t.shape.in_channels, t.machine.tile_registers)
    if fused is None:
        fused = t.count >= _FUSED_TILES or _weight_bytes(t) <= t.machine.l2_bytes // _FUSED_WEIGHTS
    count = ceil(t.count / mr)
    columns = ceil(t.vectors / nr)
    least, most = ceil(_LEAST_TILES / mr), max(1, _MOST_TILES // mr)
    groups = min(
        range(min(count, least), min(count, most) + 1), key=lambda groups: _item_cost(t, count, groups, mr, fused)
    )
    chunk = max(1, t.machine.l2_bytes // _PRODUCTS // (4 * t.positions * groups * mr * nr * t.lanes))
    return Plan(mr, nr, groups, below(columns, chunk), fused)


def _item_cost(t: Tiling, count: int, groups: int, mr: int, fused: bool) -> float:
    """Relative time of `count` groups of tiles in items of `groups`: weights are read once an item, and two or four
    workers wait for the last one, which something may have held up (unless they have outputs to share)."""
    items = ceil(count / groups)
    waiting = 1.0
    if fused:
        waiting = sum(share * (ceil(items / n) + 0.5) * n * groups / count for n, share in ((2, 0.7), (4, 0.3)))
    weights = _weight_bytes(t)
    rate = _L2 if weights <= t.machine.l2_bytes else L3 if weights <= t.machine.l3_bytes / 2 else MEMORY
    # A vector of weights is used for as many multiply-adds as the item has tiles, two a cycle.
    reading = _REUSE * 8 * t.lanes / (groups * mr) / rate
    return (1 + reading) * waiting + 0.001 * (items * groups - count)


def _weight_bytes(t: Tiling) -> int:
    """Bytes of the transformed weights."""
    return 4 * t.positions * t.blocks * t.lanes * t.vectors * t.lanes


def tile(tiles: int, vectors: int, channels: int, registers: int) -> tuple[int, int]:
    """Tiles and output vectors of a register tile that sums over `channels`.

    Unlike in a direct convolution all are as wide, so that the last one may be in part for nothing.
    """
    best, best_cost = (1, 1), float("inf")
    for nr in range(1, min(4, vectors) + 1):
        for mr in range(1, min(tiles, registers) + 1):
            factor = spilling(mr, nr, registers)
            if factor is None:
                break
            cost = factor * channels * step_cycles(mr, nr) + _RESULT * mr * nr
            cost *= ceil(tiles / mr) * ceil(vectors / nr)
            if cost < best_cost - 1e-9:
                best, best_cost = (mr, nr), cost
    return best


def step_cycles(mr: int, nr: int) -> float:
    """Cycles of one input channel of a register tile: multiply-adds, loads, or latency; weights come from L2."""
    return max(mr * nr / 2, (mr + nr) / 2, 4.0) + 0.1 * nr + 0.02 * mr


@lru_cache(maxsize=1024)
def cycles(t: Tiling, cut: Plan) -> float:
    """Modelled cycles on one core, its weights in memory; only comparisons with `direct_cycles` mean something."""
    rows, columns = t.axes
    tiles = t.groups(cut) * ceil(t.vectors / cut.nr)
    products = t.positions * tiles * (t.shape.in_channels * step_cycles(cut.mr, cut.nr) + TILE)
    into = columns.n * (2 * rows.n + _input_steps(rows)) + rows.n * (2 * columns.n + _input_steps(columns))
    back = columns.n * (rows.n + rows.m + _output_steps(rows))
    back += rows.m * (columns.n + 3 * columns.m + _output_steps(columns))
    inputs = 4.0 * t.positions * t.groups(cut) * cut.mr * t.blocks * t.lanes
    spilled = 0.0 if cut.fused or inputs <= t.machine.l2_bytes / 2 else 2 * inputs / L3
    transforms = t.count * (t.blocks * (_TRANSFORM * into + TILE) + t.vectors * (_TRANSFORM * back + TILE))
    weights = 4.0 * t.positions * t.blocks * t.lanes * t.vectors * t.lanes / MEMORY
    return transforms + spilled + together(products, weights)


def direct_cycles(t: Tiling) -> float:
    """Modelled cycles of the direct kernel on the same terms."""
    s = t.shape
    products = s.flops / (4 * t.lanes) / _DIRECT
    weights = 4.0 * prod(s.kernel) * t.blocks * t.lanes * t.vectors * t.lanes / MEMORY
    return together(products, weights)


def together(a: float, b: float) -> float:
    """Cycles of two things that are done at once."""
    return max(a, b) + _EXPOSED * min(a, b)


def _input_steps(t: Transform) -> int:
    """Arithmetic instructions of an input transform along one axis."""
    if t.phases is not None:
        return sum(map(_input_steps, t.phases))
    return t.n * (t.n - 2) // 2 if t.r > 1 else 0


def _output_steps(t: Transform) -> int:
    """Arithmetic instructions of an output transform along one axis."""
    if t.phases is not None:
        return t.m + sum(map(_output_steps, t.phases))
    pairs = len(t.pairs)
    return 2 * pairs + t.m * (pairs - 1) + 2 if pairs else 0
