"""Where the fields of VTA's instructions and micro-ops lie, by the C bit-field rule, for any depth of the buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Widths that do not follow from a configuration (tvm-vta include/vta/hw_spec_const.h).
OPCODE_BITS, MEMORY_BITS, ALU_OPCODE_BITS = 3, 3, 3
SRAM_BITS, DRAM_BITS, SIZE_BITS, STRIDE_BITS, PAD_BITS = 16, 32, 16, 16, 4
LOOP_BITS, IMM_BITS = 14, 16
INSTRUCTION_BITS, WORD_BITS, UOP_BITS = 128, 64, 32

_HEAD = (("opcode", OPCODE_BITS), ("pop_prev", 1), ("pop_next", 1), ("push_prev", 1), ("push_next", 1))


@dataclass(frozen=True)
class Field:
    """`width` bits from bit `start` (bit 0 is the lowest of the first byte); two's complement if signed."""

    name: str
    start: int
    width: int
    signed: bool = False

    @property
    def low(self) -> int:
        """The smallest value that fits."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value that fits."""
        return (1 << (self.width - 1 if self.signed else self.width)) - 1


@dataclass(frozen=True)
class Layout:
    """Fields of one kind of instruction in order, and the bits that the C struct takes."""

    fields: tuple[Field, ...]
    bits: int


@dataclass(frozen=True)
class Layouts:
    """Every layout of one configuration (the structs of tvm-vta include/vta/hw_spec.h)."""

    memory: Layout
    gemm: Layout
    alu: Layout
    finish: Layout
    uop: Layout


def layouts(log_uop: int, log_inp: int, log_wgt: int, log_acc: int) -> Layouts:
    """Layouts for buffers that hold 2 ** log elements each; nothing is checked against 128 and 32 bits."""
    memory = (
        *_HEAD,
        *(("memory", MEMORY_BITS), ("sram", SRAM_BITS), ("dram", DRAM_BITS)),
        *(("y_size", SIZE_BITS), ("x_size", SIZE_BITS), ("x_stride", STRIDE_BITS)),
        *((name, PAD_BITS) for name in ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")),
    )
    loops = (
        *_HEAD,
        *(("reset", 1), ("uop_begin", log_uop), ("uop_end", log_uop + 1)),
        *(("iter_out", LOOP_BITS), ("iter_in", LOOP_BITS), ("dst_out", log_acc), ("dst_in", log_acc)),
    )
    gemm = (*loops, ("src_out", log_inp), ("src_in", log_inp), ("wgt_out", log_wgt), ("wgt_in", log_wgt))
    # An ALU source is an accumulator, so its factors are as wide as those of the destination.
    alu = (
        *loops,
        ("src_out", log_acc),
        ("src_in", log_acc),
        ("op", ALU_OPCODE_BITS),
        ("use_imm", 1),
        ("imm", IMM_BITS),
    )
    # hw_spec.h gives the source index of a micro-op the width of an accumulator's address, for GEMM too.
    uop = (("dst", log_acc), ("src", log_acc), ("wgt", log_wgt))
    return Layouts(
        _place(memory, WORD_BITS),
        _place(gemm, WORD_BITS),
        _place(alu, WORD_BITS),
        _place(_HEAD, WORD_BITS),
        _place(uop, UOP_BITS),
    )


def _place(widths: Sequence[tuple[str, int]], unit: int) -> Layout:
    """Fields fill a unit from its lowest bit; one that does not fit in what is left starts the next (GCC, Clang)."""
    fields: list[Field] = []
    position = 0
    for name, width in widths:
        if position % unit + width > unit:
            position += unit - position % unit
        fields.append(Field(name, position, width, name == "imm"))
        position += width
    return Layout(tuple(fields), -(-position // unit) * unit)
