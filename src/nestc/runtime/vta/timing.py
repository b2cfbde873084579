"""How long a VTA takes for its instructions: a model of its engines, queues and memory, cycle by cycle where they meet.

Modelled time, never measured. Every constant is a field of `Timing`, counted in the states of the published RTL
(apache/tvm-vta ``hardware/chisel``; docs/vta-timing.md has the list); nothing is fitted to a network or a layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import (
    COMPUTE,
    LOAD,
    STORE,
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    MemoryId,
    Store,
    Tokens,
    engine_of,
)
from nestc.runtime.vta.report import INSTRUCTION_BYTES, UOP_BYTES, Report, count_work, engine_parts

# Clients of the read channel in the order in which VME serves requests of the same cycle (VME.scala, Core.scala).
_FETCH, _UOP, _INP, _WGT, _ACC, _OUT = range(6)
_CLIENT = {MemoryId.UOP: _UOP, MemoryId.INP: _INP, MemoryId.WGT: _WGT, MemoryId.ACC: _ACC, MemoryId.ACC_8BIT: _ACC}
_MOST_TOKENS = 255  # Semaphore(counterBits = 8)
_NEVER = 1 << 62


@dataclass(frozen=True)
class Timing:
    """Constants of the machine, in cycles; the defaults are the RTL of tvm-vta since pull request 32 (August 2021).

    A cycle is named by what is visible at its start: an instruction that starts at cycle t and takes n leaves its
    engine and its tokens free for cycle t + n.
    """

    micro_op: int = 1
    """A GEMM micro-op, also of a reset, and an ALU one with an immediate (TensorGemm, TensorAlu index generators)."""
    alu_tensor: int = 2
    """An ALU micro-op with a tensor operand: its index generator visits source and destination in turn (`stutter`)."""
    compute_overhead: int = 7
    """GEMM and ALU beside their micro-ops: Compute idle 1, start register and unit idle 1, pipeline 4, done 1."""
    sync: int = 2
    """An instruction that only moves tokens (x_size 0), and FINISH: states idle and sync, or idle and execute."""
    load_command: int = 1
    """Start of a load to its first request (GenVMECmd); as many cycles more as there are rows of padding above."""
    command_interval: int = 2
    """Between two requests of one client: its command queue in VME holds one and is not written while full."""
    command_path: int = 2
    """Request to its arrival at the memory: client queue 1, request queue of the memory 1."""
    memory_delay: int = 16
    """Waiting time of a request that finds the memory's queue empty (dpiDelay in VTAMemDPI.scala)."""
    data_path: int = 2
    """Memory accepts a request to the first beat at the client: memory 1, look-up of the tag in VME 1."""
    drain_narrow: int = 3
    """Last beat of a load to the next instruction, elements wider than the bus (TensorLoadNarrowVME)."""
    drain_wide: int = 2
    """The same for elements that fit in a beat (TensorLoadWideVME, which has a register less)."""
    outstanding: int = 16
    """Read requests that a device may have open (VMEParams.RequestQueueDepth)."""
    reopen: int = 0
    """Last beat at the memory to the next request, where `outstanding` are open."""
    burst_beats: int = 256
    """Beats of a request at most; none crosses a multiple of that many beats (AXI lenBits 8)."""
    store_start: int = 1
    """Start of a store to its first request (TensorStore idle)."""
    store_address: int = 1
    """Request of a store to its place at the memory (VME write FSM: idle)."""
    store_burst: int = 3
    """A write request beside its beats: address at VME and at the memory 2, response 1."""
    store_read: int = 1
    """SRAM read between two rows of elements wider than the bus (TensorStoreNarrowVME sReadMem)."""
    fetch_start: int = 1
    """Launch to the first request for instructions (Fetch idle)."""
    dispatch_narrow: int = 1
    """Last beat of a batch of instructions to its first dispatch, bus of 64 bits (Fetch64Bit)."""
    dispatch_wide: int = 4
    """The same for wider buses (FetchWideVME: registers and a queue more)."""
    refetch: int = 2
    """Last dispatch of a batch to the request for the next (state drain, then request)."""
    command_queue: int = 512
    """Instructions in an engine's queue, the running one included; a full one stops the dispatch (instQueueEntries)."""
    shared_port: bool = False
    """Whether the memory serves a read or a write at a time (before pull request 32), not one of each."""
    fetch: bool = True
    """False: all instructions wait in the queues from the beginning, to time a piece of a longer stream."""


RTL = Timing()
# The memory path before pull request 32: VMESimple and TensorLoadSimple, one request at a time. A memory without delay
# that serves either reads or writes is that of older sources, and assumed for June 2021 (pull request 30).
RTL_SIMPLE = Timing(
    command_interval=0,
    memory_delay=0,
    data_path=1,
    drain_narrow=1,
    drain_wide=1,
    outstanding=1,
    reopen=1,
    shared_port=True,
)


def simulate_timing(instructions: Sequence[Instruction], config: VtaConfig, timing: Timing = RTL) -> Report:
    """Model the execution of a stream on one device; a stream that waits forever is a `TargetError`."""
    return simulate_timing_many([instructions], config, timing)[0]


def simulate_timing_many(
    streams: Sequence[Sequence[Instruction]], config: VtaConfig, timing: Timing = RTL
) -> list[Report]:
    """Model streams launched together, one a device, that share the memory: one read and one write channel for all.

    The time of the launch is the largest of the reports' cycles.
    """
    read = _Port()
    write = read if timing.shared_port else _Port()
    devices = [_Device(s, config, timing, read, write) for s in streams]
    for device in devices:
        device.launch()
    _serve([d for d in devices if d.waiting])
    return [device.report() for device in devices]


class _Port:
    """One channel of the memory: the cycle from which it can take a request, and the cycle of the last one taken."""

    __slots__ = ("free", "taken")

    def __init__(self) -> None:
        self.free = 0
        self.taken = -1


class _Transfer:
    """A load, a store or a fetch under way: what is left of its requests, and the cycle of the next."""

    __slots__ = ("beats", "client", "done", "index", "last", "next")

    def __init__(self, client: int, index: int, cycle: int, beats: tuple[int, ...]) -> None:
        self.client, self.index, self.next, self.beats = client, index, cycle, beats
        self.done = 0
        self.last = cycle


def _serve(devices: list[_Device]) -> None:
    """Serve requests of all devices in the order of their cycles, until none is left.

    Whoever is not in a `waiting` list depends on a transfer that is, so nothing earlier can appear later.
    """
    if len(devices) == 1:
        device, waiting = devices[0], devices[0].waiting
        while waiting:
            best, limit = waiting[0], _NEVER
            for other in waiting[1:]:
                if (other.next, other.client) < (best.next, best.client):
                    best, limit = other, best.next
                elif other.next < limit:
                    limit = other.next
            device.advance(best, limit)
        return
    while True:
        order = sorted((t.next, t.client, n) for n, d in enumerate(devices) for t in d.waiting)
        if not order:
            return
        cycle, client, n = order[0]
        transfer = next(t for t in devices[n].waiting if t.next == cycle and t.client == client)
        devices[n].advance(transfer, order[1][0] if len(order) > 1 else _NEVER)


class _Device:
    """State of one VTA. Times known so far are resolved at once; only transfers wait for `_serve`."""

    def __init__(
        self, stream: Sequence[Instruction], config: VtaConfig, timing: Timing, read: _Port, write: _Port
    ) -> None:
        self.stream, self.config, self.timing = stream, config, timing
        self.read_port, self.write_port = read, write
        self.beat = config.bus_bits // 8
        self.bytes = (
            INSTRUCTION_BYTES,
            UOP_BYTES,
            config.inp_bytes,
            config.wgt_bytes,
            config.acc_bytes,
            config.inp_bytes,
        )
        self.waiting: list[_Transfer] = []
        self.open: deque[int] = deque()
        self.engine = [engine_of(i) for i in stream]
        n = len(stream)
        self.start, self.end, self.queued = [-1] * n, [-1] * n, [-1] * n
        self.order: tuple[list[int], list[int], list[int]] = ([], [], [])
        self.rank = [0] * n
        for i, e in enumerate(self.engine):
            self.rank[i] = len(self.order[e])
            self.order[e].append(i)
        self.position = [0, 0, 0]
        self.free = [0, 0, 0]
        self.held = [False, False, False]
        # Tokens: the queues that each instruction takes from and gives to; cycles of pushes and number taken by queue.
        flags = [_queues(e, i.tokens) for e, i in zip(self.engine, stream)]
        self.pops, self.gives = [f[0] for f in flags], [f[1] for f in flags]
        self.pushes: tuple[list[int], ...] = ([], [], [], [])
        self.taken = [0, 0, 0, 0]
        # A batch of instructions is a burst, but not more than a burst of 128 bits holds (Fetch64Bit, FetchWideVME).
        self.batch = max(timing.burst_beats * min(self.beat, INSTRUCTION_BYTES) // INSTRUCTION_BYTES, 1)
        self.dispatched, self.batch_end, self.dispatch = 0, 0, 0
        self.bus_read = self.bus_written = 0

    # Instructions reach the engines.

    def launch(self) -> None:
        """Begin with the first batch of instructions, and everything that follows without a transfer."""
        if not self.timing.fetch:
            self.queued = [0] * len(self.stream)
            self.dispatched = self.batch_end = len(self.stream)
        elif self.stream:
            self._fetch(self.timing.fetch_start)
        self._resolve()

    def _fetch(self, cycle: int) -> None:
        beats = self.timing.burst_beats
        count = min(self.batch, len(self.stream) - self.dispatched)
        length = -(-count * INSTRUCTION_BYTES // self.beat)
        self.waiting.append(_Transfer(_FETCH, -1, cycle, _split(0, 1, length * self.beat, 0, self.beat, beats)))

    def _dispatch(self) -> None:
        """Give out what is fetched, one instruction a cycle in program order, until a queue is full."""
        first, depth = self.dispatched, self.timing.command_queue
        if first == self.batch_end:
            return
        cycle = self.dispatch
        engine, rank, order, end, queued = self.engine, self.rank, self.order, self.end, self.queued
        i = first
        while i < self.batch_end:
            if rank[i] >= depth:
                freed = end[order[engine[i]][rank[i] - depth]]
                if freed < 0:
                    break
                cycle = max(cycle, freed)
            cycle += 1
            queued[i] = cycle
            i += 1
        self.dispatched, self.dispatch = i, cycle
        if i == self.batch_end and i < len(self.stream):
            self._fetch(cycle - 1 + self.timing.refetch)

    # Engines execute.

    def _resolve(self) -> None:
        """Start and end every instruction whose moment is known by now."""
        moved = True
        while moved:
            self._dispatch()
            moved = self._run(COMPUTE)
            moved = self._run(LOAD) or moved
            moved = self._run(STORE) or moved

    def _run(self, engine: int) -> bool:
        if self.held[engine]:
            return False
        order, position, stream, timing = self.order[engine], self.position[engine], self.stream, self.timing
        pops, gives, pushes, taken = self.pops, self.gives, self.pushes, self.taken
        queued, start, end = self.queued, self.start, self.end
        free, begin = self.free[engine], position
        while position < len(order):
            i = order[position]
            cycle = queued[i]
            if cycle < 0:
                break
            if free > cycle:
                cycle = free
            for q in pops[i]:
                if taken[q] == len(pushes[q]):
                    cycle = -1
                    break
                cycle = max(cycle, pushes[q][taken[q]])
            if cycle < 0:
                break
            for q in pops[i]:
                taken[q] += 1
            instruction = stream[i]
            start[i] = cycle
            position += 1
            if isinstance(instruction, Gemm):
                count = (instruction.uop_end - instruction.uop_begin) * instruction.iter_out * instruction.iter_in
                free = cycle + timing.compute_overhead + count * timing.micro_op
            elif isinstance(instruction, Alu):
                count = (instruction.uop_end - instruction.uop_begin) * instruction.iter_out * instruction.iter_in
                step = timing.micro_op if instruction.use_imm else timing.alu_tensor
                free = cycle + timing.compute_overhead + count * step
            elif isinstance(instruction, Finish) or not instruction.x_size:
                free = cycle + timing.sync
            else:
                self._transfer(i, instruction, cycle)
                self.held[engine] = True
                break
            end[i] = free
            for q in gives[i]:
                pushes[q].append(free)
        self.position[engine], self.free[engine] = position, free
        return position != begin

    def _transfer(self, i: int, instruction: Load | Store, cycle: int) -> None:
        if isinstance(instruction, Store):
            client, first = _OUT, cycle + self.timing.store_start
        else:
            client, first = _CLIENT[instruction.memory], cycle + self.timing.load_command + instruction.y_pad_0
        size, beats = self.bytes[client], self.timing.burst_beats
        # Alignment within the longest burst is all that matters of an address.
        place = instruction.dram * size % (beats * self.beat)
        requests = _split(
            place, instruction.y_size, instruction.x_size * size, instruction.x_stride * size, self.beat, beats
        )
        self.waiting.append(_Transfer(client, i, first, requests))

    # Transfers go on.

    def advance(self, transfer: _Transfer, limit: int) -> None:
        """Serve requests of a transfer up to cycle `limit`; when it is complete, resolve all that follows from it."""
        if transfer.client == _OUT:
            self._write(transfer)
        else:
            self._read(transfer, limit)
        if transfer.done < len(transfer.beats):
            return
        self.waiting.remove(transfer)
        if transfer.client == _FETCH:
            self.batch_end = min(self.dispatched + self.batch, len(self.stream))
            wide = self.config.bus_bits >= 128
            self.dispatch = transfer.last + (self.timing.dispatch_wide if wide else self.timing.dispatch_narrow)
        else:
            self._complete(transfer)
        self._resolve()

    def _read(self, transfer: _Transfer, limit: int) -> None:
        timing, port, opened, beats = self.timing, self.read_port, self.open, transfer.beats
        path, delay, interval = timing.command_path, timing.memory_delay, timing.command_interval
        data, most, reopen = timing.data_path, timing.outstanding, timing.reopen
        cycle, k, last, taken, free = transfer.next, transfer.done, transfer.last, port.taken, port.free
        while True:
            wanted = cycle
            if len(opened) >= most and opened[0] > cycle:
                cycle = opened[0]
            # A request leaves its client's queue a cycle later, but not while a last beat frees its tag (VME.scala).
            while cycle + 1 in opened:
                cycle += 1
            if cycle > wanted and cycle >= limit:
                break
            if len(opened) >= most:
                opened.popleft()
            length = beats[k]
            arrival = cycle + path
            # The memory counts its delay while a request waits, so one that joins a waiting one has none of its own.
            if arrival > taken + 1:
                arrival += delay
            taken = arrival if arrival > free else free
            free = taken + length
            last = free + data - 1
            opened.append(free + reopen)
            k += 1
            cycle += interval
            if k == len(beats) or cycle >= limit:
                break
        transfer.next, transfer.done, transfer.last = cycle, k, last
        port.taken, port.free = taken, free

    def _write(self, transfer: _Transfer) -> None:
        timing, length = self.timing, transfer.beats[transfer.done]
        cycles = length
        if self.config.bus_bits < 8 * self.bytes[_OUT]:
            row = max(self.config.block * (1 << self.config.log_inp_width) // self.config.bus_bits, 1)
            cycles += (-(-length // row) - 1) * timing.store_read
        begin = max(transfer.next + timing.store_address, self.write_port.free)
        transfer.next = self.write_port.free = begin + timing.store_burst + cycles
        transfer.last = transfer.next
        transfer.done += 1

    def _complete(self, transfer: _Transfer) -> None:
        i, timing = transfer.index, self.timing
        instruction, engine = self.stream[i], self.engine[i]
        moved = sum(transfer.beats) * self.beat
        if isinstance(instruction, Load):
            wide = self.config.bus_bits >= 8 * self.bytes[transfer.client]
            end = transfer.last + (timing.drain_wide if wide else timing.drain_narrow)
            end = max(end, self._padded(instruction, self.start[i], end, sum(transfer.beats)))
            self.bus_read += moved
        else:
            end = transfer.last
            self.bus_written += moved
        self.end[i] = self.free[engine] = end
        self.held[engine] = False
        for q in self.gives[i]:
            self.pushes[q].append(end)

    def _padded(self, load: Load, start: int, end: int, beats: int) -> int:
        """End of writing zeros, an element a cycle whenever no data arrives (ZeroPadding)."""
        width = load.x_pad_0 + load.x_size + load.x_pad_1
        zeros = width * (load.y_pad_0 + load.y_size + load.y_pad_1) - load.x_size * load.y_size
        if not zeros:
            return 0
        alone = start + 3 + zeros
        return alone if alone <= end - beats else alone + beats

    # Results.

    def report(self) -> Report:
        """Times and counts as a `Report`."""
        for e in range(3):
            if self.position[e] < len(self.order[e]):
                raise TargetError(self._stuck(e))
        start, end, queued = (np.array(x, np.int64) for x in (self.start, self.end, self.queued))
        engine = np.array(self.engine, np.uint8)
        self._check_tokens()
        cycles = int(end.max()) if len(end) else 0
        fetched = len(self.stream) * INSTRUCTION_BYTES if self.timing.fetch else 0
        work = count_work(self.stream, self.config, self.bus_read + fetched, self.bus_written, fetched)
        engines = tuple(
            engine_parts(e, start, end, queued, np.array(self.order[e], np.int64), cycles) for e in range(3)
        )
        return Report(cycles, start, end, queued, engine, work, self.config, engines)

    def _stuck(self, engine: int) -> str:
        i = self.order[engine][self.position[engine]]
        why = (
            "is never fetched, since a queue before it stays full"
            if self.queued[i] < 0
            else "waits for a token that never comes"
        )
        return f"the instructions deadlock: number {i} ({type(self.stream[i]).__name__.lower()}) {why}"

    def _check_tokens(self) -> None:
        """Refuse a stream that leaves more tokens in a queue than the hardware counts."""
        for q, pushed in enumerate(self.pushes):
            if len(pushed) <= _MOST_TOKENS:
                continue
            pops = np.sort([self.start[i] for i, queues in enumerate(self.pops) if q in queues])
            left = int((np.arange(1, len(pushed) + 1) - np.searchsorted(pops, np.array(pushed))).max())
            if left > _MOST_TOKENS:
                raise TargetError(
                    f"{left} tokens {_QUEUES[q]} wait at once, but the hardware counts to {_MOST_TOKENS} and loses some"
                )


_QUEUES = ("from load to compute", "from compute to load", "from compute to store", "from store to compute")


@cache
def _queues(engine: int, tokens: Tokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices in `_QUEUES` that an instruction takes from and gives to; an engine ignores flags it does not decode."""
    pop_prev, pop_next, push_prev, push_next = ((-1, 1, -1, 0), (0, 3, 1, 2), (2, -1, 3, -1))[engine]
    takes = ((tokens.pop_prev, pop_prev), (tokens.pop_next, pop_next))
    gives = ((tokens.push_prev, push_prev), (tokens.push_next, push_next))
    return tuple(q for flag, q in takes if flag and q >= 0), tuple(q for flag, q in gives if flag and q >= 0)


@lru_cache(maxsize=1 << 16)
def _split(place: int, rows: int, size: int, stride: int, beat: int, most: int) -> tuple[int, ...]:
    """Beats of each request for `rows` rows of `size` bytes, `stride` apart, from address `place` (GenVMECmd)."""
    requests: list[int] = []
    for row in range(rows):
        address = place + row * stride
        first = address // beat
        left = -(-(address + size) // beat) - first
        room = most - first % most
        while left > 0:
            requests.append(min(left, room))
            left -= requests[-1]
            room = most
    return tuple(requests)
