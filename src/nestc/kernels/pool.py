"""Pooling: windows (MaxPool, AveragePool, LpPool) and whole images (Global*Pool, ReduceMean/ReduceMax over space)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, inf, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, within
from nestc.tensor.ir import Block, Buffer, Const, Expr, Load, Reduce, Store, Unary, Var
from nestc.tensor.rewrite import binary, cast, select
from nestc.tensor.vectorize import vectorize

GLOBAL = {
    "GlobalAveragePool": "mean",
    "GlobalMaxPool": "max",
    "GlobalLpPool": "lp",
    "ReduceMean": "mean",
    "ReduceMax": "max",
}
WINDOWED = {"AveragePool": "mean", "MaxPool": "max", "LpPool": "lp"}
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_UNROLLED_TAPS = 36  # windows up to 6x6 are written out; larger ones become loops
_CHAINS = 4  # independent accumulators of a whole-image reduction, to hide the latency of one addition


@dataclass(frozen=True)
class Window:
    """How windows move over one axis: output o covers ``o * stride - begin + k * dilation``, 0 <= k < kernel."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int

    def place(self, o: Expr, k: Expr | int) -> Expr:
        """Input position of tap `k` of output `o`."""
        taken = ix.mul(k, self.dilation) if isinstance(k, Expr) else k * self.dilation
        return ix.add(ix.mul(o, self.stride), taken, -self.begin)

    def inner(self) -> tuple[int, int]:
        """The outputs [low, high) whose windows lie inside the input."""
        low = ceil(self.begin / self.stride)
        high = (self.size - 1 - (self.kernel - 1) * self.dilation + self.begin) // self.stride + 1
        low = min(max(low, 0), self.out)
        return low, max(low, min(high, self.out))

    def counts(self, padding: bool) -> list[int]:
        """Number of taps of each output that are inside the input, or inside the padded input."""
        low, high = (-self.begin, self.size + self.end) if padding else (0, self.size)
        taps = range(self.kernel)
        places = ([o * self.stride - self.begin + k * self.dilation for k in taps] for o in range(self.out))
        return [sum(low <= p < high for p in row) for row in places]


def windows(op: Op, region: Region) -> tuple[Window, ...]:
    """The windows of a pooling node along each spatial axis, `auto_pad` resolved."""
    size, out = (region.types[name].shape[2:] for name in (op.inputs[0], op.outputs[0]))
    rank = len(size)
    kernel = _ints(op, "kernel_shape", size)
    strides, dilations = _ints(op, "strides", (1,) * rank), _ints(op, "dilations", (1,) * rank)
    pads = _ints(op, "pads", (0,) * (2 * rank))
    begin, end = pads[:rank], pads[rank:]
    mode = op.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        begin = end = (0,) * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        extents = zip(size, out, kernel, strides, dilations)
        total = [max(0, (o - 1) * s + (k - 1) * d + 1 - n) for n, o, k, s, d in extents]
        small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        begin, end = (small, large) if mode == "SAME_UPPER" else (large, small)
    return tuple(Window(*w) for w in zip(size, out, kernel, strides, dilations, begin, end))


def _ints(op: Op, name: str, default: Sequence[int]) -> tuple[int, ...]:
    value = op.attributes.get(name)
    return tuple(int(v) for v in value) if isinstance(value, tuple) else tuple(default)


def _int(op: Op, name: str, default: int) -> int:
    value = op.attributes.get(name)
    return int(value) if isinstance(value, (int, float)) else default


@dataclass(frozen=True)
class Combine:
    """What a pool does to its taps: ``post(pre(x0) + pre(x1) + ...)``, in the accumulator's dtype."""

    kind: str
    dtype: str
    power: int
    zero: int = 0
    """What is subtracted from every tap (the zero point of integers)."""

    @property
    def integer(self) -> bool:
        """Whether taps are added as integers; who stores the sum knows their number then."""
        return self.kind == "mean" and "float" not in self.dtype

    @property
    def identity(self) -> Expr:
        """What an absent tap counts as."""
        if self.kind != "max":
            return constant(0, self.dtype)
        if self.dtype.startswith("float"):
            return constant(-inf, self.dtype)
        return constant(int(np.iinfo(self.dtype).min), self.dtype)

    def tap(self, x: Expr, mask: Expr | None) -> Expr:
        """One tap, as it is accumulated; x is 0 where the mask does not hold."""
        x = self.pre(x)
        return x if mask is None or (self.kind != "max" and not self.zero) else select(mask, x, self.identity)

    def pre(self, x: Expr) -> Expr:
        """One tap inside the input, as it is accumulated."""
        x = cast(x, self.dtype)
        if self.zero:
            return binary("sub", x, constant(self.zero, self.dtype))
        if self.kind != "lp":
            return x
        if self.power == 2:
            return binary("mul", x, x)
        x = Unary("abs", x)
        return x if self.power == 1 else binary("pow", x, constant(self.power, self.dtype))

    def two(self, total: Expr, x: Expr) -> Expr:
        """The accumulated value with one more."""
        return binary("max", x, total) if self.kind == "max" else binary("add", total, x)

    def post(self, total: Expr, scale: Expr | None) -> Expr:
        """The result of a window, given one over its number of taps."""
        if self.kind == "mean" and scale is not None:
            return binary("mul", total, scale)
        if self.kind != "lp" or self.power == 1:
            return total
        if self.power == 2:
            return Unary("sqrt", total)
        return binary("pow", total, constant(1 / self.power, self.dtype))


def _pays(op: Op, region: Region, block: int) -> bool:
    """Whether windows over bytes are worth two conversions: over rows of pixels they took eight times as long."""
    x = region.types[op.inputs[0]]
    return op.op_type == "MaxPool" and x.dtype in ("int8", "uint8") and len(x.shape) == 4 and x.shape[1] % block == 0


def _anchor(region: Region) -> Op | None:
    names = GLOBAL.keys() | WINDOWED.keys()
    return next((op for op in region.ops if op.op_type in names and op.domain in ("", "ai.onnx")), None)


def reduces_space(op: Op, region: Region) -> bool:
    """Whether a Reduce* goes over exactly the spatial axes of an image."""
    rank = len(region.types[op.inputs[0]].shape)
    axes = op.attributes.get("axes")
    if op.input(1):
        axes = region.constant(op.input(1))
    if axes is None or rank < 3:
        return False
    return sorted(int(a) % rank for a in np.asarray(axes).reshape(-1)) == list(range(2, rank))


class Pool:
    """Pooling in NCHWc (a vector holds channels) or in ONNX's own order (a vector runs along a row)."""

    name = "pool"

    def refusal(self, region: Region) -> str | None:
        """Why the region cannot be lowered here."""
        op = _anchor(region)
        if op is None:
            return "no pooling operator"
        x, y = region.types[op.inputs[0]], region.types[op.outputs[0]]
        if len(x.shape) < 3:
            return f"{op.op_type} (node {op.name!r}) has no spatial axes"
        if 0 in x.shape or 0 in y.shape:
            return f"{op.op_type} (node {op.name!r}) works on an empty tensor"
        kind = GLOBAL.get(op.op_type) or WINDOWED[op.op_type]
        if x.dtype not in (_FLOATS + _INTEGERS if kind == "max" else _FLOATS):
            return f"{op.op_type} (node {op.name!r}) on {x.dtype}"
        if op.op_type.startswith("Reduce") and not reduces_space(op, region):
            return f"{op.op_type} (node {op.name!r}) does not go over the spatial axes of an image"
        reason = tail_refusal(region, op)
        if reason:
            return reason
        others = [name for other in region.ops if other is not op for name in other.inputs]
        if op.op_type in GLOBAL and op.inputs[0] in others:
            return f"what follows {op.op_type} (node {op.name!r}) reads its input"
        if op.output(1) and op.output(1) in region.outputs and len(region.ops) > 1:
            return f"MaxPool (node {op.name!r}) gives indices as well, so nothing may follow it in its kernel"
        return None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """NCHWc where the input comes so, or where it pays to bring it there; else ONNX's order."""
        op = _anchor(region)
        assert op is not None
        block = machine.lanes("float32")
        indices = op.output(1) and op.output(1) in region.outputs
        comes = incoming.get(op.inputs[0], PLAIN).block == block or _pays(op, region, block)
        blocked = comes and block > 1 and not indices
        shape = region.types[op.outputs[0]].shape
        chosen = {name: incoming.get(name, PLAIN) for name in region.inputs}
        own = Layout(block) if blocked else PLAIN
        follows = own if len(shape) > 2 else PLAIN
        for name in (*region.inputs, *region.outputs):
            if region.types[name].shape == shape:
                chosen[name] = follows
        return {**chosen, op.inputs[0]: own}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel, parallel over rows of channel blocks."""
        op = _anchor(region)
        assert op is not None
        builder = Builder(f"pool_{op.op_type.lower()}")
        operands = Operands(builder, region, layouts)
        if op.op_type in WINDOWED and op.output(1) and op.output(1) in region.outputs:
            _with_indices(op, operands)
        else:
            lower_pool(pooling_of(op, operands), operands, machine)
        return Lowered((operands.launch(),), {}, operands.constants)


def _combine(op: Op, kind: str, dtype: str) -> Combine:
    return Combine(kind, "float32" if dtype in ("float16", "bfloat16") else dtype, _int(op, "p", 2))


@dataclass(frozen=True)
class Pooling:
    """What a pool reads, how it combines that, and what becomes of the result.

    ``stores`` takes the logical index of an output, the combined taps, and one over their number (None but for means).
    """

    op: Op
    source: str
    combine: Combine
    declare: Callable[[], None]
    stores: Callable[[tuple[Expr, ...], Expr, Expr | None], Block]


def pooling_of(op: Op, operands: Operands) -> Pooling:
    """A pool of the values of its own input, followed by the region's tail."""
    kind = GLOBAL.get(op.op_type) or WINDOWED[op.op_type]
    combine = _combine(op, kind, operands.type(op.inputs[0]).dtype)
    tail = Tail(operands, op)
    dtype = operands.region.types[op.outputs[0]].dtype

    def stores(index: tuple[Expr, ...], total: Expr, scale: Expr | None) -> Block:
        return tail.stores(index, cast(combine.post(total, scale), dtype))

    return Pooling(op, op.inputs[0], combine, tail.declare, stores)


def lower_pool(pooling: Pooling, operands: Operands, machine: CpuMachine) -> None:
    """Append the kernel of a pool, parallel over images or over rows, to the builder of `operands`."""
    if pooling.op.op_type in GLOBAL:
        _whole(pooling, operands, machine)
    else:
        Windowed(pooling, operands, machine).build()


def _whole(pooling: Pooling, operands: Operands, machine: CpuMachine) -> None:
    """A whole image to one value: several vector accumulators, along channels (NCHWc) or along the pixels."""
    builder, name, op = operands.builder, pooling.source, pooling.op
    type_ = operands.type(name)
    batch, channels, *spatial = type_.shape
    pixels = prod(spatial)
    # The pixels of an image lie next to each other in both layouts, so they are read as one axis.
    operands.define(name, TensorType(type_.dtype, (batch, channels, pixels)))
    combine = pooling.combine
    block = operands.layout(name).block
    lanes = block or machine.lanes(combine.dtype)
    step = 1 if block else lanes
    operands.buffer(name)
    pooling.declare()
    lane = Var("lane", lanes)
    whole, rest = divmod(pixels, step)
    chains = min(_CHAINS, max(1, whole))
    total = builder.regs("total", (chains,), lanes, combine.dtype)
    rank = len(operands.region.types[op.outputs[0]].shape)
    scale = constant(1 / pixels, combine.dtype) if combine.kind == "mean" and not combine.integer else None

    def accumulate(chain: int, place: Expr, n: Expr, channel: Expr, mask: Expr | None = None) -> Block:
        at = (n, ix.add(ix.mul(channel, block), lane), place) if block else (n, channel, ix.add(place, lane))
        x = combine.pre(operands.load(name, at, mask))
        if mask is not None:
            x = select(mask, x, combine.identity)
        value = combine.two(Load(total, (ix.const(chain), lane)), x)
        return vectorize((Store(total, (ix.const(chain), lane), value),), lane, ix.const(0), lanes)

    with builder.parallel("image", batch, ceil(channels / block) if block else channels) as (n, channel):
        for chain in range(chains):
            builder.store(total, (chain, 0), constant(combine.identity.value, combine.dtype, lanes))  # type: ignore[attr-defined]
        turns, left = divmod(whole, chains)
        with builder.loop("turn", turns) as turn:
            for chain in range(chains):
                at = ix.mul(ix.add(ix.mul(turn, chains), chain), step)
                builder.emit(accumulate(chain, at, n, channel))
        for chain in range(left):
            builder.emit(accumulate(chain, ix.const((turns * chains + chain) * step), n, channel))
        if rest:
            mask = binary("lt", lane, ix.const(rest)) if rest < lanes else None
            builder.emit(accumulate(0, ix.const(whole * step), n, channel, mask))
        merged: Expr = Load(total, (ix.const(0), ix.const(0)), lanes)
        for chain in range(1, chains):
            merged = combine.two(merged, Load(total, (ix.const(chain), ix.const(0)), lanes))
        if not block:
            one = merged if lanes == 1 else Reduce("max" if combine.kind == "max" else "add", merged)
            builder.emit(pooling.stores((n, channel, *[ix.const(0)] * (rank - 2)), one, scale))
            return
        builder.store(total, (0, 0), merged)
        at = (n, ix.add(ix.mul(channel, block), lane), *[ix.const(0)] * (rank - 2))
        builder.emit(vectorize(pooling.stores(at, Load(total, (ix.const(0), lane)), scale), lane, ix.const(0), lanes))


class Windowed:
    """Builds the kernel of a windowed pool, or rows of it within another kernel: rows and stretches of rows whose
    windows lie inside need no tests."""

    def __init__(self, pooling: Pooling, operands: Operands, machine: CpuMachine) -> None:
        self.pooling = pooling
        self.op = op = pooling.op
        self.operands = operands
        self.builder = operands.builder
        self.windows = windows(op, operands.region)
        self.source = pooling.source
        self.batch, self.channels = operands.type(self.source).shape[:2]
        self.combine = pooling.combine
        self.block = operands.layout(self.source).block
        self.width = self.block or machine.lanes(self.combine.dtype)
        # With dilation 1 a tap outside, moved to the border, is one that the window has anyway: no test for a maximum.
        self.clamped = self.combine.kind == "max" and all(
            w.dilation == 1 and min(w.counts(False)) > 0 for w in self.windows
        )
        padding = bool(_int(op, "count_include_pad", 0))
        self.counts = [w.counts(padding) for w in self.windows]
        self.tables: dict[int, Buffer] = {}

    def build(self) -> None:
        """The kernel: a parallel iteration is one row of outputs of a channel (block)."""
        self.declare()
        images = ceil(self.channels / self.block) if self.block else self.channels
        outer = (w.out for w in self.windows[:-1])
        with self.builder.parallel("row", self.batch, images, *outer) as (n, channel, *row):
            self.one_row(n, channel, row)

    def declare(self) -> None:
        """Declare parameters and registers."""
        self.operands.buffer(self.source)
        if self.combine.kind == "mean" and not self.combine.integer:
            self.declare_counts()
        self.pooling.declare()
        self.total = {n: self.builder.regs("total", (1,), n, self.combine.dtype) for n in {1, self.width}}

    def one_row(self, n: Expr, channel: Expr, row: Sequence[Expr]) -> None:
        """A row of outputs of a channel (block), at `row` on the outer axes."""
        builder, outer = self.builder, self.windows[:-1]
        self.n, self.channel, self.row = n, channel, row
        inside: Expr = Const(all(low < high for low, high in map(Window.inner, outer)), "bool")
        limited: list[Expr] = []
        for w, o in zip(outer, row):
            low, high = w.inner()
            for test in (binary("ge", o, ix.const(low)), binary("lt", o, ix.const(high))):
                inside = binary("and", inside, test)
            # The same row, in a form whose interval shows that its taps are inside.
            limited.append(clamp(o, low, max(low, high - 1)))
        if isinstance(inside, Const):
            self.cut(limited if inside.value else row, not inside.value)
            return
        with builder.when(inside):
            self.cut(limited, False)
        with builder.otherwise():
            self.cut(row, True)

    def declare_counts(self) -> None:
        """Tables of the number of taps, for the axes along which it varies."""
        for axis, counts in enumerate(self.counts):
            if len(set(counts)) == 1:
                continue
            name = f"{self.op.outputs[0]}.taps{axis}"
            self.operands.define(name, TensorType(self.combine.dtype, (len(counts),)))
            self.operands.constants[name] = np.array(counts, self.combine.dtype)
            self.tables[axis] = self.operands.buffer(name)

    def cut(self, row: Sequence[Expr], tested: bool) -> None:
        """One row of outputs; `tested`: the row's windows may leave the input along an outer axis."""
        last = self.windows[-1]
        low, high = last.inner()
        self.stretch(row, 0, low, tested, True)
        self.stretch(row, low, high, tested, False)
        self.stretch(row, high, last.out, tested, True)

    def stretch(self, row: Sequence[Expr], start: int, stop: int, tested: bool, border: bool) -> None:
        """Outputs start .. stop-1 of a row."""
        lane = Var("lane", self.width)
        if self.block:
            with self.builder.loop("col", stop - start) as i:
                self.output(row, ix.add(i, start), lane, tested, border)
            return
        # A vector along the row pays where its taps are neighbours; elsewhere it would gather.
        along = self.windows[-1].stride == 1 and not border and self.width > 1
        vectors, rest = divmod(stop - start, self.width) if along else (0, stop - start)
        with self.builder.loop("col", vectors) as i:
            self.output(row, ix.add(ix.mul(i, self.width), start), lane, tested, border)
        with self.builder.loop("col", rest) as i:
            self.output(row, ix.add(i, start + vectors * self.width), None, tested, border)

    def output(self, row: Sequence[Expr], column: Expr, lane: Var | None, tested: bool, border: bool) -> None:
        """One output, or a vector of them."""
        builder, combine = self.builder, self.combine
        lanes = self.width if lane is not None else 1
        total = self.total[lanes]
        channel: Expr = self.channel
        if lane is not None and self.block:
            channel = ix.add(ix.mul(self.channel, self.block), lane)
        elif lane is not None:
            column = ix.add(column, lane)
        at: Expr = ix.const(0) if lane is None else lane
        place = [*row, column]
        tests = [tested] * (len(self.windows) - 1) + [border]

        def vector(block: Block) -> Block:
            return block if lane is None else vectorize(block, lane, ix.const(0), lanes)

        def tap(taps: Sequence[Expr | int]) -> Expr:
            mask: Expr | None = None
            where: list[Expr] = []
            for w, o, k, test in zip(self.windows, place, taps, tests):
                i = w.place(o, k)
                if test and self.clamped:
                    i = clamp(i, 0, w.size - 1)
                elif test:
                    inside = within(i, w.size)
                    mask = inside if mask is None else binary("and", mask, inside)
                where.append(i)
            return combine.tap(self.operands.load(self.source, (self.n, channel, *where), mask), mask)

        kernel = [w.kernel for w in self.windows]
        looped = 0  # the outermost kernel axes become loops until the rest is small enough to be written out
        while prod(kernel[looped:]) > _UNROLLED_TAPS:
            looped += 1
        if looped:
            start = combine.identity
            builder.emit(vector((Store(total, (ix.const(0), at), start),)))
        self.taps(kernel, looped, [], lambda prefix: builder.emit(vector((self.sum(total, at, prefix, kernel, tap),))))
        # Places of stores name the row itself, so that rows are seen to be disjoint.
        index = (self.n, channel, *self.row, place[-1])
        builder.emit(vector(self.pooling.stores(index, Load(total, (ix.const(0), at)), self.scale(place, tests))))

    def taps(self, kernel: list[int], looped: int, prefix: list[Expr], body: Callable[[list[Expr]], None]) -> None:
        """`body` inside serial loops over the first `looped` kernel axes."""
        if len(prefix) == looped:
            body(prefix)
            return
        with self.builder.loop("tap", kernel[len(prefix)]) as k:
            self.taps(kernel, looped, [*prefix, k], body)

    def sum(
        self,
        total: Buffer,
        at: Expr,
        prefix: list[Expr],
        kernel: list[int],
        tap: Callable[[Sequence[Expr | int]], Expr],
    ) -> Store:
        """Accumulate the taps that are written out."""
        value: Expr | None = Load(total, (ix.const(0), at)) if prefix else None
        for rest in product(*map(range, kernel[len(prefix) :])):
            x = tap([*prefix, *rest])
            value = x if value is None else self.combine.two(value, x)
        assert value is not None
        return Store(total, (ix.const(0), at), value)

    def scale(self, place: Sequence[Expr], tests: Sequence[bool]) -> Expr | None:
        """One over the number of taps of an average."""
        if self.combine.kind != "mean" or self.combine.integer:
            return None
        known, factors = 1, []
        for axis, (o, test) in enumerate(zip(place, tests)):
            if test and axis in self.tables:
                factors.append(Load(self.tables[axis], (o,)))
            else:
                known *= self.counts[axis][0] if test else self.windows[axis].kernel
        if not factors:
            return constant(1 / known, self.combine.dtype)
        count: Expr = constant(known, self.combine.dtype)
        for factor in factors:
            count = binary("mul", count, factor)
        return binary("div", constant(1, self.combine.dtype), count)


def _with_indices(op: Op, operands: Operands) -> None:
    """MaxPool that also gives the flat position of each maximum: scalar, the first of equal taps wins."""
    builder, name = operands.builder, op.inputs[0]
    shape = operands.type(name).shape
    combine = _combine(op, "max", operands.type(name).dtype)
    axes = windows(op, operands.region)
    operands.buffer(name)
    for out in operands.region.outputs:
        operands.buffer(out)
    best = builder.regs("best", (1,), 1, combine.dtype)
    where = builder.regs("where", (1,), 1, "int64")
    spatial = shape[2:]
    if _int(op, "storage_order", 0):
        strides = [prod(spatial[:d]) for d in range(len(spatial))]
    else:
        strides = [prod(spatial[d + 1 :]) for d in range(len(spatial))]
    zero = (ix.const(0), ix.const(0))

    def visit(n: Expr, channel: Expr, place: list[Expr], taps: list[Expr]) -> None:
        if len(taps) < len(axes):
            with builder.loop("tap", axes[len(taps)].kernel) as k:
                visit(n, channel, place, [*taps, k])
            return
        position: Expr = ix.mul(ix.add(ix.mul(n, shape[1]), channel), prod(spatial))
        inside: Expr = Const(True, "bool")
        at: list[Expr] = []
        for w, o, k, stride in zip(axes, place, taps, strides):
            i = w.place(o, k)
            inside = binary("and", inside, within(i, w.size))
            position = ix.add(position, ix.mul(i, stride))
            at.append(i)
        mask = None if isinstance(inside, Const) else inside
        x = cast(operands.load(name, (n, channel, *at), mask), combine.dtype)
        # The first tap inside is taken whatever it is, so that a window of lowest values has a place as well.
        better = binary("or", binary("gt", x, Load(best, zero)), binary("lt", Load(where, zero), ix.const(0)))
        better = binary("and", inside, better)
        builder.store(where, zero, select(better, position, Load(where, zero)))
        known = binary("ge", Load(where, zero), ix.const(0))
        same = binary("and", known, binary("eq", Load(where, zero), position))
        builder.store(best, zero, select(same, x, Load(best, zero)))

    with builder.parallel("pixel", *shape[:2], *(w.out for w in axes)) as (n, channel, *place):
        builder.store(best, zero, combine.identity)
        builder.store(where, zero, ix.const(-1))
        visit(n, channel, place, [])
        values = {op.outputs[0]: cast(Load(best, zero), operands.type(op.outputs[0]).dtype)}
        values[op.outputs[1]] = Load(where, zero)
        for out in operands.region.outputs:
            builder.emit(operands.stores(out, (n, channel, *place), values[out]))


POOL = Pool()
