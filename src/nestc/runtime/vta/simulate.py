"""The functional machine: executes VTA's instructions on a flat DRAM, bit-exact, in any order that the tokens allow.

What an instruction does is what tvm-vta's functional simulator does (``src/sim/sim_driver.cc``). It is done on whole
instructions at a time with numpy: a GEMM instruction becomes a few float32 matrix products (see `_EXACT`), an ALU
instruction a few vector operations, cut wherever a step reads what an earlier one wrote.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.encode import decode_uops
from nestc.runtime.vta.isa import (
    COMPUTE,
    ENGINES,
    LOAD,
    STORE,
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    MemoryId,
    Store,
    engine_of,
)

Order: TypeAlias = Literal["program", "load", "compute", "store", "random"]
"""Which of the instructions whose tokens are there runs next: the first in the program, one of the engine named
whenever it can (then load before compute before store), or a random one."""

_PREFERENCE = {"load": (0, 1, 2), "compute": (1, 0, 2), "store": (2, 0, 1)}
# Queues of tokens: 0 load to compute, 1 compute to load, 2 compute to store, 3 store to compute. For each engine those
# that pop_prev, pop_next, push_prev and push_next mean.
_TOKEN_QUEUES = ((None, 1, None, 0), (0, 3, 1, 2), (2, None, 3, None))
_TOKEN_NAMES = ("pop_prev", "pop_next", "push_prev", "push_next")
_QUEUE_NAMES = ("load to compute", "compute to load", "compute to store", "store to compute")

_EXACT = 1 << 24
"""A float32 holds every integer up to this, so a sum of products stays exact while the sum of their absolute values
does not pass it, in whatever order a matrix product adds."""


@dataclass
class Statistics:
    """What a run did: bytes moved for each memory, micro-ops executed (a reset is no GEMM micro-op), instructions."""

    inp_bytes: int = 0
    wgt_bytes: int = 0
    acc_bytes: int = 0
    uop_bytes: int = 0
    out_bytes: int = 0
    gemm_steps: int = 0
    reset_steps: int = 0
    alu_steps: int = 0
    instructions: int = 0


def simulate(
    instructions: Sequence[Instruction],
    config: VtaConfig,
    dram: np.ndarray,
    order: Order = "program",
    seed: int = 0,
    fill: int = 0,
) -> Statistics:
    """Execute `instructions` on `dram` (uint8, flat, C-contiguous; byte 0 is address 0), in place.

    A stream without hazards gives the same bytes for every `order` and `seed`, and whatever `fill` (an int8) the SRAMs
    hold at the start. Raises TargetError, naming the instruction, for a deadlock (before anything is executed) and for
    an access outside of a memory.
    """
    machine = Machine(config, dram, fill)
    for number in legal_order(instructions, order, seed):
        machine.execute(number, instructions[number])
    return machine.statistics


def legal_order(instructions: Sequence[Instruction], order: Order = "program", seed: int = 0) -> list[int]:
    """The numbers of `instructions` in an order in which three engines with queues and tokens may execute them.

    Raises TargetError if the tokens never come, or are of a neighbour that an engine does not have.
    """
    queues: tuple[list[int], ...] = ([], [], [])
    takes: list[list[int]] = []
    gives: list[list[int]] = []
    for number, instruction in enumerate(instructions):
        engine = engine_of(instruction)
        queues[engine].append(number)
        taken, given = _token_queues(number, instruction)
        takes.append(taken)
        gives.append(given)

    tokens, heads, result = [0, 0, 0, 0], [0, 0, 0], []
    chooser = random.Random(seed)
    while len(result) < len(instructions):
        ready = [
            engine
            for engine in (LOAD, COMPUTE, STORE)
            if heads[engine] < len(queues[engine]) and all(tokens[t] > 0 for t in takes[queues[engine][heads[engine]]])
        ]
        if not ready:
            raise TargetError(_deadlock(instructions, queues, heads, takes, tokens))
        if order == "program":
            engine = min(ready, key=lambda e: queues[e][heads[e]])
        elif order == "random":
            engine = chooser.choice(ready)
        else:
            engine = next(e for e in _PREFERENCE[order] if e in ready)
        number = queues[engine][heads[engine]]
        heads[engine] += 1
        for queue in takes[number]:
            tokens[queue] -= 1
        for queue in gives[number]:
            tokens[queue] += 1
        result.append(number)
    return result


def _token_queues(number: int, instruction: Instruction) -> tuple[list[int], list[int]]:
    """Queues that an instruction takes a token from, and those that it gives one to."""
    engine, flags = engine_of(instruction), instruction.tokens
    wanted = (flags.pop_prev, flags.pop_next, flags.push_prev, flags.push_next)
    found: tuple[list[int], list[int]] = ([], [])
    for index, (queue, name) in enumerate(zip(_TOKEN_QUEUES[engine], _TOKEN_NAMES, strict=True)):
        if not wanted[index]:
            continue
        if queue is None:
            where = f"the {ENGINES[engine]} engine has no such neighbour"
            raise TargetError(f"{describe(number, instruction)} has {name}, but {where}")
        found[index // 2].append(queue)
    return found


def _deadlock(
    instructions: Sequence[Instruction],
    queues: Sequence[Sequence[int]],
    heads: Sequence[int],
    takes: Sequence[Sequence[int]],
    tokens: Sequence[int],
) -> str:
    blocked: list[str] = []
    for queue, head in zip(queues, heads, strict=True):
        if head < len(queue):
            number = queue[head]
            missing = " and ".join(_QUEUE_NAMES[t] for t in takes[number] if tokens[t] == 0)
            blocked.append(f"{describe(number, instructions[number])} for a token from {missing}")
    done = f"{sum(heads)} of {len(instructions)} instructions can run"
    return f"the VTA stream has a deadlock: {done}, then these wait for ever: {', '.join(blocked)}"


def describe(number: int, instruction: Instruction) -> str:
    """An instruction in words, for messages."""
    kind = type(instruction).__name__.upper()
    if isinstance(instruction, Load):
        kind += f" {instruction.memory.name}"
    return f"instruction {number} ({kind})"


class Machine:
    """One VTA: its SRAMs, and the DRAM that it works on."""

    def __init__(self, config: VtaConfig, dram: np.ndarray, fill: int = 0) -> None:
        """Raises TargetError if `dram` is no flat, contiguous uint8 array. `fill`: see `simulate`."""
        if dram.dtype != np.uint8 or dram.ndim != 1 or not dram.flags.c_contiguous:
            raise TargetError("the DRAM of a VTA simulation must be a flat, contiguous array of uint8")
        self.statistics = Statistics()
        self._config = config
        self._dram = dram
        lanes = config.batch * config.block
        # Inputs and weights are kept as what the matrix products take; each is converted once, when it is loaded.
        self._inp = np.full((config.inp_depth, lanes), fill, np.float32)
        self._wgt = np.full((config.wgt_depth, config.block**2), fill, np.float32)
        self._acc = np.full((config.acc_depth, lanes), fill, np.int32)
        self._uops = np.zeros((config.uop_depth, 1), np.uint32)
        self._fields = np.zeros((3, config.uop_depth), np.intp)
        self._most_blocks = _EXACT // (config.block << 14)

    def execute(self, number: int, instruction: Instruction) -> None:
        """Do all of one instruction; `number` is for messages."""
        self.statistics.instructions += 1
        match instruction:
            case Gemm():
                self._gemm(number, instruction)
            case Alu():
                self._alu(number, instruction)
            case Load():
                self._load(number, instruction)
            case Store():
                self._store(number, instruction)
            case Finish():
                pass

    def _load(self, number: int, load: Load) -> None:
        if load.x_size == 0:
            return
        config = self._config
        count = load.x_size * load.y_size
        memory = load.memory
        if memory is MemoryId.UOP:
            sram, raw, width = self._uops, np.dtype("<u4"), 1
            self.statistics.uop_bytes += 4 * count
        elif memory is MemoryId.WGT:
            sram, raw, width = self._wgt, np.dtype(np.int8), config.wgt_bytes
            self.statistics.wgt_bytes += width * count
        elif memory is MemoryId.INP:
            sram, raw, width = self._inp, np.dtype(np.int8), config.inp_bytes
            self.statistics.inp_bytes += width * count
        elif memory is MemoryId.ACC:
            sram, raw, width = self._acc, np.dtype("<i4"), config.inp_bytes
            self.statistics.acc_bytes += 4 * width * count
        elif memory is MemoryId.ACC_8BIT:
            sram, raw, width = self._acc, np.dtype(np.int8), config.inp_bytes
            self.statistics.acc_bytes += width * count
        else:
            raise TargetError(f"{describe(number, load)} loads a memory that is only stored")
        columns = load.x_pad_0 + load.x_size + load.x_pad_1
        rows = load.y_pad_0 + load.y_size + load.y_pad_1
        if load.sram + rows * columns > len(sram):
            raise TargetError(
                f"{describe(number, load)} fills elements {load.sram} to {load.sram + rows * columns} of a memory of "
                f"{len(sram)}"
            )
        target = sram[load.sram : load.sram + rows * columns]
        if rows * columns != count:
            target[...] = 0
        if load.y_size > 0:
            inner = target.reshape(rows, columns, width)[
                load.y_pad_0 : load.y_pad_0 + load.y_size, load.x_pad_0 : load.x_pad_0 + load.x_size
            ]
            inner[...] = self._window(number, load, raw, width)
        if memory is MemoryId.UOP:
            self._fields[:, load.sram : load.sram + rows * columns] = decode_uops(target.tobytes(), config).T

    def _store(self, number: int, store: Store) -> None:
        count = store.x_size * store.y_size
        if count == 0:
            return
        if store.sram + count > len(self._acc):
            raise TargetError(
                f"{describe(number, store)} reads accumulators {store.sram} to {store.sram + count} of {len(self._acc)}"
            )
        width = self._config.inp_bytes
        self.statistics.out_bytes += width * count
        target = self._window(number, store, np.dtype(np.int8), width)
        source = self._acc[store.sram : store.sram + count].reshape(store.y_size, store.x_size, width)
        if store.x_stride >= store.x_size:
            target[...] = source
            return
        for row, values in zip(target, source, strict=True):  # rows overlap: the later one stays
            row[...] = values

    def _window(self, number: int, instruction: Load | Store, raw: np.dtype[np.generic], width: int) -> np.ndarray:
        """The elements of DRAM that an instruction moves: (y_size, x_size, width) of `raw`."""
        size = raw.itemsize * width
        start = instruction.dram * size
        end = start + ((instruction.y_size - 1) * instruction.x_stride + instruction.x_size) * size
        if end > self._dram.size:
            raise TargetError(
                f"{describe(number, instruction)} moves the DRAM bytes {start:#x} to {end:#x}, but the memory has "
                f"{self._dram.size:#x}"
            )
        shape = (instruction.y_size, instruction.x_size, width)
        return np.ndarray(shape, raw, self._dram, start, (instruction.x_stride * size, size, raw.itemsize))

    def _micro_ops(self, number: int, instruction: Gemm | Alu) -> np.ndarray:
        """The micro-ops of an instruction: (3, n), rows dst, src, wgt."""
        if instruction.uop_end > self._config.uop_depth:
            raise TargetError(
                f"{describe(number, instruction)} reads micro-op {instruction.uop_end - 1} of {self._config.uop_depth}"
            )
        return self._fields[:, instruction.uop_begin : instruction.uop_end]

    def _gemm(self, number: int, gemm: Gemm) -> None:
        micro_ops = self._micro_ops(number, gemm)
        steps = gemm.iter_out * gemm.iter_in * micro_ops.shape[1]
        if steps == 0:
            return
        loops = (
            (gemm.iter_out, (gemm.dst_out, gemm.src_out, gemm.wgt_out)),
            (gemm.iter_in, (gemm.dst_in, gemm.src_in, gemm.wgt_in)),
        )
        # Products are made for micro-ops that start at element 0, since the same ones serve every slot of the SRAMs.
        first = micro_ops.min(axis=1)
        micro_ops = micro_ops - first[:, None]
        moved = [sum((trips - 1) * factors[row] for trips, factors in loops) for row in range(3)]
        last = (first + micro_ops.max(axis=1) + moved).tolist()
        memories = (("accumulator", self._acc), ("input", self._inp), ("weight", self._wgt))
        for (name, memory), element in zip(memories[: 1 if gemm.reset else 3], last, strict=False):
            if element >= len(memory):
                raise TargetError(f"{describe(number, gemm)} uses {name} {element} of {len(memory)}")
        acc, inp, wgt = self._acc[first[0] :], self._inp[first[1] :], self._wgt[first[2] :]
        if gemm.reset:
            self.statistics.reset_steps += steps
            acc[_indices(micro_ops[0], gemm.iter_out, gemm.dst_out, gemm.iter_in, gemm.dst_in)] = 0
            return
        self.statistics.gemm_steps += steps
        for product in _products(micro_ops.tobytes(), loops, self._most_blocks):
            self._multiply(product, acc, inp, wgt)

    def _multiply(self, product: _Product, acc: np.ndarray, inp: np.ndarray, wgt: np.ndarray) -> None:
        batch, block = self._config.batch, self._config.block
        groups, blocks = product.wgt.shape
        weights = wgt.take(product.wgt, axis=0).reshape(groups, blocks, block, block).swapaxes(1, 2)
        inputs = self._rows(inp.take(product.src, axis=0))
        if product.shared:
            # One product for all groups, whose results stand beside each other: (p * batch, groups * block).
            sums = inputs @ weights.reshape(groups * block, blocks * block).T
            sums = sums.astype(np.int32).reshape(-1, batch, groups, block)
            if batch > 1:
                sums = sums.swapaxes(1, 2)
        else:
            weights = weights.reshape(groups, block, blocks * block).swapaxes(1, 2)
            sums = (inputs.reshape(groups, -1, blocks * block) @ weights).astype(np.int32)
        sums = sums.reshape(-1, batch * block)
        if product.order is not None:
            sums = np.add.reduceat(sums[product.order], product.starts, axis=0, dtype=np.int32)
        acc[product.dst] += sums

    def _rows(self, elements: np.ndarray) -> np.ndarray:
        """Input elements (..., blocks, batch * block) as rows of a matrix: (... * batch, blocks * block)."""
        batch, block, blocks = self._config.batch, self._config.block, elements.shape[-2]
        if batch > 1:
            elements = elements.reshape(-1, blocks, batch, block).swapaxes(1, 2)
        return elements.reshape(-1, blocks * block)

    def _alu(self, number: int, alu: Alu) -> None:
        micro_ops = self._micro_ops(number, alu)
        steps = alu.iter_out * alu.iter_in * micro_ops.shape[1]
        if steps == 0:
            return
        self.statistics.alu_steps += steps
        dst = _indices(micro_ops[0], alu.iter_out, alu.dst_out, alu.iter_in, alu.dst_in)
        src = None if alu.use_imm else _indices(micro_ops[1], alu.iter_out, alu.src_out, alu.iter_in, alu.src_in)
        last = max(int(indices.max()) for indices in (dst, src) if indices is not None)
        if last >= len(self._acc):
            raise TargetError(f"{describe(number, alu)} uses accumulator {last} of {len(self._acc)}")
        for part in self._independent(dst, src):
            places = dst[part]
            right = np.int32(alu.imm) if src is None else self._acc[src[part]]
            self._acc[places] = _operate(alu.op, self._acc[places], right)

    def _independent(self, dst: np.ndarray, src: np.ndarray | None) -> Iterator[slice | np.ndarray]:
        """Cut the steps of an ALU instruction into parts, in order, each of which may read all before it writes any."""
        steps = np.arange(dst.size)
        when = np.full(len(self._acc), dst.size)
        when[dst] = steps
        distinct = bool((when[dst] == steps).all())
        written = None if src is None else when[src]
        if distinct and (written is None or not (written < steps).any()):
            yield slice(None)
        elif written is None or (written == dst.size).all():
            # No step reads what another wrote but by its own accumulator: the first on each, then the second, ...
            order = np.argsort(dst, kind="stable")
            starts = _starts(dst[order])
            rank = steps - np.repeat(starts, np.diff(starts, append=dst.size))
            for turn in range(int(rank.max()) + 1):
                yield order[rank == turn]
        else:
            half = dst.size // 2
            for part in (slice(0, half), slice(half, dst.size)):
                for inner in self._independent(dst[part], None if src is None else src[part]):
                    yield steps[part][inner]


def _indices(base: np.ndarray, trips_out: int, out: int, trips_in: int, inner: int) -> np.ndarray:
    """The element of every step, in program order."""
    outer = np.arange(trips_out)[:, None, None] * out + np.arange(trips_in)[:, None] * inner
    return (outer + base).ravel()


@dataclass(frozen=True, eq=False)
class _Product:
    """A part of a GEMM instruction: for each group g, acc[...] += the sum over k of inp[src] @ wgt[wgt[g, k]].T.

    ``src``: (p, k) elements if the groups share them, else (g, p, k). ``dst``: the accumulators, distinct, one for each
    row of the results, which are (p, g) if shared, else (g, p). Where accumulators repeat, results are first put in
    `order`, and those from each of `starts` on summed.
    """

    src: np.ndarray
    wgt: np.ndarray
    dst: np.ndarray
    shared: bool
    order: np.ndarray | None
    starts: np.ndarray


_Loops: TypeAlias = tuple[tuple[int, tuple[int, int, int]], tuple[int, tuple[int, int, int]]]
"""Trips of the outer and the inner loop, and what each moves dst, src and wgt by."""


# Tiles of a layer repeat the same few instructions: the 7,200 of ResNet-18 are 91 different ones.
@lru_cache(maxsize=256)
def _products(micro_ops: bytes, loops: _Loops, most_blocks: int) -> tuple[_Product, ...]:
    """A GEMM instruction as matrix products of at most `most_blocks` blocks; `micro_ops`: bytes of intp (3, n)."""
    positions, steps = _merge(*_positions(np.frombuffer(micro_ops, np.intp).reshape(3, -1), loops))
    found: list[_Product] = []
    for dst, src, wgt in _groups(steps):
        shared = len(dst) > 1 and bool((src == src[0]).all())
        targets = positions[0][:, None] + dst if shared else dst[:, None] + positions[0]
        targets = targets.ravel()
        order, starts = None, np.zeros(0, np.intp)
        if not _distinct(targets):
            order = np.argsort(targets, kind="stable")
            starts = _starts(targets[order])
            targets = targets[order[starts]]
        for first in range(0, src.shape[1], most_blocks):
            blocks = src[:, first : first + most_blocks]
            places = positions[1][:, None] + blocks[0] if shared else positions[1][:, None] + blocks[:, None, :]
            found.append(_Product(places, wgt[:, first : first + most_blocks], targets, shared, order, starts))
    return tuple(found)


def _positions(micro_ops: np.ndarray, loops: _Loops) -> tuple[np.ndarray, np.ndarray]:
    """Split the loops of a GEMM: where weights stay the same they give positions (2, p), rows dst and src; the others
    are unrolled into micro-ops (3, n)."""
    positions = np.zeros((2, 1), np.intp)
    for trips, factors in loops:
        if trips == 1:
            continue
        offsets = np.array(factors, np.intp)[:, None] * np.arange(trips)
        if factors[2] == 0 and factors[0] != 0:
            positions = (positions[:, :, None] + offsets[:2, None, :]).reshape(2, -1)
        else:
            micro_ops = (micro_ops[:, :, None] + offsets[:, None, :]).reshape(3, -1)
    return positions, micro_ops


def _merge(positions: np.ndarray, micro_ops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Micro-ops that apply the same weights at places which are the same for all weights become positions."""
    weights = micro_ops[2]
    if _distinct(weights):
        return positions, micro_ops
    order = np.argsort(weights, kind="stable")
    starts = _starts(weights[order])
    count, rest = divmod(weights.size, starts.size)
    if rest or not np.array_equal(starts, np.arange(starts.size) * count):
        return positions, micro_ops
    places = micro_ops[:2, order].reshape(2, -1, count)
    relative = places - places[:, :, :1]
    if not (relative == relative[:, :1]).all():
        return positions, micro_ops
    positions = (positions[:, :, None] + relative[:, 0, None, :]).reshape(2, -1)
    return positions, micro_ops[:, order[starts]]


def _groups(micro_ops: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Micro-ops by accumulator: dst (g,), and src and wgt (g, k), once for each number k of micro-ops that one has."""
    if micro_ops.shape[1] > 1:
        micro_ops = micro_ops[:, np.lexsort((micro_ops[1], micro_ops[0]))]
    dst, src, wgt = micro_ops
    starts = _starts(dst)
    counts = np.diff(starts, append=dst.size)
    for count in np.unique(counts):
        first = starts[counts == count]
        members = first[:, None] + np.arange(count)
        yield dst[first], src[members], wgt[members]


def _distinct(indices: np.ndarray) -> bool:
    return int(np.bincount(indices).max()) == 1


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where a run of equal values begins."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))


def _operate(op: AluOp, left: np.ndarray, right: np.ndarray | np.int32) -> np.ndarray:
    """One ALU operation on int32, which wraps; amounts of shifts count modulo 32, as in the RTL."""
    match op:
        case AluOp.MIN:
            return np.minimum(left, right)
        case AluOp.MAX:
            return np.maximum(left, right)
        case AluOp.ADD:
            return left + right
        case AluOp.MUL:
            return left * right
        case AluOp.SHR:
            if right.ndim == 0:
                return left >> (right & 31) if right >= 0 else left << (-right & 31)
            return np.where(right >= 0, left >> (right & 31), left << (-right & 31))
