"""How a Winograd convolution is cut: register tiles, items, and what it costs by the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from nestc.kernels.api import CpuMachine
from nestc.kernels.conv_shape import ConvShape, register_tile
from nestc.kernels.winograd_matrices import Transform


@dataclass(frozen=True)
class Plan:
    """``mr`` tiles and ``nr`` vectors of outputs a register tile; ``groups`` register tiles' tiles and ``columns``
    register columns of outputs an item. ``fused``: an item transforms its tiles' inputs itself and loops over the
    chunks of outputs; else the items are all pairs, those of one chunk of outputs together if ``outputs_first``."""

    mr: int
    nr: int
    groups: int
    columns: int
    fused: bool
    outputs_first: bool = False


@dataclass(frozen=True)
class Tiling:
    """The tiles of a convolution: `axes` are the transforms along rows (vertical) and columns (horizontal)."""

    shape: ConvShape
    axes: tuple[Transform, Transform]
    machine: CpuMachine

    @property
    def lanes(self) -> int:
        """Channels of a block."""
        return self.machine.lanes("float32")

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along each axis of an image."""
        out = self.shape.out if len(self.shape.out) == 2 else (1, *self.shape.out)
        return ceil(out[0] / self.axes[0].m), ceil(out[1] / self.axes[1].m)

    @property
    def count(self) -> int:
        """Tiles of all images."""
        return self.shape.batch * prod(self.grid)

    @property
    def positions(self) -> int:
        """Products of a tile and a pair of channels."""
        return self.axes[0].n * self.axes[1].n

    @property
    def blocks(self) -> int:
        """Blocks of input channels."""
        return ceil(self.shape.in_channels / self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors of output channels."""
        return ceil(self.shape.out_channels / self.lanes)

    def groups(self, cut: Plan) -> int:
        """Register tiles' tiles in all."""
        return ceil(self.count / cut.mr)

    def steps(self, cut: Plan) -> int:
        """Chunks of outputs."""
        return ceil(ceil(self.vectors / cut.nr) / cut.columns)


_FUSED_TILES = 96  # tiles from which on there are enough items for each to transform its inputs itself
_ITEM_TILES = 24  # tiles of an item: as often is a weight used that is read from L3 or memory
_PRODUCTS = 3  # share of L2 that M may take: one part in so many


def plan(t: Tiling) -> Plan:
    """A cut for `t` by sizes alone."""
    mr, nr = register_tile(t.vectors, t.count, t.machine.tile_registers)
    mr = ceil(t.count / ceil(t.count / mr))
    fused = t.count >= _FUSED_TILES
    count = ceil(t.count / mr)
    groups = max(1, min(count, _ITEM_TILES // mr))
    groups = ceil(count / ceil(count / groups))
    columns = ceil(t.vectors / nr)
    most = t.machine.l2_bytes // _PRODUCTS // (4 * t.positions * groups * mr * nr * t.lanes)
    if not fused:
        most = min(most, max(1, ceil(count / groups) * columns // 16))
    chunk = max(1, min(columns, most))
    while columns % chunk:
        chunk -= 1
    return Plan(mr, nr, groups, chunk, fused)


def seconds(t: Tiling) -> float:
    """Modelled seconds on one core at a nominal clock; only their order means something."""
    s = t.shape
    flops = 2.0 * t.positions * t.count * s.in_channels * s.out_channels
    rows, columns = t.axes
    moved = (
        t.count * (rows.n + columns.n) * t.blocks * columns.n * 12
        + t.count * t.vectors * (columns.n + rows.m) * rows.n * 12
    )
    bytes_ = 4.0 * t.positions * s.in_channels * s.out_channels
    return flops / 80e9 + moved / 6e9 + (bytes_ / 20e9 if bytes_ > t.machine.l2_bytes * 8 else 0.0)


def direct_seconds(t: Tiling) -> float:
    """Modelled seconds of the direct kernel on the same terms."""
    return t.shape.flops / 80e9
