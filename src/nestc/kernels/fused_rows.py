"""A direct convolution as a part of a larger kernel, which asks for its rows."""

from __future__ import annotations

from collections.abc import Mapping

from nestc.graph.region import Op
from nestc.kernels.api import CpuMachine, Layout
from nestc.kernels.choices import ConvChoice
from nestc.kernels.conv import Direct
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.operands import Operands


class RowsOf(Direct):
    """The rows of a dense convolution of one group, one at a time; of a pointwise one the pixels as so many `lines`."""

    def __init__(
        self,
        operands: Operands,
        op: Op,
        machine: CpuMachine,
        layouts: Mapping[str, Layout],
        choice: ConvChoice,
        lines: int,
    ) -> None:
        self.lines = lines
        region = operands.region
        super().__init__(region, op, conv_shape(op, region), machine, layouts, 1, choice)
        self.operands, self.builder = operands, operands.builder
        self.row_chunk = 1

    def fold(self, pixels: int, widest: int) -> tuple[int, int]:
        """The given number of lines."""
        return self.lines, pixels // self.lines
