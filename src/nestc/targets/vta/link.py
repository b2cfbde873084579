"""Instructions in program order become a stream: micro-ops get places, engines that conflict get tokens.

The three engines of VTA (load, compute, store) run at their own pace; what the program order means must follow from
tokens (VTA paper, arXiv:1807.04188, section 3.2). Micro-ops are brought to SRAM a window of instructions at a time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import (
    COMPUTE,
    LOAD,
    NONE,
    STORE,
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    MemoryId,
    Stream,
    Tokens,
    engine_of,
)
from nestc.targets.vta.emit import MOST_ELEMENTS, Access, Bytes, Elements, Piece, Where

_TAKERS = ((COMPUTE,), (LOAD, STORE), (COMPUTE,))

MOST_TOKENS = 255
"""Outstanding in a queue; the counters of the hardware have 8 bits."""

_MANY_TOKENS = 200
_ENOUGH_TOKENS = 100

NOP = Load(MemoryId.UOP, 0, 0, 0, 0, 0)
"""An instruction of the compute engine that only takes and gives tokens."""


def link(pieces: Sequence[Piece], config: VtaConfig, uop_base: int) -> Stream:
    """The stream that does what `pieces` do one after another, and ends when all is stored.

    ``uop_base``: where the image of micro-ops will lie in DRAM, in micro-ops of 4 bytes. Raises TargetError if the
    micro-ops of one instruction do not fit in their SRAM.
    """
    placed, uops = _place_uops(pieces, config, uop_base)
    return Stream(tuple(_Synchronizer(pieces, config).run(placed)), uops, uop_base)


# --- micro-ops


def _place_uops(
    pieces: Sequence[Piece], config: VtaConfig, uop_base: int
) -> tuple[list[tuple[Piece, int]], np.ndarray]:
    """Pieces and where their micro-ops begin, with a LOAD UOP before each window, and the image of all windows.

    A window is as many instructions as find room for their micro-ops at the same time; equal lists share a place. Few
    long loads cost least: each holds the compute engine up, the longer the busier DRAM is with tiles.
    """
    room = min(config.uop_depth, MOST_ELEMENTS)
    result: list[tuple[Piece, int]] = []
    image: list[np.ndarray] = []
    size = 0  # of the image
    window: list[np.ndarray] = []
    places: dict[bytes, int] = {}
    used = 0  # micro-ops of the window
    at = 0  # where its LOAD goes

    def close() -> None:
        nonlocal size
        if not window:
            return
        if used % 2:  # windows begin at whole 64-bit words, as the RTL fetches them
            window.append(np.zeros((1, 3), np.int64))
        load = Load(MemoryId.UOP, 0, uop_base + size, 1, used, used)
        touched = Elements(MemoryId.UOP, slice(0, used))
        result.insert(at, (Piece(load, (), (touched,), None, result[at][0].origin), 0))
        image.extend(window)
        size += used + used % 2

    for piece in pieces:
        if piece.uops is None:
            result.append((piece, 0))
            continue
        key, count = piece.uops.tobytes(), len(piece.uops)
        begin = places.get(key)
        if begin is None:
            if count > room:
                raise TargetError(f"{piece.origin}: {count} micro-ops of one instruction do not fit in {room}")
            if not window or used + count > room:
                close()
                window, places, used, at = [], {}, 0, len(result)
            begin = places[key] = used
            window.append(piece.uops)
            used += count
        result.append((piece, begin))
    close()
    return result, np.concatenate(image) if image else np.zeros((0, 3), np.int64)


# --- dependency tokens


@dataclass(eq=False)
class _Issued:
    """An instruction of an engine: where it stands in the program, its tokens, and what is known when it starts.

    ``known[engine]``: so many instructions of that engine have ended by then.
    """

    position: int
    known: list[int]
    instruction: Instruction
    uop_begin: int = 0
    tokens: list[bool] = field(default_factory=lambda: [False] * 4)

    def finished(self) -> Instruction:
        """The instruction with its micro-ops and tokens."""
        instruction, begin = self.instruction, self.uop_begin
        tokens = _TOKENS[tuple(self.tokens)]
        if isinstance(instruction, (Gemm, Alu)):
            return replace(instruction, uop_begin=begin, uop_end=begin + instruction.uop_end, tokens=tokens)
        return replace(instruction, tokens=tokens) if tokens != NONE else instruction


_TOKENS = {flags: Tokens(*flags) for flags in product((False, True), repeat=4)}


class _Synchronizer:
    """Walks through the program and adds tokens where an instruction needs what another engine does not yet promise.

    Instructions of an engine are numbered from 1 and run in order, so "number n of engine F has ended" says all that
    F did up to there. A token from F to E is given by one instruction of F (push) and taken by one of E (pop); E then
    knows that F's instruction ended, and all that was known there (vector clocks: Mattern, "Virtual time and global
    states of distributed systems", 1989).

    Why the k-th pop of a queue meets the k-th push: tokens are added in program order of their pops, and one is added
    only if the instruction that has to end is behind every one of F that E knows of, that is behind the last push of
    the queue. So pushes rise as pops do. An instruction therefore pushes at most once to a queue, and it pops at most
    once because it waits for the last of all that it needs. Every push stands before its pop in the program, so the
    program order itself is a schedule: there is no deadlock.

    Load and store have no queue between them; an instruction of compute that waits for one and is waited for by the
    other stands between: one that knows already, else the last one, else an empty one made for it.
    """

    def __init__(self, pieces: Sequence[Piece], config: VtaConfig) -> None:
        self.issued: tuple[list[_Issued], ...] = ([], [], [])
        self.known = [[0, 0, 0] for _ in range(3)]
        self.program: list[_Issued] = []
        self.pushes: dict[tuple[int, int], list[int]] = {q: [] for q in ((0, 1), (1, 0), (1, 2), (2, 1))}
        self.pops: dict[tuple[int, int], list[int]] = {q: [] for q in self.pushes}
        self.touched = _Touched(pieces, config)

    def run(self, pieces: Iterable[tuple[Piece, int]]) -> Iterator[Instruction]:
        """All instructions with their tokens, FINISH at the end."""
        for piece, uop_begin in pieces:
            engine = engine_of(piece.instruction)
            reads, writes = self.touched.places(piece.reads), self.touched.places(piece.writes)
            self.issue(piece.instruction, engine, self.touched.conflicts(reads, writes, engine), uop_begin)
            self.touched.record(reads, writes, engine, len(self.issued[engine]))
        self.issue(Finish(), COMPUTE, [len(self.issued[LOAD]), 0, len(self.issued[STORE])])
        for issued in self.program:
            yield issued.finished()

    def issue(self, instruction: Instruction, engine: int, needs: list[int], uop_begin: int = 0) -> None:
        """Append an instruction that needs so many instructions of each engine to have ended."""
        self.limit_queues(engine, needs)
        if engine == COMPUTE:
            taken = self.taken_by_compute(needs)
            issued = self.append(instruction, COMPUTE, uop_begin)
            for other in taken:
                self.add_token(other, needs[other], COMPUTE, issued)
            return
        far = STORE if engine == LOAD else LOAD
        middle = needs[COMPUTE]
        known = self.known[engine]
        if needs[far] > known[far] and not (middle and self.issued[COMPUTE][middle - 1].known[far] >= needs[far]):
            middle = max(middle, self.carrier(engine, far, needs[far]))
        issued = self.append(instruction, engine)
        if middle > known[COMPUTE]:
            self.add_token(COMPUTE, middle, engine, issued)

    def append(self, instruction: Instruction, engine: int, uop_begin: int = 0) -> _Issued:
        """The next instruction of an engine."""
        known = self.known[engine]
        known[engine] = len(self.issued[engine])
        issued = _Issued(len(self.program), known.copy(), instruction, uop_begin)
        self.program.append(issued)
        self.issued[engine].append(issued)
        return issued

    def taken_by_compute(self, needs: list[int]) -> list[int]:
        """From which neighbours an instruction of compute takes a token; one may know all that the other says."""
        known = self.known[COMPUTE]
        taken = [other for other in (LOAD, STORE) if needs[other] > known[other]]
        if len(taken) == 2:
            if self.issued[LOAD][needs[LOAD] - 1].known[STORE] >= needs[STORE]:
                return [LOAD]
            if self.issued[STORE][needs[STORE] - 1].known[LOAD] >= needs[LOAD]:
                return [STORE]
        return taken

    def carrier(self, engine: int, far: int, number: int) -> int:
        """The instruction of compute whose end tells `engine` that instruction `number` of `far` has ended."""
        compute = self.issued[COMPUTE]
        first = bisect_left(compute, number, key=lambda issued: issued.known[far])
        if first < len(compute):
            return first + 1
        last = compute[-1] if compute else None
        if (
            last is not None
            and last.position > self.issued[far][number - 1].position
            and not last.tokens[far == STORE]
            and self.known[engine][COMPUTE] < len(compute)
        ):
            self.add_token(far, number, COMPUTE, last)
            return len(compute)
        needs = [0, 0, 0]
        needs[far] = number
        self.issue(NOP, COMPUTE, needs)
        return len(compute)

    def add_token(self, giver: int, number: int, taker: int, issued: _Issued) -> None:
        """Let the last instruction of `taker` wait for instruction `number` of `giver`."""
        queue = giver, taker
        pushes, pops = self.pushes[queue], self.pops[queue]
        source = self.issued[giver][number - 1]
        if len(pushes) + 1 - bisect_right(pops, source.known[taker]) > MOST_TOKENS:
            self.merge_token(giver, number, taker)
            return
        pushes.append(number)
        pops.append(len(self.issued[taker]))
        source.tokens[2 + (giver < taker)] = True
        issued.tokens[giver > taker] = True
        self.learn(issued, self.known[taker], source, giver, number)

    def merge_token(self, giver: int, number: int, taker: int) -> None:
        """Give the last token of a full queue later, so that it says all that a new one would.

        The giver stands before the last taker: otherwise `limit_queues` had seen all the tokens before it.
        """
        queue = giver, taker
        pushes, first = self.pushes[queue], self.pops[queue][-1]
        self.issued[giver][pushes[-1] - 1].tokens[2 + (giver < taker)] = False
        source = self.issued[giver][number - 1]
        assert source.position < self.issued[taker][first - 1].position
        source.tokens[2 + (giver < taker)] = True
        pushes[-1] = number
        for issued in self.issued[taker][first - 1 :]:
            self.learn(issued, self.known[taker], source, giver, number)

    @staticmethod
    def learn(issued: _Issued, known: list[int], source: _Issued, giver: int, number: int) -> None:
        """Take over what is known where the token came from."""
        for clock in (issued.known, known):
            for engine, count in enumerate(source.known):
                clock[engine] = max(clock[engine], count)
            clock[giver] = max(clock[giver], number)

    def limit_queues(self, engine: int, needs: list[int]) -> None:
        """Let an instruction wait when its engine may be too many tokens ahead of a taker."""
        for taker in _TAKERS[engine]:
            pops = self.pops[engine, taker]
            if len(pops) < _MANY_TOKENS:
                continue
            if len(pops) - bisect_right(pops, self.known[engine][taker]) >= _MANY_TOKENS:
                needs[taker] = max(needs[taker], pops[-_ENOUGH_TOKENS])


# --- what conflicts

_DRAM = -1
_Space: TypeAlias = int  # a MemoryId, or _DRAM
_Place: TypeAlias = tuple[_Space, Where]


class _Touched:
    """Which instruction of each engine was the last to read and to write every element of SRAM and granule of DRAM.

    A granule is one element of INP. Of DRAM only the part that instructions store to is watched: the rest is constant.
    Micro-ops are not watched: the compute engine alone loads and reads them.
    """

    def __init__(self, pieces: Sequence[Piece], config: VtaConfig) -> None:
        self.granule = config.inp_bytes
        self.stores, (self.first, self.stop) = _watched(pieces)
        self.sizes: dict[_Space, int] = {
            MemoryId.INP: config.inp_depth,
            MemoryId.WGT: config.wgt_depth,
            MemoryId.ACC: config.acc_depth,
            _DRAM: -(-(self.stop - self.first) // self.granule),
        }
        # Appears with the first access, so that an engine that never touches a memory costs nothing.
        self.reads: dict[_Space, dict[int, np.ndarray]] = {space: {} for space in self.sizes}
        self.writes: dict[_Space, dict[int, np.ndarray]] = {space: {} for space in self.sizes}

    def places(self, accesses: Iterable[Access]) -> list[_Place]:
        """Where `accesses` are, as far as that is watched."""
        return [place for access in accesses if (place := self.place(access)) is not None]

    def conflicts(self, reads: list[_Place], writes: list[_Place], engine: int) -> list[int]:
        """The last instruction of each other engine that must have ended before these accesses; 0 for none."""
        needs = [0, 0, 0]
        for last, places in ((self.writes, reads), (self.writes, writes), (self.reads, writes)):
            for space, where in places:
                for other, numbers in last[space].items():
                    if other != engine:
                        needs[other] = max(needs[other], int(numbers[where].max()))
        return needs

    def record(self, reads: list[_Place], writes: list[_Place], engine: int, number: int) -> None:
        """Note that instruction `number` of an engine does these accesses."""
        for last, places in ((self.reads, reads), (self.writes, writes)):
            for space, where in places:
                numbers = last[space].get(engine)
                if numbers is None:
                    numbers = last[space][engine] = np.zeros(self.sizes[space], np.int32)
                numbers[where] = number

    def place(self, access: Access) -> _Place | None:
        """The memory and the places in it, or None if they are not watched."""
        if isinstance(access, Elements):
            return None if access.memory is MemoryId.UOP else (access.memory, access.where)
        if access.start >= self.stores[1] or access.stop <= self.stores[0]:
            return None
        offset, granule = access.start - self.first, self.granule
        if access.rows == 1 or access.size == access.stride or offset % granule or access.stride % granule:
            return _DRAM, slice(offset // granule, -(-(access.stop - self.first) // granule))
        rows = _rows(access.rows, -(-access.size // granule), access.stride // granule)
        return _DRAM, rows + offset // granule


@lru_cache(maxsize=1 << 10)
def _rows(rows: int, size: int, stride: int) -> np.ndarray:
    """Places of `rows` rows of `size`, `stride` apart, from 0 on."""
    return (np.arange(rows)[:, None] * stride + np.arange(size)).reshape(-1)


def _watched(pieces: Sequence[Piece]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where in DRAM all stores lie, first byte and the one behind the last; and they with loads that reach there."""
    stored = [a for p in pieces for a in p.writes if isinstance(a, Bytes)]
    if not stored:
        return (0, 0), (0, 0)
    first, stop = min(a.start for a in stored), max(a.stop for a in stored)
    read = [a for p in pieces for a in p.reads if isinstance(a, Bytes) and a.start < stop and a.stop > first]
    return (first, stop), (min([first, *(a.start for a in read)]), max([stop, *(a.stop for a in read)]))
