"""What a modelled execution of VTA instructions says: cycles by instruction and by engine, micro-ops and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import ENGINES, Finish, Gemm, Instruction, Load, MemoryId, Store

INSTRUCTION_BYTES, UOP_BYTES = 16, 4


@dataclass(frozen=True)
class Engine:
    """Where the cycles of one engine went; the four parts add up to the cycles of the report.

    ``busy``: executing; ``tokens``: an instruction was there and waited for a token; ``instructions``: waiting for
    fetch; ``idle``: after its last instruction.
    """

    name: str
    count: int
    busy: int
    tokens: int
    instructions: int
    idle: int

    @property
    def utilization(self) -> float:
        """Busy cycles over all cycles."""
        return self.busy / max(self.busy + self.tokens + self.instructions + self.idle, 1)


@dataclass(frozen=True)
class Work:
    """What a stream asks for, independent of time: micro-ops by sort, and bytes by kind.

    ``read``: bytes of elements by kind (insn, uop, inp, wgt, acc); ``bus_read``, ``bus_written``: bytes of the beats
    that carried them, more where a row begins or ends inside a beat.
    """

    gemm: int
    reset: int
    alu_immediate: int
    alu_tensor: int
    read: dict[str, int]
    written: int
    bus_read: int
    bus_written: int


@dataclass(frozen=True, eq=False)
class Report:
    """Modelled execution of one stream.

    ``start``, ``end`` (exclusive), ``queued`` (in its engine's queue): int64 cycles by instruction, in program order;
    ``engine``: index in `ENGINES`. ``cycles`` counts from the launch to the last end.
    """

    cycles: int
    start: np.ndarray
    end: np.ndarray
    queued: np.ndarray
    engine: np.ndarray
    work: Work
    config: VtaConfig
    engines: tuple[Engine, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Modelled time at the clock of the configuration."""
        return self.cycles / self.config.clock_hz

    @property
    def gemm_utilization(self) -> float:
        """Cycles in which the GEMM core multiplies, over all cycles."""
        return self.work.gemm / max(self.cycles, 1)

    def between(self, first: int, last: int) -> int:
        """Cycles that instructions first .. last - 1 add: from the end of all before them to their own last end.

        Shares of consecutive ranges add up to `cycles`.
        """
        before = int(self.end[:first].max()) if first > 0 else 0
        through = int(self.end[:last].max()) if last > 0 else 0
        return through - before


def engine_parts(
    engine: int, start: np.ndarray, end: np.ndarray, queued: np.ndarray, order: np.ndarray, cycles: int
) -> Engine:
    """Where the cycles of an engine went; ``order``: its instructions."""
    begin, stop, there = start[order], end[order], queued[order]
    free = np.concatenate([[0], stop[:-1]]) if len(order) else stop
    busy = int((stop - begin).sum())
    fetch = int(np.maximum(there - free, 0).sum())
    tokens = int((begin - np.maximum(there, free)).sum())
    return Engine(ENGINES[engine], len(order), busy, tokens, fetch, cycles - busy - fetch - tokens)


def count_work(
    instructions: Iterable[Instruction], config: VtaConfig, bus_read: int = 0, bus_written: int = 0, fetched: int = 0
) -> Work:
    """Micro-ops and bytes that instructions ask for."""
    sizes = {MemoryId.UOP: UOP_BYTES, MemoryId.INP: config.inp_bytes, MemoryId.WGT: config.wgt_bytes}
    read: dict[str, int] = {"insn": fetched, "uop": 0, "inp": 0, "wgt": 0, "acc": 0}
    ops = [0, 0, 0, 0]
    written = 0
    for instruction in instructions:
        if isinstance(instruction, Load):
            size = sizes.get(instruction.memory, config.acc_bytes)
            read[instruction.memory.name[:3].lower()] += instruction.y_size * instruction.x_size * size
        elif isinstance(instruction, Store):
            written += instruction.y_size * instruction.x_size * config.inp_bytes
        elif not isinstance(instruction, Finish):
            count = (instruction.uop_end - instruction.uop_begin) * instruction.iter_out * instruction.iter_in
            if isinstance(instruction, Gemm):
                ops[1 if instruction.reset else 0] += count
            else:
                ops[2 if instruction.use_imm else 3] += count
    return Work(ops[0], ops[1], ops[2], ops[3], read, written, bus_read, bus_written)
