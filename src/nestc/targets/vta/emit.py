"""Tensor IR becomes VTA's instructions: every statement of a kernel is one, its unrolled loops are micro-ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.isa import Alu, Gemm, Instruction, Load, MemoryId, Store
from nestc.targets.vta.intrinsics import ACC, INP, WGT, AluStep, GemmStep, LoadTile, StoreTile
from nestc.tensor import index as ix
from nestc.tensor.ir import Call, Const, For, Kernel, Stmt, Var, Window
from nestc.tensor.text import statement_text

MOST_ITERATIONS = (1 << 14) - 1
"""Of a loop of a GEMM or ALU instruction (hw_spec.h: 14 bits)."""

MOST_ELEMENTS = (1 << 16) - 1
"""Rows, elements of a row, and elements between rows of a DMA instruction (hw_spec.h: 16 bits)."""

_MEMORIES: dict[str, MemoryId] = {INP: MemoryId.INP, WGT: MemoryId.WGT, ACC: MemoryId.ACC}

_RESET, _GEMM = [MemoryId.ACC], [MemoryId.ACC, MemoryId.INP, MemoryId.WGT]

Where: TypeAlias = "slice | np.ndarray"
"""Elements of an SRAM: a range, or their indices (sorted, each once)."""


@dataclass(frozen=True, eq=False)
class Elements:
    """Elements of an SRAM that an instruction reads or writes."""

    memory: MemoryId
    where: Where


@dataclass(frozen=True)
class Bytes:
    """Bytes of DRAM that an instruction reads or writes: `rows` times `size`, `stride` apart, from `start` on."""

    start: int
    rows: int
    size: int
    stride: int

    @property
    def stop(self) -> int:
        """The first byte behind the last row."""
        return self.start + (self.rows - 1) * self.stride + self.size


Access: TypeAlias = Elements | Bytes


@dataclass(frozen=True, eq=False)
class Piece:
    """An instruction without tokens, and what it touches.

    ``uops``: int64 (n, 3), columns dst, src, wgt, of a GEMM or ALU instruction, whose ``uop_begin`` is 0 and
    ``uop_end`` n until the micro-ops have places. ``origin``: the kernel.
    """

    instruction: Instruction
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    uops: np.ndarray | None = None
    origin: str = ""


def emit(kernel: Kernel, addresses: Mapping[str, int], config: VtaConfig) -> list[Piece]:
    """One instruction a statement of `kernel`, in order. ``addresses``: byte address in DRAM of every parameter.

    Raises TargetError, naming the statement, for anything that is not one instruction: a number that does not fit in
    its field, an index that is not affine, micro-ops that the pipeline of the ALU cannot take one after another.
    """
    emitter = _Emitter(addresses, config, kernel.name)
    pieces: list[Piece] = []
    for number, statement in enumerate(kernel.body):
        try:
            pieces.append(emitter.piece(statement))
        except _Refused as problem:
            text = statement_text(statement)
            raise TargetError(
                f"kernel {kernel.name}, statement {number}: {problem}, so that it is no VTA instruction: {text}"
            ) from None
    return pieces


class _Refused(Exception):
    """Why a statement is not an instruction."""


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise _Refused(problem)


# Extent of a loop, and by how many elements an operand moves with it.
_Loops: TypeAlias = tuple[tuple[int, int], ...]


@lru_cache(maxsize=1 << 14)
def _pattern(loops: _Loops) -> tuple[int, int, np.ndarray | None, bool]:
    """What an operand at element 0 reaches: first, last, the elements if they are no range, whether each only once."""
    reached, places = np.zeros(1, np.int64), 1
    for extent, step in loops:
        places *= extent
        reached = np.unique(reached[:, None] + np.arange(extent) * step)
    first, last = int(reached[0]), int(reached[-1])
    return first, last, None if last - first + 1 == reached.size else reached, places == reached.size


@lru_cache(maxsize=1 << 14)
def _micro_ops(loops: tuple[tuple[int, int, int, int], ...]) -> np.ndarray:
    """Micro-ops (n, 3) of operands at element 0; a loop is its extent and the steps of dst, src and wgt."""
    uops = np.zeros((1, 3), np.int64)
    for extent, *steps in loops:
        uops = (uops[:, None, :] + np.arange(extent)[:, None] * np.array(steps)).reshape(-1, 3)
    return uops


@dataclass(frozen=True)
class _Operand:
    """An operand of a loop nest: its first element, and how it moves with each loop, outer first."""

    memory: MemoryId
    base: int
    steps: tuple[int, ...]


class _Emitter:
    def __init__(self, addresses: Mapping[str, int], config: VtaConfig, origin: str) -> None:
        self.addresses = addresses
        self.origin = origin
        self.depths = {
            MemoryId.UOP: config.uop_depth,
            MemoryId.INP: config.inp_depth,
            MemoryId.WGT: config.wgt_depth,
            MemoryId.ACC: config.acc_depth,
        }
        self.bytes = {
            MemoryId.INP: config.inp_bytes,
            MemoryId.WGT: config.wgt_bytes,
            MemoryId.ACC: config.acc_bytes,
            MemoryId.OUT: config.inp_bytes,
        }

    def piece(self, statement: Stmt) -> Piece:
        """The instruction of one statement."""
        serial: list[Var] = []
        unrolled: list[Var] = []
        while isinstance(statement, For):
            _demand(len(statement.body) == 1, "a loop does not hold just one statement")
            if statement.kind == "unroll":
                unrolled.append(statement.var)
            else:
                _demand(statement.kind == "serial" and not unrolled, "loops are not serial ones around unrolled ones")
                serial.append(statement.var)
            statement = statement.body[0]
        _demand(isinstance(statement, Call), "it is not a call of an intrinsic")
        assert isinstance(statement, Call)
        intrinsic = statement.intrinsic
        if isinstance(intrinsic, (LoadTile, StoreTile)):
            _demand(not serial and not unrolled, "DMA stands in a loop")
            return self.dma(intrinsic, statement.operands)
        _demand(len(serial) <= 2, f"{len(serial)} serial loops are more than 2")
        loops = (*serial, *unrolled)
        for number, var in enumerate(loops):
            most = MOST_ITERATIONS if number < len(serial) else self.depths[MemoryId.UOP]
            if not 1 <= var.extent <= most:
                raise _Refused(f"loop {var.name} runs {var.extent} times, which is not in 1 .. {most}")
        operands = [self.operand(w, loops) for w in statement.operands]
        if isinstance(intrinsic, GemmStep):
            return self.gemm(intrinsic, serial, unrolled, operands)
        _demand(isinstance(intrinsic, AluStep), f"{intrinsic.name} is not an intrinsic of VTA")
        assert isinstance(intrinsic, AluStep)
        return self.alu(intrinsic, serial, unrolled, operands)

    # --- DMA

    def dma(self, tile: LoadTile | StoreTile, operands: tuple[Window, ...]) -> Piece:
        """LOAD or STORE of a tile."""
        y, x, stride = tile.y, tile.x, tile.stride
        for what, size in (("rows", y), ("elements in a row", x), ("elements between rows", stride)):
            _demand(1 <= size <= MOST_ELEMENTS, f"{size} {what} are not in 1 .. {MOST_ELEMENTS}")
        loading = isinstance(tile, LoadTile)
        near, far = operands if loading else (operands[1], operands[0])
        memory = self.memory(near)
        sram = self.operand(near, ()).base
        _demand(memory is (tile.memory if loading else MemoryId.ACC), f"{near.buffer.name} is not in its memory")
        where = self.reached(memory, sram, ((y * x, 1),))
        name, unit = far.buffer.name, self.bytes[memory if loading else MemoryId.OUT]
        _demand(far.buffer.memory == "param", f"{name} is not in DRAM")
        _demand(name in self.addresses, f"{name} has no address")
        place, rest = divmod(self.addresses[name], unit)
        _demand(not rest, f"the address {self.addresses[name]:#x} of {name} is no multiple of {unit} bytes")
        dram = place + self.place(far, ())[0]
        _demand(0 <= dram < 1 << 32, f"element {dram} of DRAM is out of reach")
        tile_bytes = Bytes(dram * unit, y, x * unit, stride * unit)
        if loading:
            load = Load(memory, sram, dram, y, x, stride)
            return Piece(load, (tile_bytes,), (Elements(memory, where),), None, self.origin)
        store = Store(sram, dram, y, x, stride)
        return Piece(store, (Elements(memory, where),), (tile_bytes,), None, self.origin)

    # --- compute

    def gemm(self, step: GemmStep, serial: list[Var], unrolled: list[Var], operands: list[_Operand]) -> Piece:
        """GEMM, or its reset."""
        memories = [o.memory for o in operands]
        if memories != (_RESET if step.reset else _GEMM):
            raise _Refused(f"operands of {step.name} lie in {', '.join(m.name for m in memories)}")
        outer, inner, factors = self.factors(serial, operands)
        touched, _ = self.touched(serial, unrolled, operands)
        uops = self.uops(unrolled, operands)
        if step.reset:
            instruction = Gemm(True, 0, len(uops), outer, inner, *factors[0])
            return Piece(instruction, (), (touched[0],), uops, self.origin)
        dst, src, wgt = factors
        instruction = Gemm(False, 0, len(uops), outer, inner, *dst, *src, *wgt)
        return Piece(instruction, tuple(touched), (touched[0],), uops, self.origin)

    def alu(self, step: AluStep, serial: list[Var], unrolled: list[Var], operands: list[_Operand]) -> Piece:
        """ALU; with an immediate, src repeats dst: the RTL (TensorAlu.scala) reads there, the specification at dst."""
        for operand in operands:
            _demand(operand.memory is MemoryId.ACC, f"an operand of {step.name} is not an accumulator")
        imm = step.imm
        _demand(imm is None or -(1 << 15) <= imm < 1 << 15, f"the immediate {imm} does not fit in 16 bits")
        operands = operands if imm is None else [operands[0], operands[0]]
        outer, inner, factors = self.factors(serial, operands)
        touched, once = self.touched(serial, unrolled, operands)
        uops = self.uops(unrolled, operands)
        if imm is None:
            if not _apart(touched[0].where, touched[1].where):
                dst, src = (self.sequence(o, serial, unrolled) for o in operands)
                _demand(not np.any(dst[:-1] == src[1:]), "an element is read right after it is written")
        elif not once[0]:
            dst = self.sequence(operands[0], serial, unrolled)
            _demand(not np.any(dst[:-1] == dst[1:]), "an element is written twice in consecutive cycles")
        instruction = Alu(step.op, 0, len(uops), outer, inner, *factors[0], *factors[1], imm is not None, imm or 0)
        return Piece(instruction, tuple(touched), (touched[0],), uops, self.origin)

    # --- operands

    def memory(self, w: Window) -> MemoryId:
        """The SRAM of an operand."""
        memory = _MEMORIES.get(w.buffer.memory)
        if memory is None:
            raise _Refused(f"{w.buffer.name} is in {w.buffer.memory}, not in an SRAM of VTA")
        return memory

    def place(self, w: Window, loops: tuple[Var, ...]) -> tuple[int, tuple[int, ...]]:
        """First element of a window and how it moves with `loops`."""
        base, terms = ix.linear(w.index[0])
        steps = tuple([terms.get(var, 0) for var in loops])
        if len(terms) != len(steps) - steps.count(0):
            raise _Refused(f"the place in {w.buffer.name} is not affine in the loops")
        for i in w.index[1:]:
            if not (isinstance(i, Const) and i.value == 0):
                raise _Refused(f"the place in {w.buffer.name} is not where an element begins")
        return base, steps

    def operand(self, w: Window, loops: tuple[Var, ...]) -> _Operand:
        """An operand in SRAM."""
        return _Operand(self.memory(w), *self.place(w, loops))

    def factors(self, serial: list[Var], operands: list[_Operand]) -> tuple[int, int, list[tuple[int, int]]]:
        """iter_out, iter_in, and the factors of both for every operand."""
        extents = [var.extent for var in serial] + [1] * (2 - len(serial))
        factors: list[tuple[int, int]] = []
        for operand in operands:
            out, inner, *_ = (*operand.steps[: len(serial)], 0, 0)
            depth = self.depths[operand.memory]
            if not (0 <= out < depth and 0 <= inner < depth):
                raise _Refused(f"a factor of {operand.memory.name} is {out} or {inner}, not in 0 .. {depth - 1}")
            factors.append((out, inner))
        return extents[0], extents[1], factors

    def reached(self, memory: MemoryId, base: int, loops: _Loops) -> Where:
        """The elements that an operand reaches over all iterations."""
        first, last, elements, _ = _pattern(loops)
        depth = self.depths[memory]
        if base + first < 0 or base + last >= depth:
            raise _Refused(f"elements {base + first} .. {base + last} of {memory.name} are not in 0 .. {depth - 1}")
        return slice(base + first, base + last + 1) if elements is None else elements + base

    def touched(
        self, serial: list[Var], unrolled: list[Var], operands: list[_Operand]
    ) -> tuple[list[Elements], list[bool]]:
        """The elements of each operand, and whether each of them comes only once."""
        extents = [var.extent for var in (*serial, *unrolled)]
        touched: list[Elements] = []
        once: list[bool] = []
        for operand in operands:
            loops = tuple(zip(extents, operand.steps))
            touched.append(Elements(operand.memory, self.reached(operand.memory, operand.base, loops)))
            once.append(_pattern(loops)[3])
        return touched, once

    def uops(self, unrolled: list[Var], operands: list[_Operand]) -> np.ndarray:
        """The micro-ops (n, 3); operands that are not there are 0."""
        bases = [o.base for o in operands] + [0] * (3 - len(operands))
        count = len(unrolled)
        steps = [o.steps[len(o.steps) - count :] for o in operands] + [(0,) * count] * (3 - len(operands))
        loops = tuple((var.extent, *(s[k] for s in steps)) for k, var in enumerate(unrolled))
        if len(uops := _micro_ops(loops)) > self.depths[MemoryId.UOP]:
            raise _Refused(f"{len(uops)} micro-ops do not fit in their buffer")
        return uops + np.array(bases)

    def sequence(self, operand: _Operand, serial: list[Var], unrolled: list[Var]) -> np.ndarray:
        """The element of an operand in every micro-op that is executed, in order."""
        places = np.array([operand.base])
        for var, step in zip((*serial, *unrolled), operand.steps):
            places = (places[:, None] + np.arange(var.extent) * step).reshape(-1)
        return places


def _apart(a: Where, b: Where) -> bool:
    """Whether two sets of elements surely have none in common."""
    (a_first, a_last), (b_first, b_last) = (
        (w.start, w.stop - 1) if isinstance(w, slice) else (int(w[0]), int(w[-1])) for w in (a, b)
    )
    return a_last < b_first or b_last < a_first
