"""A direct convolution as a part of a larger kernel, which asks for its rows."""

from __future__ import annotations

from collections.abc import Mapping

from nestc.graph.region import Op
from nestc.kernels.api import CpuMachine, Layout
from nestc.kernels.choices import CONV_BY_RULE
from nestc.kernels.conv import Direct
from nestc.kernels.conv_shape import conv_shape, register_tiles
from nestc.kernels.operands import Operands

_SPARE, _MOST_VECTORS = 2, 4
"""Registers that a tile leaves free, and vectors of outputs that it has at most: LLVM keeps constants of the other
part's tail in registers through the whole kernel, and a tile that needs all of them spills its weights."""


class RowsOf(Direct):
    """The rows of a dense convolution of one group, one at a time; of a pointwise one the pixels as so many `lines`."""

    def __init__(
        self, operands: Operands, op: Op, machine: CpuMachine, layouts: Mapping[str, Layout], lines: int
    ) -> None:
        self.lines = lines
        region = operands.region
        super().__init__(region, op, conv_shape(op, region), machine, layouts, 1, CONV_BY_RULE)
        self.operands, self.builder = operands, operands.builder
        self.row_chunk = 1

    def register_tile(self, vectors: int, pixels: int, registers: int) -> tuple[int, int]:
        """The best of the tiles that leave registers for the rest of the kernel."""
        tiles = register_tiles(vectors, pixels, registers - _SPARE)
        return next((tile for tile in tiles if tile[1] <= _MOST_VECTORS), tiles[0])

    def fold(self, pixels: int, widest: int) -> tuple[int, int]:
        """The given number of lines."""
        return self.lines, pixels // self.lines
