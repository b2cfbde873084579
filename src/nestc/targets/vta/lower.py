"""A layer and its tiling become one Tensor IR kernel: a straight line of DMA calls and loop nests of instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import AluOp
from nestc.targets.vta import intrinsics as vta
from nestc.targets.vta.constants import Vectors, bias_digits, bound_that_sets, is_immediate, unit
from nestc.targets.vta.layer import Add, Clip, FeatureMap, Init, Layer, Maximum, Product, Shift
from nestc.targets.vta.shape import (
    Chunk,
    Rectangle,
    Span,
    block_amounts,
    block_count,
    chunks,
    elements,
    groups_of,
    lone_tap,
    rectangle,
    shift_runs,
    source_span,
    stored_weights,
    tap_groups,
)
from nestc.targets.vta.sram import Slots
from nestc.targets.vta.tiling import Share, Tiling
from nestc.tensor import index as ix
from nestc.tensor.ir import Buffer, Call, Expr, For, Intrinsic, Kernel, Stmt, Var, Window

LARGEST = (1 << 16) - 1
"""Elements in a row of a DMA instruction, and between two rows."""

Dimension: TypeAlias = tuple[int, tuple[int, ...]]
"""Extent of a loop, and by how much each operand's element moves with it."""


def lower(layer: Layer, share: Share, tiling: Tiling, config: VtaConfig) -> tuple[Kernel, dict[str, np.ndarray]]:
    """The kernel of `share` of a layer, and its constants by parameter name (int8 or int32, elements of their memory).

    Raises TargetError if the tiling does not fit the SRAMs.
    """
    return _Lowering(layer, share, tiling, config).run()


@dataclass(frozen=True)
class _Tile:
    """Output blocks first .. last - 1 at rows y0 .. y1 - 1 and columns x0 .. x1 - 1 of one image."""

    image: int
    blocks: tuple[int, int]
    y: tuple[int, int]
    x: tuple[int, int]

    @property
    def count(self) -> int:
        return self.blocks[1] - self.blocks[0]

    @property
    def width(self) -> int:
        return self.x[1] - self.x[0]

    @property
    def positions(self) -> int:
        return (self.y[1] - self.y[0]) * self.width

    @property
    def size(self) -> int:
        """Accumulators of the tile."""
        return self.count * self.positions


class _Lowering:
    def __init__(self, layer: Layer, share: Share, tiling: Tiling, config: VtaConfig) -> None:
        self.layer, self.share, self.tiling, self.config = layer, share, tiling, config
        self.inp, self.wgt, self.acc = (vta.sram(memory, config) for memory in (vta.INP, vta.WGT, vta.ACC))
        self.body: list[Stmt] = []
        self.constants: dict[str, np.ndarray] = {}
        self.params: dict[str, Buffer] = {
            name: vta.dram(name, vta.INP, elements(map_, config), config) for name, map_ in layer.sources.items()
        }
        out = layer.output
        self.output = self.params[out.name] = vta.dram(out.name, vta.INP, elements(out, config), config)
        self.variables = 0
        self.vectors = Vectors(layer, share, config)
        self.weights = {number: stored_weights(s) for number, s in enumerate(layer.steps) if isinstance(s, Product)}
        for number, weights in self.weights.items():
            blocks = weights.reshape(-1, *weights.shape[2:])
            self.constant(f"{layer.name}/weights{number}", blocks)
        self.plan()

    def run(self) -> tuple[Kernel, dict[str, np.ndarray]]:
        for tile in self.tiles():
            self.tile(tile)
        used = {window.buffer.name for window in self.windows(self.body)}
        srams = tuple(buffer for buffer in (self.inp, self.wgt, self.acc) if buffer.name in used)
        params = tuple(buffer for name, buffer in self.params.items() if name in used)
        constants = {name: array for name, array in self.constants.items() if name in used}
        return Kernel(self.layer.name, params, tuple(self.body), srams, self.layer.origin), constants

    # --- memory

    def plan(self) -> None:
        """Divide the SRAMs among what this layer keeps in them. What does not change during a layer lies at the top."""
        c, tiling = self.config, self.tiling
        largest = self.largest_tile()
        source, weights, staging = 1, 1, 0
        for number, step in enumerate(self.layer.steps):
            if isinstance(step, Product | Maximum):
                span = self.largest_span(step)
                wanted = min(tiling.inputs, self.most_inputs(step))
                source = max(source, wanted * span)
                if isinstance(step, Product):
                    pairs, taps = self.weights[number].shape[:2]
                    weights = max(weights, min(pairs, self.most_pairs(step)) * taps)
                else:
                    staging = max(staging, wanted * span)
        self.ones = c.inp_reach - 1
        self.inputs = Slots(0, c.inp_reach - 1, source)
        top = c.wgt_depth - 1  # the identity block of Maximum
        self.identity = top
        bias = self.vectors.digits * largest.count
        whole = self.vectors.digits * (self.share.blocks[1] - self.share.blocks[0])
        kept = whole if whole <= c.wgt_depth // 8 else 2 * bias
        self.bias_whole = whole <= c.wgt_depth // 8
        self.biases = Slots(top - kept, top, whole if self.bias_whole else bias)
        self.weight_slots = Slots(0, top - kept, weights)
        vectors = self.vectors.count * (self.share.blocks[1] - self.share.blocks[0])
        self.vectors_whole = vectors <= c.acc_depth // 8
        room = vectors if self.vectors_whole else self.vectors.count * largest.count
        self.vector_base = c.acc_depth - room
        self.staging = self.vector_base - staging
        self.sums = Slots(0, self.staging, largest.size)
        self.settled: dict[int, int] = {}  # accumulators of a slot, from its first on, that hold results of a tile
        self.vectors_held: tuple[int, int] | None = None
        for what, slots in (("input", self.inputs), ("weight", self.weight_slots), ("accumulator", self.sums)):
            if slots.count < 1:
                raise TargetError(f"layer {self.layer.name}: a tile of {tiling} does not fit the {what} buffer")

    def largest_tile(self) -> _Tile:
        blocks = min(self.tiling.blocks, self.share.blocks[1] - self.share.blocks[0])
        rows = min(self.tiling.rows, self.share.rows[1] - self.share.rows[0])
        return _Tile(0, (0, blocks), (0, rows), (0, min(self.tiling.columns, self.layer.output.width)))

    def largest_span(self, step: Product | Maximum) -> int:
        """Source positions of the largest tile."""
        source = self.layer.sources[step.source]
        spans = {source_span(step, source, y, x).size for y, x in product(self.row_ranges(), self.column_ranges())}
        return max(spans)

    def most_inputs(self, step: Product | Maximum) -> int:
        if isinstance(step, Maximum):
            return self.largest_tile().count
        return max(len({i for o, i in step.pairs if first <= o < last}) for first, last in self.block_ranges())

    def most_pairs(self, step: Product) -> int:
        """Weight blocks a tap of the largest chunk."""
        return max(
            (
                len(chunk.pairs)
                for blocks in self.block_ranges()
                for chunk in chunks(step.pairs, blocks, self.tiling.inputs)
            ),
            default=1,
        )

    # --- tiles

    def row_ranges(self) -> list[tuple[int, int]]:
        return _ranges(*self.share.rows, self.tiling.rows)

    def column_ranges(self) -> list[tuple[int, int]]:
        return _ranges(0, self.layer.output.width, self.tiling.columns)

    def block_ranges(self) -> list[tuple[int, int]]:
        return _ranges(*self.share.blocks, self.tiling.blocks)

    def tiles(self) -> Iterable[_Tile]:
        images = range(-(-self.layer.output.batch // self.config.batch))
        places = list(product(self.row_ranges(), self.column_ranges()))
        if self.tiling.blocks_outer:
            return [_Tile(n, o, y, x) for o in self.block_ranges() for n in images for y, x in places]
        return [_Tile(n, o, y, x) for n in images for y, x in places for o in self.block_ranges()]

    def tile(self, tile: _Tile) -> None:
        base = self.sums.take(None)
        for number, step in enumerate(self.layer.steps):
            if isinstance(step, Init):
                if self.lone_tap(tile, number + 1) is None:
                    self.init(tile, base, number, step)
            elif isinstance(step, Product):
                self.product(tile, base, number, step)
            elif isinstance(step, Maximum):
                self.maximum(tile, base, number, step)
            elif isinstance(step, Shift):
                self.shift(tile, base, number, step)
            elif isinstance(step, Add):
                self.immediate(AluOp.ADD, step.value, base, tile.size)
            else:
                self.clip(tile, base, step)
        self.store(tile, base)
        self.settled[base] = max(tile.size, self.settled.get(base, 0))

    # --- steps

    def init(self, tile: _Tile, base: int, number: int, step: Init) -> None:
        """Sums become the bias: cleared, then a number, digits of a constant input, or a vector added.

        Where results of a tile before lie, which fit in 8 bits, a bound beyond these sets them all at once.
        """
        bound = bound_that_sets(step.values)
        if bound is not None and self.settled.get(base, 0) >= tile.size:
            self.immediate(bound, int(step.values), base, tile.size)
            return
        self.emit(vta.reset(self.config), [(tile.size, (1,))], [(self.acc, base)])
        values = step.values
        if not values.any():
            return
        if is_immediate(values):
            self.immediate(AluOp.ADD, int(values), base, tile.size)
            return
        if not self.vectors.by_digits(number):
            self.vector_alu(tile, base, number, AluOp.ADD)
            return
        place = self.bias(tile, number, values)
        digits = self.vectors.digits
        self.load_ones()
        # One cycle an accumulator, where adding a vector by the ALU takes two.
        self.emit(
            vta.gemm(self.config),
            [(tile.count, (tile.positions, 0, digits)), (tile.positions, (1, 0, 0)), (digits, (0, 0, 1))],
            [(self.acc, base), (self.inp, self.ones), (self.wgt, place)],
        )

    def product(self, tile: _Tile, base: int, number: int, step: Product) -> None:
        source = self.layer.sources[step.source]
        span = source_span(step, source, tile.y, tile.x)
        if not span.size:
            return
        pairs, taps = self.weights[number].shape[:2]
        move = taps if pairs == len(step.pairs) else 0
        groups = tap_groups(step.strides, step.taps, source, tile.y, tile.x)
        for chunk in chunks(step.pairs, tile.blocks, self.tiling.inputs):
            weights = self.load_weights(number, step, chunk)
            parts = groups_of(chunk, tile.blocks[0])
            place = self.load_source(tile, source, chunk.inputs, span)
            for group in groups:
                for part in parts:
                    dimensions: list[Dimension] = [
                        (extent, (o * tile.positions, i * span.size, pair * move))
                        for extent, (o, i, pair) in part.dimensions
                    ]
                    dimensions += [
                        (extent, (0, down // span.row_step * span.width + across, tap * min(taps - 1, 1)))
                        for extent, (down, across, tap) in group.loops
                    ]
                    offset = self.spatial(group.area, tile, span, dimensions, weights=True)
                    self.emit(
                        vta.gemm(self.config),
                        dimensions,
                        [
                            (self.acc, base + part.output * tile.positions + offset[0]),
                            (self.inp, place + part.input * span.size + offset[1]),
                            (self.wgt, weights + part.pair * move + min(group.tap, taps - 1)),
                        ],
                    )

    def maximum(self, tile: _Tile, base: int, number: int, step: Maximum) -> None:
        """Inputs are copied to accumulators by the identity, then compared there tap by tap.

        Where the pixels of one tap are read by no other (`lone_tap`), they go to the result at once, and take the
        maximum of their neighbours in other rows before windows above and below share it.
        """
        source = self.layer.sources[step.source]
        span = source_span(step, source, tile.y, tile.x)
        if not span.size:
            return
        self.load_identity()
        lone = self.lone_tap(tile, number)
        for first, last in _ranges(*tile.blocks, self.tiling.inputs):
            place = self.load_source(tile, source, tuple(range(first, last)), span)
            start = base + (first - tile.blocks[0]) * tile.positions
            taps = step.taps
            if lone is None:
                self.copy([(last - first) * span.size], [1], [1], self.staging, place)
            else:
                self.gather(tile, step, lone, span, (start, place, last - first))
                taps = tuple(tap for tap in taps if (tap[0] == lone[0]) != (tap[1] == lone[1]))
            for tap in taps:
                area = rectangle(step.strides, tap, source, tile.y, tile.x)
                if area is None:
                    continue
                dimensions: list[Dimension] = [(last - first, (tile.positions, span.size))]
                offset = self.spatial(area, tile, span, dimensions, weights=False)
                operands = [(self.acc, start + offset[0]), (self.acc, self.staging + offset[1])]
                self.emit(vta.alu(AluOp.MAX, None, self.config), dimensions, operands)

    def lone_tap(self, tile: _Tile, number: int) -> tuple[int, int] | None:
        """The tap of the maximum at `number` that starts the result; None where the bias before it does."""
        step = self.layer.steps[number] if number < len(self.layer.steps) else None
        start = self.layer.steps[number - 1]
        if not isinstance(step, Maximum) or not isinstance(start, Init) or (start.values > -128).any():
            return None
        tap, source = lone_tap(step), self.layer.sources[step.source]
        if tap is None or source_span(step, source, tile.y, tile.x).row_step > 1:
            return None
        area = rectangle(step.strides, tap, source, tile.y, tile.x)
        everywhere = area is not None and area.extent == (tile.y[1] - tile.y[0], tile.width)
        return tap if everywhere else None

    def gather(
        self, tile: _Tile, step: Maximum, lone: tuple[int, int], span: Span, places: tuple[int, int, int]
    ) -> None:
        """Bring the pixels of a maximum: those of the lone tap to the result, others to where they are compared."""
        start, place, blocks = places
        (sy, sx), (top, left), width = step.strides, span.first, span.width
        plane, wide = span.size, sy * width
        corner = ((tile.y[0] * sy + lone[0] - top) * width) + tile.x[0] * sx + lone[1] - left
        rows = tile.y[1] - tile.y[0]
        self.copy([blocks, rows, tile.width], [tile.positions, tile.width, 1], [plane, wide, sx], start, place + corner)
        for residue in range(sy):
            first = (residue - top) % sy
            count = -(-(span.height - first) // sy)
            if count < 1:
                continue
            at = first * width
            if (residue - lone[0]) % sy:
                loops = [plane, wide, 1]
                self.copy([blocks, count, width], loops, loops, self.staging + at, place + at)
                self.across(tile, step, lone[1], span, (blocks, count, at))
                continue
            for column in range(sx):
                begin = (column - left) % sx
                if (column - lone[1]) % sx and begin < width:
                    loops = [plane, wide, sx]
                    extents = [blocks, count, -(-(width - begin) // sx)]
                    self.copy(extents, loops, loops, self.staging + at + begin, place + at + begin)

    def across(self, tile: _Tile, step: Maximum, center: int, span: Span, rows: tuple[int, int, int]) -> None:
        """In rows that several windows share, each pixel of column `center` becomes the maximum of its neighbours."""
        source, (sy, sx), (blocks, count, at) = self.layer.sources[step.source], step.strides, rows
        for dx in sorted({dx for _, dx in step.taps} - {center}):
            area = rectangle((1, sx), (0, dx), source, (0, 1), tile.x)
            if area is None:
                continue
            moves = [(blocks, span.size), (count, sy * span.width), (area.extent[1], sx)]
            begin = self.staging + at + area.first[1] * sx - span.first[1]
            operands = [(self.acc, begin + center), (self.acc, begin + dx)]
            self.emit(
                vta.alu(AluOp.MAX, None, self.config), [(extent, (move, move)) for extent, move in moves], operands
            )

    def copy(self, extents: list[int], into: list[int], out: list[int], target: int, place: int) -> None:
        """Inputs from `place` on become accumulators from `target` on: loops of `extents` with their moves in both."""
        cleared = [(extent, (move,)) for extent, move in zip(extents, into, strict=True)]
        self.emit(vta.reset(self.config), cleared, [(self.acc, target)])
        moved = [(extent, (a, b, 0)) for extent, a, b in zip(extents, into, out, strict=True)]
        operands = [(self.acc, target), (self.inp, place), (self.wgt, self.identity)]
        self.emit(vta.gemm(self.config), moved, operands)

    def shift(self, tile: _Tile, base: int, number: int, step: Shift) -> None:
        """Blocks of channels of one amount are shifted by an immediate, those of several by a vector of amounts."""
        amounts = block_amounts(self.vectors.blocked(step.amounts)[tile.blocks[0] : tile.blocks[1]])
        for first, last, amount in shift_runs(amounts, tile.positions):
            if amount is None:
                self.vector_alu(tile, base, number, AluOp.SHR, (first, last))
            elif amount:
                self.immediate(AluOp.SHR, amount, base + first * tile.positions, (last - first) * tile.positions)

    def clip(self, tile: _Tile, base: int, step: Clip) -> None:
        if step.low is not None:
            self.immediate(AluOp.MAX, step.low, base, tile.size)
        if step.high is not None:
            self.immediate(AluOp.MIN, step.high, base, tile.size)

    def store(self, tile: _Tile, base: int) -> None:
        out = self.layer.output
        plane, rows = out.height * out.width, tile.y[1] - tile.y[0]
        first = (tile.image * block_count(out, self.config) + tile.blocks[0]) * plane
        first += tile.y[0] * out.width + tile.x[0]
        if tile.width == out.width and plane <= LARGEST:
            self.transfer_out(tile.count, tile.positions, plane, first, base)
            return
        for block in range(tile.count):
            start = first + block * plane
            if tile.width == out.width and tile.positions <= LARGEST:
                self.transfer_out(1, tile.positions, tile.positions, start, base + block * tile.positions)
            else:
                self.transfer_out(rows, tile.width, out.width, start, base + block * tile.positions)

    # --- instructions

    def spatial(
        self, area: Rectangle, tile: _Tile, span: Span, dimensions: list[Dimension], *, weights: bool
    ) -> tuple[int, int]:
        """Append the loops over the rectangle of one tap; returns where it begins in the tile and in the source."""
        none = (0,) if weights else ()
        down, across = area.step[0] // span.row_step * span.width, area.step[1]
        height, width = area.extent
        if width == tile.width and down == width * across:
            dimensions.append((height * width, (1, across, *none)))
        else:
            dimensions.append((height, (tile.width, down, *none)))
            dimensions.append((width, (1, across, *none)))
        target = (area.first[0] - tile.y[0]) * tile.width + area.first[1] - tile.x[0]
        row = (area.source[0] - span.first[0]) // span.row_step
        return target, row * span.width + area.source[1] - span.first[1]

    def immediate(self, op: AluOp, value: int, base: int, size: int) -> None:
        self.emit(vta.alu(op, value, self.config), [(size, (1,))], [(self.acc, base)])

    def vector_alu(self, tile: _Tile, base: int, number: int, op: AluOp, part: tuple[int, int] | None = None) -> None:
        """An ALU operation whose second operand is a vector of channels, the same at every position.

        ``part``: the blocks of the tile, counted from its first; all if None.
        """
        begin, end = part or (0, tile.count)
        first, last = self.load_vectors(tile)
        place = self.vector_base + self.vectors.numbers.index(number) * (last - first) + tile.blocks[0] + begin - first
        self.emit(
            vta.alu(op, None, self.config),
            [(end - begin, (tile.positions, 1)), (tile.positions, (1, 0))],
            [(self.acc, base + begin * tile.positions), (self.acc, place)],
        )

    def emit(self, call: Intrinsic, dimensions: Sequence[Dimension], operands: Sequence[tuple[Buffer, int]]) -> None:
        """A loop nest around `call`: the two longest loops in hardware, the others as micro-ops inside."""
        real = [dimension for dimension in dimensions if dimension[0] > 1]
        order = sorted(range(len(real)), key=lambda k: -real[k][0])
        hardware = sorted(order[:2])
        inner = sorted(order[2:])
        loops = [real[k] for k in (*hardware, *inner)]
        variables = [Var(f"i{self.variables + k}", extent) for k, (extent, _) in enumerate(loops)]
        self.variables += len(loops)
        windows: list[Window] = []
        for which, (buffer, base) in enumerate(operands):
            terms: dict[Expr, int] = {
                var: moves[which] for var, (_, moves) in zip(variables, loops, strict=True) if moves[which]
            }
            windows.append(Window(buffer, (ix.build(base, terms), ix.const(0), ix.const(0))))
        statement: Stmt = Call(call, tuple(windows))
        for depth in range(len(loops) - 1, -1, -1):
            statement = For(variables[depth], (statement,), "serial" if depth < len(hardware) else "unroll")
        self.body.append(statement)

    def transfer_in(self, memory: Buffer, buffer: Buffer, shape: tuple[int, int, int], first: int, place: int) -> None:
        y, x, stride = shape
        stride = stride if y > 1 else x
        call = vta.load_tile(memory.memory, y, x, stride, self.config)
        self.body.append(Call(call, (_window(memory, place), _window(buffer, first))))

    def transfer_out(self, y: int, x: int, stride: int, first: int, place: int) -> None:
        call = vta.store_tile(y, x, stride if y > 1 else x, self.config)
        self.body.append(Call(call, (_window(self.output, first), _window(self.acc, place))))

    # --- data in SRAM

    def load_source(self, tile: _Tile, source: FeatureMap, inputs: tuple[int, ...], span: Span) -> int:
        key = (source.name, tile.image, inputs, span)
        found = self.inputs.find(key)
        if found is not None:
            return found
        place = self.inputs.take(key)
        plane, buffer = source.height * source.width, self.params[source.name]
        image = tile.image * block_count(source, self.config)
        first = span.first[0] * source.width + span.first[1]
        contiguous = span.width == source.width and span.row_step == 1
        if contiguous and plane <= LARGEST and _consecutive(inputs):
            start = (image + inputs[0]) * plane + first
            self.transfer_in(self.inp, buffer, (len(inputs), span.size, plane), start, place)
            return place
        for number, block in enumerate(inputs):
            shape = (span.height, span.width, source.width * span.row_step)
            if contiguous and span.size <= LARGEST:
                shape = (1, span.size, span.size)
            self.transfer_in(self.inp, buffer, shape, (image + block) * plane + first, place + number * span.size)
        return place

    def load_weights(self, number: int, step: Product, chunk: Chunk) -> int:
        pairs, taps = self.weights[number].shape[:2]
        shared = pairs < len(step.pairs)
        key = (number, None if shared else chunk)
        found = self.weight_slots.find(key)
        if found is not None:
            return found
        place, buffer = self.weight_slots.take(key), self.params[f"{self.layer.name}/weights{number}"]
        if shared:
            self.transfer_in(self.wgt, buffer, (1, taps, taps), 0, place)
            return place
        for first, length, count, stride, at in chunk.runs:
            if max(length * taps, stride * taps) <= LARGEST:
                shape = (count, length * taps, stride * taps)
                self.transfer_in(self.wgt, buffer, shape, first * taps, place + at * taps)
                continue
            for row in range(count):
                start, target = (first + row * stride) * taps, place + (at + row * length) * taps
                self.transfer_in(self.wgt, buffer, (1, length * taps, length * taps), start, target)
        return place

    def bias(self, tile: _Tile, number: int, values: np.ndarray) -> int:
        """Where the digits of a tile's bias lie."""
        digits, first = self.vectors.digits, self.share.blocks[0]
        blocks = self.share.blocks if self.bias_whole else tile.blocks
        name = f"{self.layer.name}/bias{number}"
        if name not in self.params:
            self.constant(name, bias_digits(self.vectors.blocked(values, "constant"), digits))
        place = self.biases.find(blocks)
        if place is None:
            place = self.biases.take(blocks)
            size = (blocks[1] - blocks[0]) * digits
            self.transfer_in(self.wgt, self.params[name], (1, size, size), blocks[0] * digits, place)
        return place + (tile.blocks[0] - first) * digits if self.bias_whole else place

    def load_vectors(self, tile: _Tile) -> tuple[int, int]:
        """Bring the vectors of channels that this tile's ALU operations use; returns the blocks that they cover."""
        blocks = self.share.blocks if self.vectors_whole else tile.blocks
        if self.vectors_held != blocks:
            self.vectors_held = blocks
            count = blocks[1] - blocks[0]
            for which, (name, array) in enumerate(self.vectors.arrays()):
                buffer = self.params.get(name) or self.constant(name, array)
                self.transfer_in(self.acc, buffer, (1, count, count), blocks[0], self.vector_base + which * count)
        return blocks

    def load_ones(self) -> None:
        self.once("vta/unit", self.inp, self.ones, lambda: unit(self.config))

    def load_identity(self) -> None:
        self.once("vta/identity", self.wgt, self.identity, lambda: np.eye(self.config.block, dtype=np.int8)[None])

    def once(self, name: str, memory: Buffer, place: int, make: Callable[[], np.ndarray]) -> None:
        if name not in self.params:
            self.transfer_in(memory, self.constant(name, make()), (1, 1, 1), 0, place)

    def constant(self, name: str, array: np.ndarray) -> Buffer:
        """Declare a constant parameter; its shape is (elements, ...) of the memory it is loaded to."""
        memory = vta.ACC if array.dtype == np.int32 else vta.INP if name == "vta/unit" else vta.WGT
        self.constants[name] = array
        self.params[name] = vta.dram(name, memory, array.shape[0], self.config)
        return self.params[name]

    def windows(self, body: Iterable[Stmt]) -> Iterable[Window]:
        for statement in body:
            while isinstance(statement, For):
                statement = statement.body[0]
            if isinstance(statement, Call):
                yield from statement.operands


def _ranges(first: int, last: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def _window(buffer: Buffer, element: int) -> Window:
    return Window(buffer, (ix.const(element), ix.const(0), ix.const(0)))


def _consecutive(numbers: tuple[int, ...]) -> bool:
    return numbers[-1] - numbers[0] == len(numbers) - 1
