"""VTA's instructions as data (tvm-vta ``hw_spec.h``; VTA paper, arXiv:1807.04188, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np


class MemoryId(IntEnum):
    """What a LOAD or STORE moves; the addresses of an instruction count elements of this memory."""

    UOP = 0
    WGT = 1
    INP = 2
    ACC = 3
    OUT = 4
    ACC_8BIT = 5


class AluOp(IntEnum):
    """Operation of an ALU instruction on int32; SHR by a negative amount shifts left. MUL is not in every VTA."""

    MIN = 0
    MAX = 1
    ADD = 2
    SHR = 3
    MUL = 4


@dataclass(frozen=True)
class Tokens:
    """Dependency tokens: taken before an instruction starts (pop), given when it has ended (push).

    prev and next are neighbours in the order load, compute, store.
    """

    pop_prev: bool = False
    pop_next: bool = False
    push_prev: bool = False
    push_next: bool = False


NONE = Tokens()


@dataclass(frozen=True)
class Load:
    """`y_size` rows of `x_size` elements, `x_stride` apart in DRAM, packed in SRAM with zeros around them.

    UOP and ACC loads run on the compute engine, INP and WGT loads on the load engine. ``x_size`` 0: only tokens.
    """

    memory: MemoryId
    sram: int
    dram: int
    y_size: int
    x_size: int
    x_stride: int
    y_pad_0: int = 0
    y_pad_1: int = 0
    x_pad_0: int = 0
    x_pad_1: int = 0
    tokens: Tokens = NONE


@dataclass(frozen=True)
class Store:
    """Accumulators (packed rows in SRAM) to DRAM, each cut to its low 8 bits; the addresses count output elements."""

    sram: int
    dram: int
    y_size: int
    x_size: int
    x_stride: int
    tokens: Tokens = NONE


@dataclass(frozen=True)
class Gemm:
    """acc[dst + i * dst_out + j * dst_in] += inp[src + ...] * wgt[wgt + ...], i < iter_out, j < iter_in, each micro-op.

    With ``reset`` the accumulators become 0 instead.
    """

    reset: bool
    uop_begin: int
    uop_end: int
    iter_out: int
    iter_in: int
    dst_out: int = 0
    dst_in: int = 0
    src_out: int = 0
    src_in: int = 0
    wgt_out: int = 0
    wgt_in: int = 0
    tokens: Tokens = NONE


@dataclass(frozen=True)
class Alu:
    """For each i < iter_out, j < iter_in and micro-op: acc[dst + ...] = op(acc[dst + ...], acc[src + ...] or imm)."""

    op: AluOp
    uop_begin: int
    uop_end: int
    iter_out: int
    iter_in: int
    dst_out: int = 0
    dst_in: int = 0
    src_out: int = 0
    src_in: int = 0
    use_imm: bool = False
    imm: int = 0
    tokens: Tokens = NONE


@dataclass(frozen=True)
class Finish:
    """The end of a stream; runs on the compute engine."""

    tokens: Tokens = NONE


Instruction: TypeAlias = Load | Store | Gemm | Alu | Finish

ENGINES = ("load", "compute", "store")
LOAD, COMPUTE, STORE = range(3)


def engine_of(instruction: Instruction) -> int:
    """The engine that executes an instruction, an index of `ENGINES`: LOADs of micro-ops and accumulators compute."""
    if isinstance(instruction, Store):
        return STORE
    if isinstance(instruction, Load) and instruction.memory in (MemoryId.INP, MemoryId.WGT):
        return LOAD
    return COMPUTE


@dataclass(frozen=True, eq=False)
class Stream:
    """Instructions in program order, and the image of micro-ops in DRAM that their LOAD UOP instructions read.

    ``uops``: int64 (n, 3), columns dst, src, wgt. Micro-op i lies at DRAM address ``uop_base + i`` (in micro-ops).
    """

    instructions: tuple[Instruction, ...]
    uops: np.ndarray
    uop_base: int
