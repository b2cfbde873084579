"""A direct convolution and the pool that reads it, as one kernel: rows go from one to the other in scratch memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family, Layout, Lowered
from nestc.kernels.choices import CONV_BY_RULE, ConvChoice, below
from nestc.kernels.conv import CONV, ConvFamily
from nestc.kernels.conv_shape import conv_shape, register_tile
from nestc.kernels.fused import (
    BARRIER_SECONDS,
    FLOPS_PER_SECOND,
    STREAM_RATE,
    Pair,
    element_bytes,
    idle,
    joined_layouts,
    parts,
    rate,
)
from nestc.kernels.fused_rows import RowsOf
from nestc.kernels.operands import Index, Operands
from nestc.kernels.pool import POOL, WINDOWED, Window, Windowed, pooling_of, windows
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, less, load, within
from nestc.tensor.ir import Expr

_LEAST_ITEMS = 8
"""Items of the parallel loop; each computes a few rows that its neighbour computes as well."""


_SLOWER = 0.1
"""What a convolution takes longer a row at a time."""


class ConvPool:
    """Conv of one group with its tail, in float32 or float64, and a MaxPool or AveragePool of rows and columns.

    Sums are those of the two kernels to the bit.
    """

    exact = True

    def __init__(self, choice: ConvChoice = CONV_BY_RULE) -> None:
        self.choice = choice
        self.name = f"conv_pool{choice.text}"

    def replacing(self, first: Family, second: Family) -> ConvPool | None:
        """This family with the tile of the convolution if that would be computed directly, else None."""
        return ConvPool(first.choice) if isinstance(first, ConvFamily) else None

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None:
            return "it is not two regions"
        if pair.first.ops[0].op_type != "Conv" or pair.anchor.op_type not in WINDOWED:
            return "they are not a convolution and a pool"
        reason = CONV.refusal(pair.first) or POOL.refusal(pair.second)
        if reason is not None:
            return reason
        if pair.anchor.output(1) and pair.anchor.output(1) in region.outputs:
            return "places of maxima are not computed here"
        shape = conv_shape(pair.first.ops[0], pair.first)
        if shape.group != 1 or (prod(shape.kernel) == 1 and not shape.pointwise):
            return "only dense convolutions are computed by rows"
        if len(shape.squeezed().out) != 2 or len(windows(pair.anchor, pair.second)) != 2:
            return "only maps of rows and columns are cut into bands"
        return None

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that are saved: the pool need not read the map from afar (that it is written there hides
        behind the sums), but items compute rows that their neighbours compute as well, and may be too few."""
        pair = parts(region)
        assert pair is not None
        shape = conv_shape(pair.first.ops[0], pair.first)
        element = element_bytes(region.types[pair.between])
        lanes = machine.lanes("float32")
        vectors = ceil(shape.out_channels / lanes)
        taps = shape.in_channels * prod(shape.kernel)
        if 2 * taps * lanes * element > machine.l1_bytes * 3 // 4:
            return 0.0  # weights that leave L1 are better read once for several rows
        _, group = self.choice.tile or register_tile(vectors, shape.out[1], machine.tile_registers)
        images = shape.batch * ceil(vectors / group)
        line_bytes = group * lanes * element * shape.out[1]
        cut = _cut(windows(pair.anchor, pair.second)[0], images, line_bytes, machine)
        between = element * shape.out_channels * prod(shape.out)
        spared = shape.batch * between / min(STREAM_RATE, rate(machine, between))
        work = shape.flops / FLOPS_PER_SECOND
        slower = _SLOWER + (cut.strips - 1) * cut.overlap / shape.out[0] + idle(images * cut.strips, threads)
        return (spared - slower * work) / threads + (BARRIER_SECONDS if threads > 1 else 0.0)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As both want them, with blocks between them."""
        pair = parts(region)
        assert pair is not None
        before = CONV.layouts(pair.first, machine, {name: incoming[name] for name in pair.first.inputs})
        return joined_layouts(pair, before, POOL, machine, incoming)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel; an item of its parallel loop is a group of channels in a strip of rows of an image."""
        pair = parts(region)
        assert pair is not None
        both = {**layouts, pair.between: Layout(machine.lanes("float32"))}
        return _Rolling(pair, Operands(Builder("conv_pool"), region, both), machine, both, self.choice).lower()


@dataclass(frozen=True)
class _Cut:
    """How rows of a pool are cut: into `strips`, each of `bands` of `rows`. A band reads `reach` rows of the map, of
    which the first `overlap` are the last ones of the band before."""

    strips: int
    bands: int
    rows: int
    reach: int
    overlap: int


def _cut(window: Window, images: int, line_bytes: int, machine: CpuMachine) -> _Cut:
    """Strips so that there are a few items for `images` (of a group of channels); bands whose rows, of so many bytes
    each, take a quarter of L2."""
    enough = min(window.out, ceil(_LEAST_ITEMS / images))
    divisors = [count for count in range(1, 2 * enough + 1) if window.out % count == 0]
    strips = next((count for count in divisors if count >= enough), divisors[-1])
    rows = window.out // strips
    taps = (window.kernel - 1) * window.dilation + 1
    room = (machine.l2_bytes // 4 // line_bytes - taps) // window.stride + 1
    each = below(rows, max(1, min(rows, room)))
    reach = (each - 1) * window.stride + taps
    return _Cut(strips, rows // each, each, reach, max(0, reach - each * window.stride))


class _Rolling:
    """Builds the kernel. Rows of the map lie in scratch memory [vector of channels][row of the band][column][lanes];
    the last ones move to the front where the next band reads them again."""

    def __init__(
        self,
        pair: Pair,
        operands: Operands,
        machine: CpuMachine,
        layouts: Mapping[str, Layout],
        choice: ConvChoice,
    ) -> None:
        op = pair.first.ops[0]
        self.operands, self.builder = operands, operands.builder
        self.shape = shape = conv_shape(op, pair.first)
        self.lanes = machine.lanes("float32")
        self.window = windows(pair.anchor, pair.second)[0]
        type_ = operands.type(pair.between)
        after = operands.part(pair.second)
        self.conv = RowsOf(operands.part(pair.first), op, machine, layouts, choice, shape.out[0])
        self.vectors = ceil(shape.out_channels / self.lanes)
        self.groups, group = self.conv.group_chunks, self.conv.nr
        line_bytes = group * self.lanes * shape.out[1] * element_bytes(type_)
        self.cut = _cut(self.window, shape.batch * self.groups, line_bytes, machine)
        self.group: Expr = ix.const(0)
        self.first: Expr = ix.const(0)
        self.written: Expr | None = None
        self.band = self.builder.scratch("band", (group, self.cut.reach, shape.out[1], self.lanes), type_.dtype)
        operands.hold(pair.between, self.band, self.place)
        self.pool = Windowed(pooling_of(pair.anchor, after), after, machine)

    def place(self, index: Index) -> Index:
        """Place of an element of the map: of the row that is being written, or one that the band has."""
        group, reach, _, _ = self.band.shape
        _, channel, row, column = index
        vector = _within(ix.sub(ix.floordiv(channel, self.lanes), ix.mul(self.group, group)), group)
        line = _within(ix.sub(row, self.first), reach) if self.written is None else self.written
        return vector, line, column, ix.mod(channel, self.lanes)

    def lower(self) -> Lowered:
        """The kernel and its packed weights."""
        k, cut = self.builder, self.cut
        constants = self.conv.declare()
        self.pool.declare()
        with k.parallel("item", self.shape.batch, self.groups, cut.strips) as (n, group, strip):
            self.group = group
            with k.loop("b", cut.bands) as band:
                above = ix.add(ix.mul(strip, cut.bands), band)
                self.first = ix.add(ix.mul(above, cut.rows * self.window.stride), -self.window.begin)
                self.fill(n, band)
                with k.loop("v", self.band.shape[0]) as v, k.loop("y", cut.rows) as y:
                    vector = ix.add(ix.mul(group, self.band.shape[0]), v)
                    with k.when(less(vector, self.vectors)):
                        vector = binary("min", vector, ix.const(self.vectors - 1))
                        self.pool.one_row(n, vector, [ix.add(ix.mul(above, cut.rows), y)])
                if cut.bands > 1:
                    self.keep()
        return Lowered((self.operands.launch(),), constants={**self.operands.constants, **constants})

    def fill(self, n: Expr, band: Expr) -> None:
        """Compute the rows of a band that are inside the map and not there from the band before."""
        k, last = self.builder, self.shape.out[0] - 1
        with k.loop("r", self.cut.reach) as r:
            row = ix.add(self.first, r)
            fresh = binary("or", binary("eq", band, ix.const(0)), binary("ge", r, ix.const(self.cut.overlap)))
            with k.when(binary("and", fresh, within(row, last + 1))):
                # Of a row that is seen to be inside, no store needs a mask.
                self.written = r
                self.conv.rows(n, self.group, clamp(row, 0, last), 1)
                self.written = None

    def keep(self) -> None:
        """Move the rows that the next band reads, too, to the front."""
        k, cut = self.builder, self.cut
        group, reach, columns, lanes = self.band.shape
        with k.loop("kv", group) as v, k.loop("kr", cut.overlap) as r, k.loop("kc", columns) as c:
            value = load(self.band, v, ix.add(r, reach - cut.overlap), c, 0, lanes=lanes)
            k.store(self.band, (v, r, c, 0), value)


def _within(index: Expr, extent: int) -> Expr:
    """`index`, which lies in [0, extent), in a form that shows it."""
    low, high = ix.bounds(index)
    return index if low >= 0 and high < extent else clamp(index, 0, extent - 1)


CONV_POOL = ConvPool()
