"""ConvTranspose gathered by phase: outputs that lie a stride apart are a plain convolution with a part of the taps.

Along an axis, with ``u = o + pad``, phase ``f = u % stride`` and ``m = u // stride``, output o is the sum over the taps
k with ``(f - k * dilation) % stride == 0`` of ``input[m + (f - k * dilation) / stride] * weight[k]``. No product
has a zero between inputs as a factor, and one loop nest serves all phases: what differs are small tables of taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered, physical_shape
from nestc.kernels.conv_shape import register_tile
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, load, splat, within
from nestc.tensor.ir import Block, Buffer, Const, Expr, Fma, Load, Reduce, Store, Var
from nestc.tensor.rewrite import binary, cast
from nestc.tensor.vectorize import vectorize

_MOST_PHASES = 4096


@dataclass(frozen=True)
class Axis:
    """One spatial axis."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    @property
    def first(self) -> int:
        """The smallest m of an output."""
        return self.pad // self.stride

    @property
    def count(self) -> int:
        """How many m there are."""
        return (self.pad + self.out - 1) // self.stride + 1 - self.first

    def taps(self, phase: int) -> list[tuple[int, int]]:
        """Taps of a phase: the kernel's index, and the input's place relative to m."""
        found = ((k, phase - k * self.dilation) for k in range(self.kernel))
        return [(k, distance // self.stride) for k, distance in found if distance % self.stride == 0]

    def border(self, width: int) -> tuple[int, int]:
        """Zeros before and after the input so that `width` values of m read inside it."""
        places = [p for phase in range(self.stride) for _, p in self.taps(phase)]
        low, high = self.first + min(places), self.first + width - 1 + max(places)
        return max(0, -low), max(0, high - self.size + 1)


@dataclass(frozen=True)
class Geometry:
    """Sizes of one node."""

    batch: int
    group: int
    channels: int
    features: int
    axes: tuple[Axis, ...]


def geometry(op: Op, region: Region) -> Geometry:
    """Read a ConvTranspose node, its paddings resolved as the specification says."""
    x, w, y = (region.types[name].shape for name in (op.inputs[0], op.inputs[1], op.outputs[0]))
    rank = len(x) - 2
    strides, dilations = _ints(op, "strides", (1,) * rank), _ints(op, "dilations", (1,) * rank)
    extra, begin = _ints(op, "output_padding", (0,) * rank), list(_ints(op, "pads", (0,) * 2 * rank)[:rank])
    mode = op.attributes.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") or op.attributes.get("output_shape"):
        for d in range(rank):
            total = strides[d] * (x[2 + d] - 1) + extra[d] + (w[2 + d] - 1) * dilations[d] + 1 - y[2 + d]
            total = max(0, total)
            begin[d] = total // 2 if mode == "SAME_UPPER" else total - total // 2
    elif mode == "VALID":
        begin = [0] * rank
    group = op.attributes.get("group", 1)
    assert isinstance(group, int)
    axes = tuple(Axis(*a) for a in zip(x[2:], y[2:], w[2:], strides, dilations, begin))
    return Geometry(x[0], group, x[1], y[1], axes)


def _ints(op: Op, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = op.attributes.get(name)
    return tuple(int(v) for v in value) if isinstance(value, tuple) and value else default


def is_narrow(g: Geometry, lanes: int) -> bool:
    """Whether there are so few output channels that vectors of them would be mostly empty."""
    return g.group == 1 and g.features * 2 <= lanes <= g.channels


def _anchor(region: Region) -> Op | None:
    found = (op for op in region.ops if op.op_type == "ConvTranspose" and op.domain in ("", "ai.onnx"))
    return next(found, None)


class ConvTranspose:
    """float32 transposed convolution of any rank; a vector holds output channels."""

    name = "conv_transpose"

    def refusal(self, region: Region) -> str | None:
        """Why the region cannot be lowered here."""
        op = _anchor(region)
        if op is None:
            return "no ConvTranspose"
        where = f"ConvTranspose (node {op.name!r})"
        x, y = region.types[op.inputs[0]], region.types[op.outputs[0]]
        if x.dtype != "float32":
            return f"{where} on {x.dtype}"
        if 0 in x.shape or 0 in y.shape or len(x.shape) < 3:
            return f"{where} has no spatial axes or works on an empty tensor"
        g = geometry(op, region)
        if prod(a.stride for a in g.axes) > _MOST_PHASES:
            return f"{where} has {prod(a.stride for a in g.axes)} phases"
        # Blocks of 16 channels serve every vector width.
        if g.group > 1 and (g.channels // g.group % 16 or g.features // g.group % 16):
            return f"{where} has groups of {g.channels // g.group} to {g.features // g.group} channels"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Any input as it comes; the output in NCHWc unless it has few channels."""
        op = _anchor(region)
        assert op is not None
        block = machine.lanes("float32")
        type_ = region.types[op.outputs[0]]
        own = Layout(block) if block > 1 and type_.shape[1] * 2 > block else PLAIN
        chosen = {name: incoming.get(name, PLAIN) for name in region.inputs}
        for name in (*region.inputs, *region.outputs):
            if region.types[name].shape == type_.shape and name != op.inputs[0]:
                chosen[name] = own
        source = chosen.get(op.inputs[0], PLAIN)
        weights = {name: PLAIN for name in op.inputs[1:] if name in chosen}
        return {**chosen, **weights, op.inputs[0]: source if source.block in (0, block) else PLAIN}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Launches: packing of weights that are not constant, a copy of the input with a border, the product."""
        op = _anchor(region)
        assert op is not None
        return _Lowering(op, region, machine, layouts).run()


class _Lowering:
    """Tile sizes, tables, and the kernels of one node."""

    def __init__(self, op: Op, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> None:
        self.op = op
        self.region = region
        self.layouts = layouts
        g = self.geometry = geometry(op, region)
        self.lanes = machine.lanes("float32")
        self.block = layouts.get(op.inputs[0], PLAIN).block
        self.last = len(g.axes) - 1
        vectors = ceil(g.features // g.group / self.lanes)
        columns = g.axes[-1].count
        widest, self.vectors = register_tile(vectors, columns, machine.tile_registers)
        # A few output channels would leave most lanes idle, so then the lanes hold input channels.
        self.narrow = is_narrow(g, self.lanes) and self.block == self.lanes and op.inputs[1] in region.constants
        if self.narrow:
            widest, self.vectors = max(1, (machine.vector_registers - g.features - 1) // g.features), 1
        while g.group > 1 and vectors % self.vectors:
            self.vectors -= 1
        self.groups = ceil(vectors / self.vectors)  # of output vectors, in each group of the convolution
        self.width = ceil(columns / ceil(columns / widest))
        if not any(sum(a.border(a.count)) for a in g.axes):
            # Tiles that fill the row need no copy of the input, if they are not much narrower.
            exact = [width for width in range(1, widest + 1) if columns % width == 0 and width * 2 > widest]
            self.width = exact[-1] if exact else self.width
        self.turns = ceil(columns / self.width)
        widths = [a.count for a in g.axes[:-1]] + [self.turns * self.width]
        self.borders = [a.border(w) for a, w in zip(g.axes, widths)]
        self.padded = [before + a.size + after for a, (before, after) in zip(g.axes, self.borders)]
        # Channels of a block beyond the last are zeros in the input, and so are their weights.
        inner = g.channels // g.group
        self.depth = ceil(inner / self.block) * self.block if self.block else inner
        self.phases = [a.stride for a in g.axes]
        self.tap_lists = [
            list(product(*choice)) for choice in product(*([a.taps(f) for f in range(a.stride)] for a in g.axes))
        ]
        self.taps = max(1, max(map(len, self.tap_lists)))
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.temporaries: dict[str, TensorType] = {}
        self.launches: list[Launch] = []

    def run(self) -> Lowered:
        """All launches in order."""
        stem = self.op.outputs[0]
        self.weights, self.offsets, self.counts, self.sources, self.bordered = (
            f"{stem}.{part}" for part in ("weights", "offsets", "counts", "taps", "bordered")
        )
        self.tables()
        self.pack()
        self.copy()
        if self.narrow:
            self.reduce()
        else:
            self.multiply()
        return Lowered(tuple(self.launches), self.temporaries, self.constants)

    def constant(self, name: str, array: np.ndarray) -> None:
        """A packed constant."""
        self.constants[name] = np.ascontiguousarray(array)
        self.types[name] = TensorType(str(array.dtype), array.shape)

    def operands(self, name: str) -> Operands:
        """A new kernel that knows the packed values."""
        operands = Operands(Builder(name), self.region, self.layouts)
        for packed, type_ in self.types.items():
            operands.define(packed, type_)
        return operands

    def finish(self, operands: Operands) -> None:
        """Close a kernel."""
        self.launches.append(operands.launch())
        self.constants.update(operands.constants)

    def tables(self) -> None:
        """For each phase and tap: where it reads, relative to the number of m; and the number of taps of a phase."""
        axes = self.geometry.axes
        offsets = np.zeros((len(self.tap_lists), self.taps, len(axes)), np.int64)
        for phase, taps in enumerate(self.tap_lists):
            for t, tap in enumerate(taps):
                for d, (_, place) in enumerate(tap):
                    offsets[phase, t, d] = axes[d].first + place + self.borders[d][0]
        self.constant(self.offsets, offsets)
        if len({len(taps) for taps in self.tap_lists}) > 1:
            self.constant(self.counts, np.array([len(taps) for taps in self.tap_lists], np.int64))

    # -- weights: (group * groups, phase, tap, depth, vectors * lanes)

    def pack(self) -> None:
        """Weights in the order in which the product reads them; absent taps, channels and features are zero."""
        g = self.geometry
        inner, features = g.channels // g.group, g.features // g.group
        kernel = [a.kernel for a in g.axes]
        wide = self.groups * self.vectors * self.lanes
        shape = (g.group * self.groups, len(self.tap_lists), self.taps, self.depth, self.vectors * self.lanes)
        sources = np.full(shape[1:3], -1, np.int64)
        for phase, taps in enumerate(self.tap_lists):
            for t, tap in enumerate(taps):
                sources[phase, t] = np.ravel_multi_index([k for k, _ in tap], kernel)
        name = self.op.inputs[1]
        array = self.region.constant(name)
        if array is not None:
            full = np.zeros((g.group, self.depth, wide, prod(kernel) + 1), np.float32)
            full[:, :inner, :features, :-1] = array.reshape(g.group, inner, features, -1)
            chosen = full[:, :, :, sources]  # source -1 is the column of zeros at the end
            if self.narrow:
                lanes = chosen[0, :, :features].reshape(-1, self.block, features, *sources.shape)
                self.constant(self.weights, lanes.transpose(3, 4, 0, 2, 1))
                return
            split = chosen.reshape(g.group, self.depth, self.groups, self.vectors * self.lanes, *sources.shape)
            self.constant(self.weights, split.transpose(0, 2, 4, 5, 1, 3).reshape(shape))
            return
        self.constant(self.sources, sources)
        self.temporaries[self.weights] = self.types[self.weights] = TensorType("float32", shape)
        operands = self.operands("conv_transpose_pack")
        builder = operands.builder
        operands.define(name, TensorType("float32", (g.channels, features, prod(kernel))))
        source, table, target = (operands.buffer(n) for n in (name, self.sources, self.weights))
        lane = Var("lane", self.lanes)
        with builder.parallel("phase", *shape[:2]) as (group, phase):
            with builder.loop("tap", self.taps) as tap, builder.loop("channel", self.depth) as c:
                for r in range(self.vectors):
                    first = ix.add(ix.mul(ix.mod(group, self.groups), self.vectors), r)
                    feature = ix.add(ix.mul(first, self.lanes), lane)
                    k = load(table, phase, tap)
                    mask: Expr = binary("ge", k, ix.const(0))
                    mask = binary("and", mask, binary("lt", c, ix.const(inner)))
                    mask = binary("and", mask, binary("lt", feature, ix.const(features)))
                    channel = ix.add(ix.mul(ix.floordiv(group, self.groups), inner), c)
                    value = Load(source, (channel, feature, k), 1, mask)
                    at = (group, phase, tap, c, ix.add(lane, r * self.lanes))
                    builder.emit(vectorize((Store(target, at, value),), lane, ix.const(0), self.lanes))
        self.finish(operands)

    # -- input

    def copy(self) -> None:
        """A copy of the input between borders of zeros, if a tap can fall outside; the layout stays."""
        if not any(before or after for before, after in self.borders):
            self.bordered = ""
            return
        name = self.op.inputs[0]
        own = physical_shape(self.region.types[name], Layout(self.block))
        spatial = slice(2, 2 + len(self.padded))
        shape = (*own[:2], *self.padded, *own[spatial.stop :])
        self.temporaries[self.bordered] = self.types[self.bordered] = TensorType("float32", shape)
        operands = self.operands("conv_transpose_border")
        builder, source, target = operands.builder, operands.buffer(name), operands.buffer(self.bordered)
        lanes = self.block or 1
        column = self.padded[-1]
        with builder.parallel("row", *shape[:2], *self.padded[:-1]) as (n, c, *row):
            inside: Expr = Const(True, "bool")
            at: list[Expr] = []
            for i, (before, _), axis in zip(row, self.borders, self.geometry.axes):
                at.append(ix.sub(i, before))
                inside = binary("and", inside, within(at[-1], axis.size))

            def stretch(start: int, stop: int, copied: bool) -> None:
                with builder.loop("col", stop - start) as i:
                    where = ix.add(i, start)
                    rest = (ix.const(0),) if self.block else ()
                    value: Expr = constant(0, "float32", lanes)
                    if copied:
                        mask = None if isinstance(inside, Const) else inside
                        place = (n, c, *at, ix.sub(where, self.borders[-1][0]), *rest)
                        value = Load(source, place, lanes, mask)
                    builder.store(target, (n, c, *row, where, *rest), value)

            before = self.borders[-1][0]
            stretch(0, before, False)
            stretch(before, before + self.geometry.axes[-1].size, True)
            stretch(before + self.geometry.axes[-1].size, column, False)
        self.finish(operands)

    # -- product

    def reduce(self) -> None:
        """Few output channels: lanes are input channels, summed at the end of each output into a buffer of one row."""
        g, lanes = self.geometry, self.lanes
        operands = self.operands("conv_transpose_narrow")
        builder = operands.builder
        tail = Tail(operands, self.op)
        source = operands.buffer(self.bordered or self.op.inputs[0])
        weights, offsets = operands.buffer(self.weights), operands.buffer(self.offsets)
        counts = operands.buffer(self.counts) if self.counts in self.types else None
        tail.declare()
        total = builder.regs("total", (self.width, g.features), lanes)
        where = builder.regs("where", (len(g.axes),), 1, "int64")
        outer, last = g.axes[:-1], g.axes[-1]
        line = builder.scratch("line", (g.features, self.turns * self.width * last.stride))
        extents = [n for a in outer for n in (a.count, a.stride)]
        with builder.parallel("row", g.batch, *extents) as (n, *rows):
            ms, fs = rows[0::2], rows[1::2]
            row = [self.output(a, m, f) for a, m, f in zip(outer, ms, fs)]
            valid: Expr = Const(True, "bool")
            for a, o in zip(outer, row):
                valid = binary("and", valid, within(o, a.out))
            with builder.when(valid):
                with builder.loop("phase", last.stride) as f, builder.loop("tile", self.turns) as tile:
                    phase = ix.flatten((*fs, f), tuple(self.phases))
                    m = ix.mul(tile, self.width)
                    for j, feature in product(range(self.width), range(g.features)):
                        builder.store(total, (j, feature, 0), constant(0, "float32", lanes))
                    with builder.loop("tap", self.taps) as tap:
                        used: Expr = Const(True, "bool")
                        if counts is not None:
                            used = binary("lt", tap, load(counts, phase))
                        with builder.when(used):
                            self.locate(builder, offsets, where, (*ms, m), phase, tap)
                            with builder.loop("channel", self.depth // lanes) as c:
                                self.add_block(builder, source, weights, total, where, (n, phase, tap, c))
                    for j, feature in product(range(self.width), range(g.features)):
                        at = ix.add(ix.mul(ix.add(m, j), last.stride), f)
                        value = Reduce("add", load(total, j, feature, 0, lanes=lanes))
                        builder.store(line, (feature, at), value)
                for feature in range(g.features):
                    self.finish_line(operands, tail, line, feature, (n, *row))
        self.finish(operands)

    def locate(
        self, builder: Builder, offsets: Buffer, where: Buffer, m: tuple[Expr, ...], phase: Expr, tap: Expr
    ) -> None:
        """Put the input's place of a tap into registers; the intervals of table entries need the limits."""
        for d, i in enumerate(m):
            span = 0 if d < self.last else self.width - 1
            at = ix.add(i, load(offsets, phase, tap, d))
            builder.store(where, (d, 0), clamp(at, 0, self.padded[d] - 1 - span))

    def add_block(
        self, builder: Builder, source: Buffer, weights: Buffer, total: Buffer, where: Buffer, at: tuple[Expr, ...]
    ) -> None:
        """Multiply-adds of one tap and one block of input channels, for `reduce`."""
        n, phase, tap, c = at
        g, lanes = self.geometry, self.lanes
        place = [load(where, d, 0) for d in range(len(g.axes))]
        for j in range(self.width):
            index = (n, c, *place[:-1], ix.add(place[-1], j), ix.const(0))
            x = Load(source, index, lanes, Const(True, "bool"))
            for feature in range(g.features):
                weight = load(weights, phase, tap, c, feature, 0, lanes=lanes)
                known = load(total, j, feature, 0, lanes=lanes)
                builder.store(total, (j, feature, 0), Fma(x, weight, known))

    def finish_line(self, operands: Operands, tail: Tail, line: Buffer, feature: int, place: tuple[Expr, ...]) -> None:
        """Store a row of one output channel through the tail, as vectors."""
        builder, last = operands.builder, self.geometry.axes[-1]
        n, *row = place
        start = last.pad - last.first * last.stride
        name = self.op.input(2)

        def stores(o: Expr) -> Block:
            value: Expr = Load(line, (ix.const(feature), ix.add(o, start)))
            if name:
                value = binary("add", value, operands.load(name, (ix.const(feature),)))
            return tail.stores((n, ix.const(feature), *row, o), value)

        whole, rest = divmod(last.out, self.lanes)
        lane = Var("lane", self.lanes)
        with builder.loop("out", whole) as i:
            o = ix.add(ix.mul(i, self.lanes), lane)
            builder.emit(vectorize(stores(o), lane, ix.const(0), self.lanes))
        with builder.loop("out", rest) as i:
            builder.emit(stores(ix.add(i, whole * self.lanes)))

    def multiply(self) -> None:
        """A register tile of neighbouring m by a few vectors of output channels, for each phase in turn."""
        g, lanes = self.geometry, self.lanes
        operands = self.operands("conv_transpose")
        builder = operands.builder
        tail = Tail(operands, self.op)
        source = operands.buffer(self.bordered or self.op.inputs[0])
        weights, offsets = operands.buffer(self.weights), operands.buffer(self.offsets)
        counts = operands.buffer(self.counts) if self.counts in self.types else None
        tail.declare()
        total = builder.regs("total", (self.width, self.vectors), lanes)
        bias = builder.regs("bias", (self.vectors,), lanes)
        where = builder.regs("where", (len(g.axes),), 1, "int64")
        outer = g.axes[:-1]
        extents = [n for a in outer for n in (a.count, a.stride)]
        with builder.parallel("row", g.batch, g.group * self.groups, *extents) as (n, group, *rows):
            ms, fs = rows[0::2], rows[1::2]
            row = [self.output(a, m, f) for a, m, f in zip(outer, ms, fs)]
            valid: Expr = Const(True, "bool")
            for a, o in zip(outer, row):
                valid = binary("and", valid, within(o, a.out))
            with builder.when(valid):
                self.start(operands, bias, group)
                with builder.loop("phase", g.axes[-1].stride) as f, builder.loop("tile", self.turns) as tile:
                    phase = ix.flatten((*fs, f), tuple(self.phases))
                    m = ix.mul(tile, self.width)
                    for j, r in product(range(self.width), range(self.vectors)):
                        builder.store(total, (j, r, 0), load(bias, r, 0, lanes=lanes))
                    with builder.loop("tap", self.taps) as tap:
                        used: Expr = Const(True, "bool")
                        if counts is not None:
                            used = binary("lt", tap, load(counts, phase))
                        with builder.when(used):
                            self.locate(builder, offsets, where, (*ms, m), phase, tap)
                            self.channels(builder, source, weights, total, where, (n, group, phase, tap))
                    for j in range(self.width):
                        o = self.output(g.axes[-1], ix.add(m, j), f)
                        self.finish_pixel(builder, tail, total, j, (n, group), (*row, o))
        self.finish(operands)

    def output(self, axis: Axis, m: Expr, phase: Expr) -> Expr:
        """The output that belongs to the m-th step of a phase; it may lie outside."""
        return ix.add(ix.mul(m, axis.stride), phase, axis.first * axis.stride - axis.pad)

    def feature(self, group: Expr, r: int) -> Expr:
        """First output channel of vector `r` of a group of vectors; groups of a convolution have whole vectors."""
        return ix.mul(ix.add(ix.mul(group, self.vectors), r), self.lanes)

    def start(self, operands: Operands, bias: Buffer, group: Expr) -> None:
        """The bias, or zeros, in registers."""
        name = self.op.input(2)
        for r in range(self.vectors):
            if not name:
                operands.builder.store(bias, (r, 0), constant(0, "float32", self.lanes))
                continue
            lane = Var("lane", self.lanes)
            channel = ix.add(self.feature(group, r), lane)
            inside = binary("lt", channel, ix.const(self.geometry.features))
            value = operands.load(name, (channel,), inside)
            store = Store(bias, (ix.const(r), lane), value)
            operands.builder.emit(vectorize((store,), lane, ix.const(0), self.lanes))

    def channels(
        self, builder: Builder, source: Buffer, weights: Buffer, total: Buffer, where: Buffer, at: tuple[Expr, ...]
    ) -> None:
        """Add one tap: a loop over input channels, some written out."""
        n, group, phase, tap = at
        g, lanes, block = self.geometry, self.lanes, self.block
        inner = g.channels // g.group
        part = ix.floordiv(group, self.groups) if g.group > 1 else ix.const(0)
        place = [load(where, d, 0) for d in range(len(g.axes))]
        step = block or 4

        def one(c: Expr, first: Expr, lane: int) -> None:
            values = [load(weights, group, phase, tap, c, r * lanes, lanes=lanes) for r in range(self.vectors)]
            for j in range(self.width):
                column = ix.add(place[-1], j)
                rest = (ix.const(lane),) if block else ()
                # `where` keeps the place inside, which its interval does not show: the mask always holds.
                index = (n, first, *place[:-1], column, *rest)
                x = splat(Load(source, index, 1, Const(True, "bool")), lanes)
                for r in range(self.vectors):
                    builder.store(total, (j, r, 0), Fma(x, values[r], load(total, j, r, 0, lanes=lanes)))

        with builder.loop("channel", self.depth // step) as turn:
            for i in range(step):
                c = ix.add(ix.mul(turn, step), i)
                if block:
                    one(c, ix.add(ix.mul(part, inner // block), turn), i)
                else:
                    one(c, ix.add(ix.mul(part, inner), c), 0)
        for c in range(self.depth - self.depth % step, self.depth):
            one(ix.const(c), ix.add(ix.mul(part, inner), c), 0)

    def finish_pixel(
        self, builder: Builder, tail: Tail, total: Buffer, j: int, lead: tuple[Expr, Expr], place: tuple[Expr, ...]
    ) -> None:
        """Store output pixel `j` of the tile through the tail."""
        n, group = lead
        for r in range(self.vectors):
            lane = Var("lane", self.lanes)
            channel = ix.add(self.feature(group, r), lane)
            value = cast(Load(total, (ix.const(j), ix.const(r), lane)), "float32")
            block = tail.stores((n, channel, *place), value)
            builder.emit(vectorize(block, lane, ix.const(0), self.lanes))


CONV_TRANSPOSE = ConvTranspose()
