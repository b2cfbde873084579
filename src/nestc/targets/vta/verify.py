"""Proves that a VTA stream is safe before it runs: no deadlock, no hazard, no access outside a buffer.

Nothing of how tokens were made is used. The program order is what a stream means; it must itself be an order in which
no instruction ever waits (then no depth of the instruction queues can deadlock), and two instructions of different
engines that touch the same element, one of them writing, must be ordered by tokens. That order is computed with vector
clocks (Fidge 1988; Mattern 1989): one count for each engine, passed on in program order in an engine, and by the k-th
token pushed to the k-th pop of each queue. Also refused is what tvm-vta's functional simulator accepts and its RTL
(hardware/chisel, core/*.scala) does not do alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.assembly import line
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.encode import UOP_BYTES, EncodingError, encode, encode_uops
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
    Stream,
    engine_of,
)

# The counters of the token queues have 8 bits and do not count further (Semaphore.scala; Load, Compute, Store).
MOST_TOKENS = 255
# DRAM offsets are cut to 32 bits after they became bytes (TensorLoad.scala; sim_driver.cc computes in 32 bits too).
DRAM_END = 1 << 32

Where: TypeAlias = slice | np.ndarray


class StreamError(TargetError):
    """A stream that must not run; ``index`` is the instruction at fault, -1 for the stream as a whole."""

    def __init__(self, message: str, index: int = -1) -> None:
        """Keeps the index beside the message."""
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Region:
    """A buffer in DRAM: `size` bytes from `address`.

    ``filled``: holds values before the stream starts; else what is loaded from it must have been stored before.
    ``writable``: the stream may store to it. Regions may overlap, where memory is used again.
    """

    name: str
    address: int
    size: int
    filled: bool = True
    writable: bool = False


def verify(stream: Stream, config: VtaConfig, regions: Sequence[Region] | None = None) -> None:
    """Proves a stream safe. `regions`: all that it may load from and store to, beside its micro-ops; None: anywhere.

    SRAMs hold nothing at the start. The work is linear in the elements touched, a few seconds for 20,000 instructions.

    Raises:
        StreamError: says in one sentence which instruction breaks which rule.
    """
    try:
        encode(stream.instructions, config)
        encode_uops(stream.uops, config)
    except EncodingError as error:
        raise StreamError(str(error), error.index) from error
    order = _order(stream.instructions)
    _Machine(stream, config, order, regions).run()


# --- the order that tokens make


@dataclass(frozen=True)
class _Order:
    """``clocks[i, e]``: instructions of engine `e` that have surely ended when instruction i starts."""

    engines: list[int]
    own: list[int]  # number of an instruction among those of its engine
    members: list[list[int]]  # instructions of each engine
    clocks: np.ndarray  # int64 (instructions, 3)


@dataclass
class _Queue:
    """Tokens from one engine to a neighbour: the clock that each carries, and who pushed and popped."""

    clocks: list[tuple[int, int, int]]
    pushed: list[int]
    popped: list[int]


def _order(instructions: Sequence[Instruction]) -> _Order:
    queues = {(a, b): _Queue([], [], []) for a in range(3) for b in range(3) if abs(a - b) == 1}
    engines = [engine_of(item) for item in instructions]
    own: list[int] = []
    members: list[list[int]] = [[], [], []]
    last = [(0, 0, 0), (0, 0, 0), (0, 0, 0)]
    starts: list[tuple[int, int, int]] = []
    for index, (item, here) in enumerate(zip(instructions, engines, strict=True)):
        tokens = item.tokens
        clock = last[here]
        for set_, there in ((tokens.pop_prev, here - 1), (tokens.pop_next, here + 1)):
            if set_:
                queue = _queue(queues, there, here, index, instructions)
                if len(queue.popped) == len(queue.clocks):
                    raise StreamError(
                        f"{_name(index, item)} waits for a token of the {ENGINES[there]} engine that no earlier "
                        "instruction gives, so the engines would stop for ever",
                        index,
                    )
                clock = _later(clock, queue.clocks[len(queue.popped)])
                queue.popped.append(index)
        starts.append(clock)
        own.append(len(members[here]))
        members[here].append(index)
        end = _ended(clock, here, len(members[here]))
        last[here] = end
        for set_, there in ((tokens.push_prev, here - 1), (tokens.push_next, here + 1)):
            if set_:
                queue = _queue(queues, here, there, index, instructions)
                queue.clocks.append(end)
                queue.pushed.append(index)
                _check_room(queue, end, own, index, instructions, (here, there))
    _check_balance(queues, instructions)
    _check_finish(instructions, members, last)
    return _Order(engines, own, members, np.array(starts, np.int64).reshape(-1, 3))


def _queue(
    queues: dict[tuple[int, int], _Queue], giver: int, taker: int, index: int, instructions: Sequence[Instruction]
) -> _Queue:
    queue = queues.get((giver, taker))
    if queue is None:
        side = "before" if min(giver, taker) < 0 else "after"
        edge = ENGINES[0 if side == "before" else 2]
        raise StreamError(
            f"{_name(index, instructions[index])} has a token of an engine {side} {edge}, and there is none", index
        )
    return queue


def _check_room(
    queue: _Queue,
    end: tuple[int, int, int],
    own: list[int],
    index: int,
    instructions: Sequence[Instruction],
    edge: tuple[int, int],
) -> None:
    """The token pushed last may find at most 254 in the queue: the one 255 before it has surely been taken."""
    old = len(queue.clocks) - 1 - MOST_TOKENS
    if old < 0:
        return
    if old < len(queue.popped) and own[queue.popped[old]] < end[edge[1]]:
        return
    raise StreamError(
        f"{_name(index, instructions[index])} may find more than {MOST_TOKENS} tokens waiting from {ENGINES[edge[0]]} "
        f"to {ENGINES[edge[1]]}, which the hardware does not count",
        index,
    )


def _check_balance(queues: dict[tuple[int, int], _Queue], instructions: Sequence[Instruction]) -> None:
    for (giver, taker), queue in queues.items():
        left = len(queue.clocks) - len(queue.popped)
        if left:
            index = queue.pushed[-1]
            raise StreamError(
                f"{left} of the tokens from {ENGINES[giver]} to {ENGINES[taker]} are never taken, the last given by "
                f"{_name(index, instructions[index])}; the next stream would start with them",
                index,
            )


def _check_finish(
    instructions: Sequence[Instruction], members: list[list[int]], last: list[tuple[int, int, int]]
) -> None:
    if not instructions or not isinstance(instructions[-1], Finish):
        raise StreamError("the stream does not end with FINISH, so nobody would know when it has ended")
    for index, item in enumerate(instructions[:-1]):
        if isinstance(item, Finish):
            raise StreamError(f"{_name(index, item)} stands before the end of the stream", index)
    for which in (LOAD, STORE):
        done = last[COMPUTE][which]
        if done < len(members[which]):
            index = members[which][-1]
            raise StreamError(f"FINISH does not wait for {_name(index, instructions[index])}", index)


def _later(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2])


def _ended(clock: tuple[int, int, int], which: int, count: int) -> tuple[int, int, int]:
    values = list(clock)
    values[which] = count
    return values[0], values[1], values[2]


def _name(index: int, item: Instruction) -> str:
    return f"instruction {index} ({' '.join(line(item).split())})"


# --- what instructions touch


class _Elements:
    """Last accesses to the elements of one memory: numbers within an engine, -1 for never.

    One engine writes a memory; it and others read it.
    """

    def __init__(self, size: int, what: str, writer: int, readers: tuple[int, ...]) -> None:
        self.what, self.writer = what, writer
        self.written = np.full(size, -1, np.int64)
        self.read = {reader: np.full(size, -1, np.int64) for reader in readers if reader != writer}


class _Machine:
    """Walks the instructions in program order and compares every access with those that it must come after."""

    def __init__(self, stream: Stream, config: VtaConfig, order: _Order, regions: Sequence[Region] | None) -> None:
        self._stream, self._config, self._order, self._regions = stream, config, order, regions
        self._inp = _Elements(config.inp_depth, "input", LOAD, (COMPUTE,))
        self._wgt = _Elements(config.wgt_depth, "weight", LOAD, (COMPUTE,))
        self._acc = _Elements(config.acc_depth, "accumulator", COMPUTE, (STORE,))
        # The RTL stores from a copy of what GEMM and ALU write, where LOAD ACC does not write (Compute.scala).
        self._raw = np.zeros(config.acc_depth, bool)
        self._uops = np.zeros((config.uop_depth, 3), np.int64)
        self._uop_known = np.zeros(config.uop_depth, bool)
        self._starts, self._ends, self._places = self._stored_runs()
        size = int(self._places[-1]) if self._places.size else 0
        self._dram = _Elements(size, "DRAM", STORE, (LOAD, COMPUTE))

    def run(self) -> None:
        """Raises StreamError at the first instruction that breaks a rule."""
        for index, item in enumerate(self._stream.instructions):
            if isinstance(item, Finish) or (isinstance(item, Load | Store) and item.x_size == 0):
                continue  # only tokens
            if isinstance(item, Load):
                self._load(index, item)
            elif isinstance(item, Store):
                self._store(index, item)
            else:
                self._loop(index, item)

    # --- transfers

    def _load(self, index: int, item: Load) -> None:
        if item.memory in (MemoryId.OUT, MemoryId.ACC_8BIT):
            raise self._error(index, f"loads to {item.memory.name}, which not every VTA does")
        if item.y_size == 0:
            raise self._error(index, "moves rows of which there are none")
        rows, columns = item.y_pad_0 + item.y_size + item.y_pad_1, item.x_pad_0 + item.x_size + item.x_pad_1
        end = item.sram + rows * columns
        depth, size = {
            MemoryId.UOP: (self._config.uop_depth, UOP_BYTES),
            MemoryId.WGT: (self._config.wgt_depth, self._config.wgt_bytes),
            MemoryId.INP: (self._config.inp_depth, self._config.inp_bytes),
            MemoryId.ACC: (self._config.acc_depth, self._config.acc_bytes),
        }[item.memory]
        if end > depth:
            raise self._error(index, f"fills {item.memory.name} up to element {end - 1} of {depth}")
        where = slice(item.sram, end)
        if item.memory is MemoryId.UOP:
            self._load_uops(index, item, where)
        else:
            self._read_dram(index, item, size)
            elements = {MemoryId.INP: self._inp, MemoryId.WGT: self._wgt, MemoryId.ACC: self._acc}[item.memory]
            self._write(index, elements, where)
            if item.memory is MemoryId.ACC:
                self._raw[where] = True

    def _load_uops(self, index: int, item: Load, where: slice) -> None:
        first = item.dram - self._stream.uop_base
        last = first + (item.y_size - 1) * item.x_stride + item.x_size
        if first < 0 or last > len(self._stream.uops):
            raise self._error(
                index,
                f"loads micro-ops {first} to {last - 1} of the stream's image, which holds {len(self._stream.uops)}",
            )
        rows = np.zeros((item.y_pad_0 + item.y_size + item.y_pad_1, item.x_pad_0 + item.x_size + item.x_pad_1, 3), int)
        source = first + np.arange(item.y_size)[:, None] * item.x_stride + np.arange(item.x_size)
        inside = np.s_[item.y_pad_0 : item.y_pad_0 + item.y_size, item.x_pad_0 : item.x_pad_0 + item.x_size]
        rows[inside] = self._stream.uops[source]
        self._uops[where] = rows.reshape(-1, 3)
        self._uop_known[where] = True

    def _store(self, index: int, item: Store) -> None:
        if item.y_size == 0:
            raise self._error(index, "moves rows of which there are none")
        end = item.sram + item.y_size * item.x_size
        if end > self._config.acc_depth:
            raise self._error(index, f"stores accumulators up to {end - 1} of {self._config.acc_depth}")
        where = slice(item.sram, end)
        self._read(index, self._acc, where, STORE)
        if self._raw[where].any():
            place = item.sram + int(np.argmax(self._raw[where]))
            raise self._error(
                index,
                f"stores accumulator {place} as it was loaded, but the hardware stores only what GEMM or ALU wrote",
            )
        size = self._config.inp_bytes
        low, high = _extent(item, size)
        self._check_region(index, low, high, store=True)
        image = self._stream.uop_base * UOP_BYTES
        if low < image + len(self._stream.uops) * UOP_BYTES and high > image:
            raise self._error(index, f"stores over the micro-ops of the stream at {image:#x}")
        self._write(index, self._dram, self._units(_row_units(item, size, size)))

    # --- GEMM and ALU

    def _loop(self, index: int, item: Gemm | Alu) -> None:
        if item.uop_begin >= item.uop_end or not item.iter_out or not item.iter_in:
            raise self._error(index, "runs no micro-op, and the hardware would not stop")
        if item.uop_end > self._config.uop_depth:
            raise self._error(index, f"runs micro-ops up to {item.uop_end - 1} of {self._config.uop_depth}")
        used = slice(item.uop_begin, item.uop_end)
        if not self._uop_known[used].all():
            place = item.uop_begin + int(np.argmin(self._uop_known[used]))
            raise self._error(index, f"runs micro-op {place}, which no earlier instruction loads")
        uops = self._uops[used]
        dst = self._touched(index, item, uops[:, 0], (item.dst_out, item.dst_in), self._acc)
        if isinstance(item, Alu):
            self._check_alu(index, item, uops)
            self._read(index, self._acc, dst, COMPUTE)
            if not item.use_imm:
                src = self._touched(index, item, uops[:, 1], (item.src_out, item.src_in), self._acc)
                self._read(index, self._acc, src, COMPUTE)
        elif not item.reset:
            self._read(index, self._acc, dst, COMPUTE)
            inp = self._touched(index, item, uops[:, 1], (item.src_out, item.src_in), self._inp)
            wgt = self._touched(index, item, uops[:, 2], (item.wgt_out, item.wgt_in), self._wgt)
            self._read(index, self._inp, inp, COMPUTE)
            self._read(index, self._wgt, wgt, COMPUTE)
        self._write(index, self._acc, dst)
        self._raw[dst] = False

    def _touched(
        self, index: int, item: Gemm | Alu, base: np.ndarray, steps: tuple[int, int], memory: _Elements
    ) -> Where:
        depth = len(memory.written)
        highest, where = _footprint(base.tobytes(), item.iter_out, item.iter_in, *steps, depth)
        if where is None:
            raise self._error(index, f"reaches {memory.what} {highest} of {depth}")
        return where

    def _check_alu(self, index: int, item: Alu, uops: np.ndarray) -> None:
        if item.op is AluOp.MUL:
            raise self._error(index, "multiplies, which not every VTA does")
        if item.op is AluOp.SHR and item.use_imm and not -31 <= item.imm <= 31:
            raise self._error(index, f"shifts by {item.imm}, but 32 bits shift by -31 to 31")
        # With an immediate a micro-op takes a cycle, and reads what the one before has not written yet; else it takes
        # two, its source is read in the first (the bypasses that TensorAluPipelined asserts it does not need).
        column, steps = (0, (item.dst_out, item.dst_in)) if item.use_imm else (1, (item.src_out, item.src_in))
        counts, dst_steps = (item.iter_out, item.iter_in), (item.dst_out, item.dst_in)
        if _meets_next(uops[:, 0].tobytes(), uops[:, column].tobytes(), counts, dst_steps, steps):
            what = "changes" if item.use_imm else "reads"
            raise self._error(
                index, f"{what} an accumulator that the micro-op just before it writes, too soon for the pipeline"
            )

    # --- accesses

    def _read(self, index: int, memory: _Elements, where: Where, reader: int) -> None:
        written = memory.written[where]
        if memory.what != "DRAM" and int(written.min()) < 0:
            raise self._error(index, f"reads {self._element(memory, where, written < 0)}, which nothing has written")
        if reader == memory.writer:
            return
        clock = int(self._order.clocks[index, memory.writer])
        if int(written.max()) >= clock:
            late = written >= clock
            other = self._other(memory.writer, int(written[late][0]))
            raise self._error(
                index, f"reads {self._element(memory, where, late)} and does not wait for {other}, which writes it"
            )
        memory.read[reader][where] = self._order.own[index]

    def _write(self, index: int, memory: _Elements, where: Where) -> None:
        for reader, reads in memory.read.items():
            clock = int(self._order.clocks[index, reader])
            read = reads[where]
            if int(read.max()) >= clock:
                late = read >= clock
                other = self._other(reader, int(read[late][0]))
                raise self._error(
                    index, f"writes {self._element(memory, where, late)} and does not wait for {other}, which reads it"
                )
        memory.written[where] = self._order.own[index]

    def _other(self, which: int, own: int) -> str:
        index = self._order.members[which][own]
        return _name(index, self._stream.instructions[index])

    def _element(self, memory: _Elements, where: Where, chosen: np.ndarray) -> str:
        place = int(np.argmax(chosen))
        element = where.start + place if isinstance(where, slice) else int(where[place])
        if memory.what != "DRAM":
            return f"{memory.what} {element}"
        run = int(np.searchsorted(self._places, element, "right")) - 1
        unit = int(self._starts[run]) + element - int(self._places[run])
        return f"DRAM at {unit * self._config.inp_bytes:#x}"

    def _error(self, index: int, what: str) -> StreamError:
        return StreamError(f"{_name(index, self._stream.instructions[index])} {what}", index)

    # --- DRAM: only what is stored to is followed, in units of an output element

    def _stored_runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of units that the stream stores to: first unit, end, and where each begins in arrays of all of them."""
        size = self._config.inp_bytes
        rows = [
            _row_units(item, size, size)
            for item in self._stream.instructions
            if isinstance(item, Store) and item.x_size
        ]
        empty = np.zeros(0, np.int64)
        firsts = np.concatenate([empty, *(first for first, _ in rows)])
        ends = np.concatenate([empty, *(end for _, end in rows)])
        if not firsts.size:
            return empty, empty, empty
        sort = np.argsort(firsts, kind="stable")
        firsts, reach = firsts[sort], np.maximum.accumulate(ends[sort])
        begins = np.flatnonzero(np.concatenate([[True], firsts[1:] > reach[:-1]]))
        starts, stops = firsts[begins], reach[np.concatenate([begins[1:] - 1, [len(firsts) - 1]])]
        return starts, stops, np.concatenate([[0], np.cumsum(stops - starts)])

    def _units(self, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Places, in arrays of all stored units, of the units in rows; units never stored to are left out."""
        firsts, ends = rows
        units = (firsts[:, None] + np.arange(int((ends - firsts).max()))).ravel()
        if len(firsts) > 1:
            units = units[(units < np.repeat(ends, len(units) // len(ends)))]
        run = np.maximum(np.searchsorted(self._starts, units, "right") - 1, 0)
        inside = (units >= self._starts[run]) & (units < self._ends[run])
        return (self._places[run] + units - self._starts[run])[inside]

    def _read_dram(self, index: int, item: Load, size: int) -> None:
        low, high = _extent(item, size)
        filled = self._check_region(index, low, high, store=False)
        unit = self._config.inp_bytes
        run = int(np.searchsorted(self._ends, low // unit, "right"))
        stored = run < len(self._starts) and int(self._starts[run]) * unit < high
        rows = _row_units(item, size, unit) if stored or not filled else None
        where = self._units(rows) if rows is not None and stored else np.zeros(0, np.int64)
        if not filled and rows is not None:
            wanted = int((rows[1] - rows[0]).sum())
            if len(where) < wanted or (self._dram.written[where] < 0).any():
                raise self._error(index, f"loads from DRAM at {low:#x} what nothing has stored")
        if where.size:
            self._read(index, self._dram, where, self._order.engines[index])

    def _check_region(self, index: int, low: int, high: int, store: bool) -> bool:
        """Whether the bytes hold values from the start; raises StreamError if they are not all in one region."""
        if high > DRAM_END:
            raise self._error(index, f"reaches DRAM at {high:#x}, but addresses have 32 bits")
        if self._regions is None:
            return True
        around = [region for region in self._regions if region.address <= low and high <= region.address + region.size]
        if store:
            around = [region for region in around if region.writable]
        if not around:
            verb, buffer = ("stores to", "buffer to write") if store else ("loads from", "buffer")
            raise self._error(index, f"{verb} DRAM {low:#x} to {high - 1:#x}, which lies in no {buffer}")
        return any(region.filled for region in around)


def _extent(item: Load | Store, size: int) -> tuple[int, int]:
    """First byte in DRAM, and the one after the last."""
    return item.dram * size, (item.dram + (item.y_size - 1) * item.x_stride + item.x_size) * size


def _row_units(item: Load | Store, size: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end unit in DRAM of every row; rows that touch the same unit count it twice."""
    first = (item.dram + np.arange(item.y_size, dtype=np.int64) * item.x_stride) * size
    return first // unit, -(-(first + item.x_size * size) // unit)


@lru_cache(maxsize=2048)
def _footprint(
    base: bytes, outer: int, inner: int, step_out: int, step_in: int, depth: int
) -> tuple[int, Where | None]:
    """The highest element that loops around micro-ops touch, and all of them if the memory is so deep.

    A slice if they have no gaps, else an array without repeats.
    """
    places = np.frombuffer(base, np.int64)
    highest = int(places.max()) + (outer - 1) * step_out + (inner - 1) * step_in
    if highest >= depth:
        return highest, None
    places = _distinct(places)
    for count, step in ((inner, step_in), (outer, step_out)):
        if count > 1 and step:
            places = _distinct((places[:, None] + np.arange(count) * step).ravel())
    if highest - int(places[0]) + 1 == len(places):
        return highest, slice(int(places[0]), highest + 1)
    return highest, places


def _distinct(places: np.ndarray) -> np.ndarray:
    """Sorted, without repeats."""
    present = np.zeros(int(places.max()) + 1, bool)
    present[places] = True
    return np.flatnonzero(present)


@lru_cache(maxsize=2048)
def _meets_next(
    written: bytes, used: bytes, counts: tuple[int, int], steps: tuple[int, int], used_steps: tuple[int, int]
) -> bool:
    """Whether a micro-op writes, anywhere in the loops, the element that the next one in time uses."""
    dst, other = np.frombuffer(written, np.int64), np.frombuffer(used, np.int64)
    outer, inner = steps[0] - used_steps[0], steps[1] - used_steps[1]
    if _zero(dst[:-1] - other[1:], outer, counts[0], inner, counts[1]):
        return True
    wrap = dst[-1:] - other[:1]  # from the last micro-op to the first of the next iteration
    if _zero(wrap - used_steps[1], outer, counts[0], inner, counts[1] - 1):
        return True
    return _zero(wrap + (counts[1] - 1) * steps[1] - used_steps[0], outer, counts[0] - 1, 0, 1)


def _zero(offsets: np.ndarray, outer: int, outer_count: int, inner: int, inner_count: int) -> bool:
    """Whether offset + i * outer + j * inner is 0 for one of the offsets and some i < outer_count, j < inner_count."""
    if not offsets.size or outer_count < 1 or inner_count < 1:
        return False
    sums = np.unique(offsets)[:, None] + np.arange(outer_count if outer else 1) * outer
    if not inner:
        return bool((sums == 0).any())
    quotient, rest = np.divmod(-sums, inner)
    return bool(((rest == 0) & (quotient >= 0) & (quotient < inner_count)).any())
