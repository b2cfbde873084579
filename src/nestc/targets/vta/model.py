"""How many cycles a tiling of a layer takes: a walk over its tiles and chunks with a clock for each engine.

The walk follows the loops of `lower`, but knows only sizes: it costs some microseconds a chunk, where lowering, linking
and timing cost a hundred times that. It ranks tilings; `schedule` verifies the best of them with the timing simulator.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.timing import RTL, Timing
from nestc.targets.vta.emit import MOST_ITERATIONS
from nestc.targets.vta.geometry import (
    Elementwise,
    Geometry,
    Range,
    Reach,
    Read,
    columns_read,
    geometry,
    reach_of,
    rows_read,
)
from nestc.targets.vta.layer import Layer
from nestc.targets.vta.shape import block_count, shift_runs
from nestc.targets.vta.tiling import Share, Tiling

_UOP_BITS = 32


@dataclass(frozen=True)
class Costs:
    """Cycles of a machine, from its `Timing`: `start` of a compute instruction beside its micro-ops.

    ``load`` and ``store``: beside the data of a DMA instruction (a store: of each row). ``element`` of a store.
    """

    start: int
    tensor: int
    load: int
    store: int
    element: float

    @staticmethod
    def of(timing: Timing, config: VtaConfig) -> Costs:
        """What the engines of `timing` take; see there."""
        request = timing.load_command + timing.command_path + timing.memory_delay + timing.data_path
        beats = config.inp_bytes * 8 / config.bus_bits
        reads = timing.store_read * min(beats, config.batch) if beats > 1 else 0
        store = timing.store_address + timing.store_burst
        return Costs(timing.compute_overhead, timing.alu_tensor, request + timing.drain_narrow, store, beats + reads)


@dataclass(frozen=True)
class Estimate:
    """Modelled cycles of a layer, busy cycles of its engines, and the instructions and distinct micro-ops it needs.

    ``edges``: cycles before the first and after the last sum, in which the compute engine only waits.
    """

    cycles: int
    edges: int
    compute: int
    load: int
    store: int
    instructions: int
    uops: int


def whole(layer: Layer, config: VtaConfig) -> Share:
    """All of a layer."""
    return Share((0, block_count(layer.output, config)), (0, layer.output.height))


def estimate(layer: Layer, share: Share, tiling: Tiling, config: VtaConfig, timing: Timing = RTL) -> Estimate:
    """Cycles that `share` of `layer` takes with `tiling`; the tiling has to fit (`fits`)."""
    return Walk(geometry(layer, config), share, config, Costs.of(timing, config)).estimate(tiling)


def fits(layer: Layer, share: Share, tiling: Tiling, config: VtaConfig) -> bool:
    """Whether every buffer holds what the tiling puts there at once."""
    return Walk(geometry(layer, config), share, config, Costs.of(RTL, config)).slots(tiling) is not None


@dataclass(frozen=True)
class Chunk:
    """Input blocks that a read takes at once for a tile of output blocks.

    ``pairs`` of (output, input) among them, which come in `parts` loop nests; ``loads``: DMA runs of its inputs.
    """

    inputs: tuple[int, ...]
    pairs: int
    parts: int


def _cuts(first: int, last: int, step: int) -> list[Range]:
    return [(at, min(at + step, last)) for at in range(first, last, step)]


class Walk:
    """Tilings of one share of a layer; keeps what they have in common."""

    def __init__(self, sizes: Geometry, share: Share, config: VtaConfig, costs: Costs) -> None:
        self.sizes, self.share, self.config, self.costs = sizes, share, config, costs
        self._chunks: dict[tuple[int, int, int], tuple[tuple[Chunk, ...], ...]] = {}
        self._chunk_sizes: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self._reaches: dict[tuple[int, Range, Range], Reach] = {}
        self._spans: dict[tuple[int, int, int], int] = {}

    def chunks(self, read: int, blocks: int, inputs: int) -> tuple[tuple[Chunk, ...], ...]:
        """For each tile of output blocks the chunks of a read, in order."""
        key = read, blocks, inputs
        if key not in self._chunks:
            by_block = self.sizes.reads[read].by_block
            cuts = _cuts(*self.share.blocks, blocks)
            self._chunks[key] = tuple(_chunks(by_block[first:last], inputs) for first, last in cuts)
        return self._chunks[key]

    def chunk_sizes(self, read: int, blocks: int, inputs: int) -> tuple[int, int, int]:
        """Most inputs and most pairs of a chunk, and the loop nests of all chunks."""
        key = read, blocks, inputs
        if key not in self._chunk_sizes:
            chunks = [chunk for tile in self.chunks(*key) for chunk in tile]
            most = max((len(chunk.inputs) for chunk in chunks), default=0)
            self._chunk_sizes[key] = most, max((c.pairs for c in chunks), default=1), sum(c.parts for c in chunks)
        return self._chunk_sizes[key]

    def most_inputs(self, blocks: int) -> int:
        """Input blocks that a tile of so many output blocks reads at most of one source; 1 if it reads nothing."""
        counts = [
            len({block for inputs in read.by_block[first:last] for block in inputs})
            for read in self.sizes.reads
            for first, last in _cuts(*self.share.blocks, blocks)
        ]
        return max(1, *counts, 1)

    def reach(self, number: int, rows: Range, columns: Range) -> Reach:
        """What outputs read of the source of a read."""
        key = number, rows, columns
        if key not in self._reaches:
            read = self.sizes.reads[number]
            _, height, width = read.source
            self._reaches[key] = reach_of(
                rows_read(rows, read.strides[0], height, read.down, read.row_step),
                columns_read(columns, read.strides[1], width, read.across),
            )
        return self._reaches[key]

    def span(self, number: int, rows: int, columns: int) -> int:
        """Source positions of the largest tile."""
        key = number, rows, columns
        if key not in self._spans:
            down, across = _cuts(*self.share.rows, rows), _cuts(0, self.sizes.width, columns)
            self._spans[key] = max(self.reach(number, cut, across[0]).rows for cut in down) * max(
                self.reach(number, down[0], cut).columns for cut in across
            )
        return self._spans[key]

    def slots(self, tiling: Tiling) -> tuple[int, int, int] | None:
        """Slots of inputs, weights and accumulators as `lower` lays them out; None where not even one of each fits."""
        config, sizes = self.config, self.sizes
        source, weights, staging, sums = self.largest(tiling)
        blocks = self.share.blocks[1] - self.share.blocks[0]
        tile = min(tiling.blocks, blocks)
        bias = sizes.digits * blocks
        bias = bias if bias <= config.wgt_depth // 8 else 2 * sizes.digits * tile
        vectors = sizes.vectors * blocks
        vectors = vectors if vectors <= config.acc_depth // 8 else sizes.vectors * tile
        counts = (
            (config.inp_reach - 1) // source,
            (config.wgt_depth - 1 - bias) // weights,
            (config.acc_depth - vectors - staging) // sums,
        )
        return counts if min(counts) >= 1 else None

    def encodes(self, tiling: Tiling) -> bool:
        """Whether loops fit in their fields, and micro-ops of an instruction in their buffer; a little too strict."""
        _, _, staging, sums = self.largest(tiling)
        if max(staging, sums) > MOST_ITERATIONS:
            return False
        for number, read in enumerate(self.sizes.reads):
            inputs, pairs, _ = self.chunk_sizes(number, tiling.blocks, tiling.inputs)
            taps = len(set(read.down)), len(set(read.across))
            extents = sorted((tiling.rows, tiling.columns, *taps, inputs, -(-pairs // max(inputs, 1))))
            if math.prod(extents[:-2]) > self.config.uop_depth:
                return False
        return True

    def largest(self, tiling: Tiling) -> tuple[int, int, int, int]:
        """Elements of the largest chunk of inputs, of its weights, of inputs copied for a `Maximum`, and of a tile."""
        sizes = self.sizes
        source, weights, staging = 1, 1, 0
        for number, read in enumerate(sizes.reads):
            span = self.span(number, tiling.rows, tiling.columns)
            wanted, pairs, _ = self.chunk_sizes(number, tiling.blocks, tiling.inputs)
            source = max(source, wanted * span)
            if read.maximum:
                staging = max(staging, wanted * span)
            else:
                weights = max(weights, (min(pairs, 1) if read.shared else pairs) * read.stored)
        blocks = min(tiling.blocks, self.share.blocks[1] - self.share.blocks[0])
        rows = min(tiling.rows, self.share.rows[1] - self.share.rows[0])
        return source, weights, staging, blocks * rows * min(tiling.columns, sizes.width)

    def bound(self, tiling: Tiling) -> int:
        """Cycles besides the work that all tilings have in common: starts of instructions, half of the edges, and what
        no slot hides.
        """
        places = self.sizes.images * -(-(self.share.rows[1] - self.share.rows[0]) // tiling.rows)
        places *= -(-self.sizes.width // tiling.columns)
        tiles = -(-(self.share.blocks[1] - self.share.blocks[0]) // tiling.blocks)
        starts = tiles * sum(part.starts for part in self.sizes.parts if isinstance(part, Elementwise))
        columns = min(tiling.columns, self.sizes.width)
        for number in range(len(self.sizes.reads)):
            groups = self.reach(number, self._middle(*self.share.rows, tiling.rows), (0, columns)).groups
            starts += self.chunk_sizes(number, tiling.blocks, tiling.inputs)[2] * len(groups)
        source, weights, _, sums = self.largest(tiling)
        fill = (source * self.config.inp_bytes + weights * self.config.wgt_bytes) * 8 // self.config.bus_bits
        cycles = places * starts * self.costs.start + (fill + int(sums * self.costs.element)) // 2
        inp, _, acc = self.slots(tiling) or (1, 1, 1)
        if acc == 1:  # no sums while a tile is stored
            cycles += int((places * tiles - 1) * sums * self.costs.element)
        if inp == 1:  # and none while a chunk is loaded
            cycles += places * source * self.config.inp_bytes * 8 // self.config.bus_bits
        return cycles

    @staticmethod
    def _middle(first: int, last: int, step: int) -> Range:
        """A cut that is not the first, if there are several."""
        at = first + (last - first) // (2 * step) * step
        return at, min(at + step, last)

    def estimate(self, tiling: Tiling) -> Estimate:
        """The three clocks when the last store has ended."""
        slots = self.slots(tiling)
        assert slots is not None, f"{tiling} does not fit"
        return _Clocks(self, tiling, slots).run()


def _chunks(by_block: tuple[tuple[int, ...], ...], inputs: int) -> tuple[Chunk, ...]:
    if by_block and all(each is by_block[0] or each == by_block[0] for each in by_block):
        order = by_block[0]
        parts = [order[at : at + inputs] for at in range(0, len(order), inputs)]
        return tuple(Chunk(part, len(part) * len(by_block), 1) for part in parts)
    needed: dict[int, int] = {}
    for each in by_block:
        for block in each:
            needed[block] = needed.get(block, 0) + 1
    order = tuple(sorted(needed))
    made: list[Chunk] = []
    for at in range(0, len(order), inputs):
        part = order[at : at + inputs]
        counts = {sum(part[0] <= block <= part[-1] for block in each) for each in by_block} - {0}
        pairs = sum(needed[each] for each in part)
        made.append(Chunk(part, pairs, 1 if len(counts) == 1 else len(by_block)))
    return tuple(made)


class _Slots:
    """Slots used in turn as `sram.Slots` does; when each is filled, and when its last reader has ended."""

    def __init__(self, count: int) -> None:
        self.where: dict[Hashable, int] = {}
        self.keys: list[Hashable] = [None] * count
        self.ready = [0] * count
        self.free = [0] * count
        self.next = 0

    def take(self, key: Hashable) -> int:
        slot = self.next
        self.next = (slot + 1) % len(self.keys)
        self.where.pop(self.keys[slot], None)
        self.keys[slot] = key
        self.where[key] = slot
        return slot


class _Clocks:
    """One walk: clocks and busy cycles of the engines, and what the buffers hold."""

    def __init__(self, walk: Walk, tiling: Tiling, slots: tuple[int, int, int]) -> None:
        config = walk.config
        self.walk, self.tiling, self.start, self.latency = walk, tiling, walk.costs.start, walk.costs.load
        self.inp, self.wgt = _Slots(slots[0]), _Slots(slots[1])
        self.acc_free = [0] * slots[2]
        self.tiles = self.load = self.compute = self.store = 0
        self.load_busy = self.compute_busy = self.store_busy = self.instructions = self.uops = 0
        self.fill = -1  # not known before the first chunk
        self.known: set[Hashable] = set()
        self.inp_cycles = config.inp_bytes * 8 / config.bus_bits
        self.wgt_cycles = config.wgt_bytes * 8 / config.bus_bits
        blocks = walk.share.blocks[1] - walk.share.blocks[0]
        self.bias_whole = walk.sizes.digits * blocks <= config.wgt_depth // 8
        self.biases: dict[Hashable, int] = {}
        self.vector_cycles = int(walk.sizes.vectors * blocks * config.acc_bytes * 8 / config.bus_bits)
        self.vectors_loaded = False

    def run(self) -> Estimate:
        walk, tiling, sizes = self.walk, self.tiling, self.walk.sizes
        blocks = list(enumerate(_cuts(*walk.share.blocks, tiling.blocks)))
        chunks = [walk.chunks(number, tiling.blocks, tiling.inputs) for number in range(len(sizes.reads))]
        places = [
            (image, rows, columns)
            for image in range(sizes.images)
            for rows in _cuts(*walk.share.rows, tiling.rows)
            for columns in _cuts(0, sizes.width, tiling.columns)
        ]
        if tiling.blocks_outer:
            order = [(place, block) for block in blocks for place in places]
        else:
            order = [(place, block) for place in places for block in blocks]
        for place, (number, cut) in order:
            self._tile(place, number, cut, [tiles[number] for tiles in chunks])
        cycles = max(self.load, self.compute, self.store)
        edges = max(self.fill, 0) + cycles - self.compute
        return Estimate(cycles, edges, self.compute_busy, self.load_busy, self.store_busy, self.instructions, self.uops)

    def _loaded(self, work: float, loads: int = 1, free: int = 0) -> int:
        cycles = int(work) + loads * self.latency
        self.load = max(self.load, free) + cycles
        self.load_busy += cycles
        self.instructions += loads
        return self.load

    def _computed(self, work: int, starts: int) -> None:
        cycles = work + starts * self.start
        self.compute += cycles
        self.compute_busy += cycles
        self.instructions += starts

    def _tile(self, place: tuple[int, Range, Range], number: int, cut: Range, chunks: list[tuple[Chunk, ...]]) -> None:
        sizes, (_, rows, columns) = self.walk.sizes, place
        count, positions = cut[1] - cut[0], (rows[1] - rows[0]) * (columns[1] - columns[0])
        acc = self.tiles % len(self.acc_free)
        self.tiles += 1
        self.compute = max(self.compute, self.acc_free[acc])
        read = 0
        for part in sizes.parts:
            if isinstance(part, Read):
                for chunk_number, chunk in enumerate(chunks[read]):
                    self._chunk(place, part, (read, number, chunk_number), chunk, acc)
                read += 1
            elif isinstance(part, Elementwise):
                if part.digits:
                    self.compute = max(self.compute, self._bias(number, cut))
                if part.vector:
                    self._vectors()
                first = part.first if self.tiles <= len(self.acc_free) else 0
                self._computed((part.cycles + first) * count * positions, part.starts + first)
            else:
                for first, last, amount in shift_runs(part.amounts[cut[0] : cut[1]], positions):
                    if amount is None:
                        self._vectors()
                    self._computed((last - first) * positions * (1 if amount else self.walk.costs.tensor), 1)
        wide = columns[1] - columns[0] == sizes.width
        stores = 1 if wide else count
        bursts = count * (1 if wide else rows[1] - rows[0])
        cycles = int(count * positions * self.walk.costs.element) + bursts * self.walk.costs.store
        self.store = max(self.store, self.compute) + cycles
        self.store_busy += cycles
        self.instructions += stores
        self.acc_free[acc] = self.store

    def _bias(self, number: int, cut: Range) -> int:
        """When the digits of a tile's bias are there."""
        key = None if self.bias_whole else number
        if key not in self.biases:
            if key is not None:
                self.biases.clear()
            share = self.walk.share.blocks
            blocks = share[1] - share[0] if self.bias_whole else cut[1] - cut[0]
            self.biases[key] = self._loaded(blocks * self.walk.sizes.digits * self.wgt_cycles)
        return self.biases[key]

    def _vectors(self) -> None:
        """LOAD ACC runs on the compute engine."""
        if not self.vectors_loaded:
            self.vectors_loaded = True
            self._computed(self.vector_cycles + self.walk.sizes.vectors * self.latency, self.walk.sizes.vectors)

    def _chunk(
        self, place: tuple[int, Range, Range], read: Read, name: tuple[int, int, int], chunk: Chunk, acc: int
    ) -> None:
        reach = self.walk.reach(name[0], place[1], place[2])
        if not (reach.rows and reach.columns):
            return
        ready = wgt = 0
        if not read.maximum:
            weights = (name[0], None) if read.shared else name
            found = self.wgt.where.get(weights)
            if found is None:
                found = self.wgt.take(weights)
                work = (1 if read.shared else chunk.pairs) * read.stored * self.wgt_cycles
                self.wgt.ready[found] = self._loaded(work, 1, self.wgt.free[found])
            wgt, ready = found, self.wgt.ready[found]
        key = (place, name[0], chunk.inputs)
        inp = self.inp.where.get(key)
        size = len(chunk.inputs) * reach.rows * reach.columns
        if inp is None:
            inp = self.inp.take(key)
            single = reach.columns == read.source[2] and read.row_step == 1
            loads = 1 if single and chunk.inputs[-1] - chunk.inputs[0] < len(chunk.inputs) else len(chunk.inputs)
            self.inp.ready[inp] = self._loaded(size * self.inp_cycles, loads, self.inp.free[inp])
        shape = (acc, inp, wgt, name[0], reach, len(chunk.inputs), chunk.pairs)
        if shape not in self.known:
            self.known.add(shape)
            uops = chunk.parts * sum(_micro_ops(chunk, reach, group) for group in reach.groups)
            self.uops += uops
            self._computed(int(uops * _UOP_BITS / self.walk.config.bus_bits), 0)  # LOAD UOP runs there
        ready = max(ready, self.inp.ready[inp])
        if self.fill < 0:
            self.fill = max(0, ready - self.compute)
        self.compute = max(self.compute, ready)
        if read.lone:
            self._pooled(read, len(chunk.inputs), reach)
        elif read.maximum:
            self._computed(2 * size, 2)
            self._computed(self.walk.costs.tensor * len(chunk.inputs) * reach.sums, sum(g[2] for g in reach.groups))
        else:
            self._computed(chunk.pairs * reach.sums, len(reach.groups) * chunk.parts)
            self.wgt.free[wgt] = self.compute
        self.inp.free[inp] = self.compute

    def _pooled(self, read: Read, blocks: int, reach: Reach) -> None:
        """A maximum that starts with a lone tap (see `lower`), as if all windows were whole."""
        (sy, sx), down, across = read.strides, len(set(read.down)), len(set(read.across))
        results = blocks * -(-reach.sums // (down * across))
        copied = results + blocks * reach.rows * reach.columns * (sy * sx - 1) // (sy * sx)
        compared = results * ((sy - 1) * (across - 1) + down + across - 2)
        starts = 2 + (sy - 1) * (across + 1) + 2 * (sx - 1) + down + across - 2
        # The bias before it is not made.
        self._computed(2 * copied - results + self.walk.costs.tensor * compared, starts - 1)


def _micro_ops(chunk: Chunk, reach: Reach, group: tuple[int, int, int]) -> int:
    """Micro-ops of a GEMM: what its two longest loops leave; rows of whole width are one loop."""
    height, width, taps = group
    inputs = len(chunk.inputs)
    place = (height * width, 1) if width == reach.columns else (height, width)
    extents = sorted((*place, taps, inputs, -(-chunk.pairs // inputs)))
    return extents[0] * extents[1] * extents[2]
